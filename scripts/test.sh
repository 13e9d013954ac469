#!/usr/bin/env bash
# Everything that must be green: style, types, tests. Arguments go to pytest, e.g. scripts/test.sh -k fold
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment

ruff check .
ruff format --check .
mypy
exec pytest -n auto --dist loadfile "$@"
