#!/usr/bin/env bash
# Everything that must be green: style, types, tests. Arguments go to pytest, e.g. scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment dev

ruff check .
ruff format --check .
mypy
# In the order of the files: by number of tests, the few that start whole programs would come last, one by one.
# One worker more than there are cores: some always wait for programs that they started.
# Not every system tells which cores a process may use.
cores=$(python -c 'import os; print(len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)))')
exec pytest -n "$((cores + 1))" --dist loadfile --no-loadscope-reorder "$@"
