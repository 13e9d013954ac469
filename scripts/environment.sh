# Sourced by the other scripts: make .venv once, and put it first on the PATH.
# PYTHON names the interpreter to build it with (default: python3).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() {
  echo "photon: $1" >&2
  exit 2
}

require_python() {
  command -v "$1" >/dev/null 2>&1 || fail "$1 not found; install Python 3.11 or newer, or set PYTHON=/path/to/python"
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$1 is $("$1" -c 'import platform; print("Python", platform.python_version())' 2>/dev/null || echo "no Python"); Photon needs 3.11 or newer (set PYTHON=/path/to/python)"
}

require_disk() { # MEGABYTES
  local free
  free=$(df -Pm . | awk 'NR == 2 {print $4}')
  [ "$free" -ge "$1" ] || fail "only $free MB free on the disk of $root; $1 MB are needed"
}

# The environment is made anew only when what it is made from has changed.
#
#   ensure_environment [dev]      dev: with what tests and checks need
ensure_environment() {
  local wanted extras=${1:-} stamp python=${PYTHON:-python3}
  stamp=.venv/.photon-installed${extras:+-$extras}
  if [ ! -x .venv/bin/python ]; then
    require_python "$python"
    require_disk 5000
    echo "Making the environment in .venv (a few minutes, once) ..."
    "$python" -m venv .venv || fail "$python could not make .venv; on Debian, install python3-venv"
  fi
  require_python .venv/bin/python
  wanted=$(cat pyproject.toml constraints.txt | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  # What has the tools of development has all else, too.
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] && [ "$(cat .venv/.photon-installed-dev 2>/dev/null)" != "$wanted" ]; then
    require_disk 4000
    install_here -c constraints.txt -e ".${extras:+[$extras]}" || fail "the installation failed; the lines above say why"
    echo "$wanted" >"$stamp"
  fi
  require_disk 1000
  export PATH="$root/.venv/bin:$PATH"
  export PHOTON_HOME="${PHOTON_HOME:-$root/.photon}"
}

# With uv, where there is one: it takes a fifth of the time. Where it fails, pip has its turn.
install_here() { # ARGUMENTS OF pip install
  if command -v uv >/dev/null 2>&1; then
    (
      as_pip_is_set && uv pip install --quiet --python .venv/bin/python "$@"
    ) && return
    echo "photon: uv could not install; going on with pip ..." >&2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

# uv does not read pip's settings: where packages come from, and whose certificates count. What is set for uv stays.
as_pip_is_set() {
  local settings
  settings=$(.venv/bin/python -m pip config list 2>/dev/null) || return 0
  setting() { sed -n "s/^.*[.]$1='\(.*\)'\$/\1/p" <<<"$settings" | head -n 1; }
  export UV_FIND_LINKS=${UV_FIND_LINKS:-$(setting find-links)}
  export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$(setting index-url)}
  export UV_INDEX=${UV_INDEX:-$(setting extra-index-url)}
  export SSL_CERT_FILE=${SSL_CERT_FILE:-$(setting cert)}
  # As pip does: the best version of all places.
  export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
  local name
  for name in UV_FIND_LINKS UV_DEFAULT_INDEX UV_INDEX SSL_CERT_FILE; do
    [ -n "${!name}" ] || unset "$name"
  done
}
