#!/usr/bin/env bash
# The containers, for real and from nothing: build, bring up, train, compare, probe the walls, kill, take down.
#
#   tests/deployment/docker.sh [FOLDER]      default /tmp/photon-docker; a second call reuses what is there
#
# Takes the engine that answers, or installs Debian's and runs one of its own (as root). If BASE_IMAGE is not set,
# the base image is made with debootstrap, so that no registry of images is needed; otherwise BASE_IMAGE and
# PROXY_BASE_IMAGE are taken. The pip settings of this machine (certificates, folder of wheels) are passed on to the
# build. It works on a copy of what is committed. 30 minutes and 8 GB on two cores.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$(mkdir -p "${1:-/tmp/photon-docker}" && cd "${1:-/tmp/photon-docker}" && pwd)
settings=(rounds=3 local_steps=8 cohort=null training.threads=1 training.precision=fp32 evaluation.sequences=16
  telemetry.sample_tokens=0 telemetry.export=false telemetry.report=false)
export PHOTON_DEPLOYMENT=$folder/deployment COMPOSE_PROJECT_NAME=photon-test
export PHOTON_IMAGE=photon:test PHOTON_PROXY_IMAGE=photon-proxy:test PHOTON_LISTEN=127.0.0.1:18443
silos=(silo-1 silo-2)
export PHOTON_SILOS="${silos[*]}"
began=$SECONDS

say() { echo "[$((SECONDS - began)) s] $*"; }
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
expect() { # WHAT EXPECTED FOUND
  [ "$2" = "$3" ] || fail "$1: expected $2, found $3"
  say "ok: $1: $3"
}

# --- engine -------------------------------------------------------------------------------------------

engine_pid=
stop_engine() {
  [ -z "$engine_pid" ] || { kill "$engine_pid" && wait "$engine_pid"; } 2>/dev/null || true
}

start_engine() {
  if ! docker info >/dev/null 2>&1; then
    command -v dockerd >/dev/null && command -v docker-compose >/dev/null ||
      { apt-get update -qq && apt-get install -qq -y docker.io docker-compose; } >"$folder/apt.log" 2>&1
    # The client that belongs to that engine can build without plug-ins.
    export PATH="/usr/bin:$PATH" DOCKER_HOST="unix://$folder/docker.sock"
    dockerd --data-root "$folder/data" --exec-root "$folder/exec" -H "$DOCKER_HOST" --pidfile "$folder/pid" \
      >"$folder/dockerd.log" 2>&1 &
    engine_pid=$!
    for _ in $(seq 60); do docker info >/dev/null 2>&1 && break || sleep 1; done
  fi
  docker info >/dev/null || fail "no Docker engine"
}

base_image() {
  [ -z "${BASE_IMAGE:-}" ] || return 0
  if [ ! -f "$folder/base.tar" ]; then
    command -v debootstrap >/dev/null || apt-get install -qq -y debootstrap >>"$folder/apt.log" 2>&1
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm \
      "$folder/root" >"$folder/debootstrap.log"
    tar -C "$folder/root" -c . >"$folder/base.tar.part" && mv "$folder/base.tar.part" "$folder/base.tar"
    rm -rf "$folder/root"
  fi
  docker image inspect photon-base:test >/dev/null 2>&1 ||
    docker import - photon-base:test <"$folder/base.tar" >/dev/null
  BASE_IMAGE=photon-base:test PROXY_BASE_IMAGE=photon-base:test
}

