#!/usr/bin/env bash
# Everything that must be green: style, types, tests. Arguments go to pytest, e.g. scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment

ruff check .
ruff format --check .
mypy
# In the order of the files: by number of tests, the few that start whole programs would come last, one by one.
# One worker more than there are cores: some always wait for programs that they started.
workers=$(python -c 'import os; print(len(os.sched_getaffinity(0)) + 1)')
exec pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
