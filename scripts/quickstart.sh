#!/usr/bin/env bash
# From a fresh clone to a trained model: four silos train one language model together on Flower.
#
#   scripts/quickstart.sh [overrides ...]     e.g. scripts/quickstart.sh rounds=20 strategy=diloco
#   scripts/quickstart.sh --fresh             throw the last quickstart away and train again
#
# Needs Python 3.11 or newer and the package registry; no GPU, no account, no other download.
# A second call reuses the environment and the corpus, resumes a stopped run, and shows a finished one.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run=runs/quickstart
if [ "${1:-}" = "--fresh" ]; then
  shift
  rm -rf "$run"
fi
ensure_environment

if [ -f "$run/summary.json" ]; then
  echo "This run is finished; scripts/quickstart.sh --fresh trains again."
  exec photon summary "$run"
elif compgen -G "$run/checkpoints/round-*" >/dev/null; then
  echo "Going on with the run in $run ..."
  exec photon resume "$run"
else
  exec photon train "run_dir=$run" "$@"
fi