# What pip needs on this machine goes into the build folder of the copy, never into the image.
overlay() {
  local certificates=${PIP_CERT:-} wheels=${PIP_FIND_LINKS:-} to=docker/overlay
  echo "[global]" >$to/pip.conf
  if [ -f "$certificates" ]; then
    cp "$certificates" $to/ca.crt
    echo "cert = /overlay/ca.crt" >>$to/pip.conf
  fi
  if [ -d "$wheels" ]; then
    cp "$wheels"/*.whl $to/
    echo "find-links = /overlay" >>$to/pip.conf
  fi
}

build() {
  local -a arguments=(--network host --build-arg "BASE_IMAGE=$BASE_IMAGE")
  arguments+=(--build-arg "PROXY_BASE_IMAGE=${PROXY_BASE_IMAGE:-$BASE_IMAGE}")
  docker/federation.sh build "${arguments[@]}" >"$folder/build.log" 2>&1 || fail "build; see $folder/build.log"
  say "built: $(docker image inspect -f '{{.Size}}' photon:test | awk '{print $1 / 1e6 " MB"}')," \
    "proxy $(docker image inspect -f '{{.Size}}' photon-proxy:test | awk '{print $1 / 1e6 " MB"}')"
}

# --- the federation -----------------------------------------------------------------------------------

compose() { docker/federation.sh compose "$@"; }
container() { compose ps -q "$1" | head -n 1; }
in_container() { docker exec -i "$(container "$1")" "${@:2}"; }

finish() {
  status=$?
  [ $status = 0 ] || compose logs --no-color >"$folder/containers.log" 2>&1 || true
  [ $status = 0 ] || echo "the containers' last words: $folder/containers.log" >&2
  docker/federation.sh down >/dev/null 2>&1 || true
  stop_engine
}

figure() { # FOLDER-OF-RUN KEY
  python3 -c "import functools, json, sys
print(functools.reduce(lambda x, k: x[k], sys.argv[2].split('.'), json.load(open(sys.argv[1] + '/summary.json'))))" "$@"
}

compare_with_one_process() {
  local key runs=$PHOTON_DEPLOYMENT/aggregator/state/runs
  rm -rf "$PHOTON_DEPLOYMENT/reference"
  compose run --rm -T prepare photon train federation=inprocess data=prepared data.path=corpus \
    run_dir=reference "${settings[@]}" >/dev/null
  for key in weights_sha256 perplexity.final perplexity.initial; do
    expect "$key as without containers" "$(figure "$PHOTON_DEPLOYMENT/reference" $key)" "$(figure "$runs/$run" $key)"
  done
  say "rounds took: $(python3 -c "import json, sys
for line in open(sys.argv[1]):
    event = json.loads(line)
    if event['event'] == 'round_finished':
        print('%.0f s' % event['seconds']['round'], end=' ')" "$runs/$run/events.jsonl")"
}

# --- walls --------------------------------------------------------------------------------------------

status_of() { # METHOD PATH: what the proxy says to a silo
  docker run --rm --network "${COMPOSE_PROJECT_NAME}_silo-1" --user 0 \
    -v "$PHOTON_DEPLOYMENT/silo-1/keys/authority.crt:/authority.crt:ro" photon-proxy:test \
    curl --silent --output /dev/null --write-out '%{http_code}' --path-as-is --cacert /authority.crt \
    -X "$1" "https://aggregator:8443$2"
}

reach() { # FROM HOST PORT
  in_container "$1" python - "$2" "$3" <<'END'
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 4).close()
    print("reached")
except OSError:
    print("unreachable")
END
}

address() { docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$(container "$1")"; }

probe_walls() {
  local path
  expect "health, seen by a silo" 200 "$(status_of GET /health)"
  # 415: the Fleet API answers, and wants a message of its own kind.
  expect "fleet, seen by a silo" 415 "$(status_of POST /v1/fleet/pull-messages)"
  for path in /v1/control/list-runs /v1/control/start-run /v1/runtime/acquire-task /v1/fleet/../control/list-runs \
    /v1/fleet/%2e%2e/control/list-runs /v1/fleet/..%2fcontrol%2flist-runs //v1/control/list-runs /docs /; do
    expect "$path, seen by a silo" 403 "$(status_of POST "$path")"
  done
  expect "silo-1 to its proxy" reached "$(reach silo-1 aggregator 8443)"
  expect "silo-1 to the address of silo-2" unreachable "$(reach silo-1 "$(address silo-2)" 9094)"
  expect "silo-1 to the address of the SuperLink" unreachable "$(reach silo-1 "$(address superlink)" 8000)"
  expect "silo-1 to the name of silo-2" unreachable "$(reach silo-1 silo-2 9094)"
  expect "silo-1 to the world" unreachable "$(reach silo-1 192.0.2.1 443)"
  expect "writing to the text of a silo" refused \
    "$(in_container silo-1 sh -c 'touch /data/x 2>/dev/null && echo written || echo refused')"
  expect "writing to the image" refused \
    "$(in_container silo-1 sh -c 'touch /opt/photon/x 2>/dev/null && echo written || echo refused')"
  [ "$(in_container silo-1 id -u)" != 0 ] || fail "a silo runs as root"
}

stranger() {
  local said
  rm -rf "$folder/stranger"
  mkdir "$folder/stranger"
  cp -r "$PHOTON_DEPLOYMENT/silo-1/keys/authority.crt" "$folder/stranger/"
  chmod 755 "$folder/stranger"
  said=$(docker run --rm --network "${COMPOSE_PROJECT_NAME}_silo-1" -v "$folder/stranger:/keys:ro" photon:test sh -c \
    'photon keys node /tmp/own node >/dev/null && timeout 120 flower-supernode --superlink aggregator:8443 \
      --root-certificates /keys/authority.crt --auth-supernode-private-key /tmp/own/node; echo "exit $?"' 2>&1) || true
  [[ $said == *"Failed to activate SuperNode"*"exit 1" ]] || fail "a node with an unregistered key: $said"
  say "ok: a node with an unregistered key is turned away"
}

# --- faults -------------------------------------------------------------------------------------------

online() {
  compose run --rm -T cli flwr supernode list aggregator --format json 2>/dev/null |
    python3 -c 'import json, sys; print(sum(node["status"] == "online" for node in json.load(sys.stdin)["nodes"]))'
}

kill_and_see_it_come_back() {
  local killed=$SECONDS victim
  victim=$(container silo-2)
  kill -9 "$(docker inspect -f '{{.State.Pid}}' "$victim")"
  for _ in $(seq 30); do [ "$(docker inspect -f '{{.RestartCount}}' "$victim")" = 0 ] || break; sleep 1; done
  [ "$(docker inspect -f '{{.RestartCount}}' "$victim")" != 0 ] || fail "silo-2 was not started again"
  # The SuperLink takes a node back once it counts the old one as dead, after a minute.
  sleep 75
  for _ in $(seq 40); do [ "$(online)" = ${#silos[@]} ] && break || sleep 5; done
  expect "silos online after silo-2 was killed" ${#silos[@]} "$(online)"
  say "silo-2 came back within $((SECONDS - killed)) s, restarts: $(docker inspect -f '{{.RestartCount}}' "$victim")"
}

restart_the_superlink_in_a_round() {
  local runs=$PHOTON_DEPLOYMENT/aggregator/state/runs training
  # This run needs every silo, and so every reply.
  PHOTON_RUN=$run-again docker/federation.sh train "${settings[@]}" rounds=2 local_steps=16 \
    "federation.quorum=${#silos[@]}" federation.max_failures=0 >"$folder/again.log" 2>&1 &
  training=$!
  until grep -q round_started "$runs/$run-again/events.jsonl" 2>/dev/null; do
    kill -0 $training 2>/dev/null || fail "the second run did not begin; see $folder/again.log"
    sleep 1
  done
  compose restart superlink >/dev/null 2>&1
  say "SuperLink restarted while silos train"
  wait $training || fail "the second run; see $folder/again.log"
  expect "rounds trained in spite of that" 2 "$(figure "$runs/$run-again" rounds)"
}

peaks() {
  local name
  for name in superlink superexec proxy "${silos[@]}"; do
    in_container "$name" sh -c 'cat /sys/fs/cgroup/memory.peak 2>/dev/null ||
      cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes' | awk -v name="$name" '{printf "%s %.0f MB  ", name, $1 / 1e6}'
  done
}

# ------------------------------------------------------------------------------------------------------

start_engine
trap finish EXIT
say "engine $(docker version -f '{{.Server.Version}}')"
base_image
rm -rf "$folder/source"
mkdir -p "$folder/source"
git -C "$root" archive HEAD | tar -x -C "$folder/source"
cd "$folder/source"
overlay
build
# Two silos of the embedded corpus, so that a slow machine can do it.
mkdir -p "$PHOTON_DEPLOYMENT"
[ "$(id -u)" != 0 ] || chown 10001:10001 "$PHOTON_DEPLOYMENT"
[ -f "$PHOTON_DEPLOYMENT/corpus/manifest.json" ] || compose run --rm -T prepare \
  photon data prepare --embedded --partition "iid:${#silos[@]}" --output corpus >"$folder/corpus.log" 2>&1
run=run-$(date +%Y%m%d-%H%M%S)
docker/federation.sh up >"$folder/up.log" 2>&1 || fail "up; see $folder/up.log"
say "up"
PHOTON_RUN=$run docker/federation.sh train "${settings[@]}" >"$folder/train.log" 2>&1 || fail "see $folder/train.log"
say "trained; see $folder/train.log"
compare_with_one_process
probe_walls
stranger
say "memory, highest, with the cache of files: $(peaks)"
kill_and_see_it_come_back
restart_the_superlink_in_a_round
docker/federation.sh down >/dev/null 2>&1
expect "containers left" 0 "$(docker ps -aq --filter "name=$COMPOSE_PROJECT_NAME" | wc -l)"
say "all is well"
