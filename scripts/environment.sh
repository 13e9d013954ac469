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
ensure_environment() {
  local wanted stamp=.venv/.photon-installed python=${PYTHON:-python3}
  if [ ! -x .venv/bin/python ]; then
    require_python "$python"
    require_disk 5000
    echo "Making the environment in .venv (a few minutes, once) ..."
    "$python" -m venv .venv || fail "$python could not make .venv; on Debian, install python3-venv"
  fi
  require_python .venv/bin/python
  wanted=$(cat pyproject.toml constraints.txt | .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    require_disk 4000
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' ||
      fail "the installation failed; the lines above say why"
    echo "$wanted" >"$stamp"
  fi
  require_disk 1000
  export PATH="$root/.venv/bin:$PATH"
  export PHOTON_HOME="${PHOTON_HOME:-$root/.photon}"
}
