#!/usr/bin/env bash
# Everything that must be green: style, types, tests. Arguments go to pytest, e.g. scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment

ruff check .
ruff format --check .
mypy
# In the order of the files: by number of tests, the few that start whole programs would come last, one by one.
exec pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
