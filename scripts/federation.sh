#!/usr/bin/env bash
# A federation of real processes on this machine: an aggregator and silos, each with files of its own.
# Prints every command of Flower that it runs.
#
#   scripts/federation.sh up [--silos N|NAME,NAME] [--data DIR] [--gateway FILE]... [--node-config SETTINGS]
#                            [--insecure] [--folder DIR]
#   scripts/federation.sh status [--folder DIR]
#   scripts/federation.sh down [--folder DIR]
#
# --silos: how many silos of the data, or which (default: all)   --data: made by `photon data prepare`
# (default: the embedded corpus)   --gateway: a federation that takes part as a silo does (docs/worldlm.md)
# --node-config: what silos set beside their folders (docs/silo.md)   --insecure: no TLS, no node keys
# --folder: default .photon/federation
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment
exec python -m photon.deployment.federation "$@"
