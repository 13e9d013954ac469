#!/usr/bin/env bash
# A whole federation in containers on one machine: an aggregator behind its proxy, and silos on networks of their own.
#
#   docker/federation.sh train [overrides ...]   bring everything up and train, e.g. train rounds=4 strategy=diloco
#   docker/federation.sh build [arguments ...]   build the images; arguments go to docker build
#   docker/federation.sh up                      keys, data and containers, without training
#   docker/federation.sh status                  the containers, and the nodes as the SuperLink sees them
#   docker/federation.sh compose ARGUMENTS ...   any other command of compose, e.g. compose logs -f silo-1
#   docker/federation.sh down                    stop and remove the containers; keys, data and runs stay
#
# Everything lies in PHOTON_DEPLOYMENT (default runs/docker): aggregator/ and a folder per silo. PHOTON_SILOS names
# the silos to start (default "silo-1 silo-2 silo-3 silo-4"), PHOTON_HOST the host by which silos of other machines
# reach the aggregator. docs/docker.md explains the rest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
export PHOTON_IMAGE=${PHOTON_IMAGE:-photon:$version}
export PHOTON_PROXY_IMAGE=${PHOTON_PROXY_IMAGE:-photon-proxy:$version}
export PHOTON_DEPLOYMENT=${PHOTON_DEPLOYMENT:-$root/runs/docker}
export COMPOSE_PROJECT_NAME=${COMPOSE_PROJECT_NAME:-photon}
# Containers run as whoever calls this, so that keys stay private and results are the caller's; never as root.
if [ -z "${PHOTON_USER:-}" ]; then
  PHOTON_USER=$(id -u):$(id -g)
  if [ "$(id -u)" = 0 ]; then PHOTON_USER=10001:10001; fi
fi
export PHOTON_USER
read -ra silos <<<"${PHOTON_SILOS-silo-1 silo-2 silo-3 silo-4}"

fail() {
  echo "photon: $1" >&2
  exit "${2:-2}"
}

require_docker() {
  command -v docker >/dev/null || fail "docker not found; install Docker, or docker.io and docker-compose on Debian"
  docker info >/dev/null 2>&1 || fail "the Docker engine does not answer; start it, or set DOCKER_HOST"
}

compose() {
  local -a command=(docker compose) files=(-f docker/compose.yaml)
  docker compose version >/dev/null 2>&1 || command=(docker-compose)
  if [ -n "${PHOTON_GPU:-}" ]; then files+=(-f docker/compose.gpu.yaml); fi
  "${command[@]}" "${files[@]}" "$@"
}

build() {
  local target image
  export DOCKER_BUILDKIT=${DOCKER_BUILDKIT:-1} # older engines ask for it
  for target in proxy photon; do
    image=$PHOTON_IMAGE
    if [ "$target" = proxy ]; then image=$PHOTON_PROXY_IMAGE; fi
    docker build --file docker/Dockerfile --target "$target" --tag "$image" "$@" .
  done
}

in_folder() { compose run --rm -T prepare "$@"; }
at_aggregator() { compose run --rm -T cli "$@"; }

# A folder is made only if it is not there; what an operator has put into it is kept.
make_folders() {
  local part
  umask 077
  mkdir -p "$PHOTON_DEPLOYMENT/aggregator/superlink" "$PHOTON_DEPLOYMENT/aggregator/state/flower"
  for part in "${silos[@]}"; do mkdir -p "$PHOTON_DEPLOYMENT/$part/state"; done
  if [ "$(id -u)" = 0 ]; then chown -R "$PHOTON_USER" "$PHOTON_DEPLOYMENT"; fi
}

make_keys() {
  local silo listen=${PHOTON_LISTEN:-8443}
  # The same commands as without containers. What they say to do next is done by this script. A proxy is there already.
  [ -d "$PHOTON_DEPLOYMENT/aggregator/keys" ] ||
    in_folder photon aggregator init aggregator ${PHOTON_HOST:+--host "$PHOTON_HOST"} --host aggregator \
      --host superlink --port "${listen##*:}" --no-proxy >/dev/null
  for silo in "${silos[@]}"; do
    [ -d "$PHOTON_DEPLOYMENT/$silo/keys" ] || in_folder photon silo init "$silo" --name "$silo" >/dev/null
    # What passes between the organisations: the authority's certificate one way, a public key the other.
    in_folder sh -c "cp aggregator/keys/authority.crt $silo/keys/ && mkdir -p aggregator/state/nodes &&
      cp $silo/keys/node.pub aggregator/state/nodes/$silo.pub"
  done
}

# Silos without text of their own are given a part of the corpus: the embedded one, if there is no other.
make_data() {
  local silo number=0
  local -a parts
  for silo in "${silos[@]}"; do
    number=$((number + 1))
    [ ! -f "$PHOTON_DEPLOYMENT/$silo/data/manifest.json" ] || continue
    [ -f "$PHOTON_DEPLOYMENT/corpus/manifest.json" ] || in_folder photon data prepare --embedded --output corpus
    [ -d "$PHOTON_DEPLOYMENT/parts" ] || in_folder photon data separate corpus --output parts
    parts=("$PHOTON_DEPLOYMENT"/parts/*)
    [ "$number" -le ${#parts[@]} ] ||
      fail "the corpus has ${#parts[@]} silos, so there is no text for $silo; put prepared data into its data/"
    in_folder cp -rT "parts/${parts[$((number - 1))]##*/}" "$silo/data"
  done
}

connect() {
  at_aggregator sh -c 'cat >"$FLWR_HOME/config.toml"' <<'END'
[superlink]
default = "aggregator"

[superlink.aggregator]
address = "superlink:8000"
root-certificates = "/run/secrets/authority-certificate"
END
}

register() {
  local silo answer
  for silo in "${silos[@]}"; do
    answer=$(at_aggregator flwr supernode register "nodes/$silo.pub" aggregator --name "$silo" 2>&1) ||
      [[ $answer == *"already"* ]] || fail "$silo cannot be registered: $answer" 1
  done
}

up() {
  docker image inspect "$PHOTON_IMAGE" "$PHOTON_PROXY_IMAGE" >/dev/null 2>&1 || build
  make_folders
  make_keys
  make_data
  compose up -d superlink superexec proxy
  connect
  register
  [ ${#silos[@]} = 0 ] || compose up -d "${silos[@]}"
}

train() {
  local run_dir=/state/runs/${PHOTON_RUN:-$(date +%Y%m%d-%H%M%S)}
  up
  local -a terminal=() wait=()
  [ -t 0 ] && [ -t 1 ] || terminal=(-T)
  [ ${#silos[@]} = 0 ] || wait=("federation.silos=${#silos[@]}")
  compose run --rm "${terminal[@]}" cli photon train federation=deployment "${wait[@]}" "run_dir=$run_dir" "$@"
}

require_docker
case "${1:-}" in
  train | build) "$@" ;;
  up) up ;;
  status)
    compose ps
    at_aggregator flwr supernode list aggregator
    ;;
  compose)
    shift
    compose "$@"
    ;;
  down) compose down --remove-orphans ;;
  *) fail "usage: docker/federation.sh train|build|up|status|compose|down (the head of the script explains them)" ;;
esac
