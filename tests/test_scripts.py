"""The scripts refuse early, in one line, and reuse what exists."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLD_PYTHON = """#!/bin/sh
case "$*" in
  *sys.exit*) exit 1 ;;
  *) echo "Python 3.9.2" ;;
esac
"""
FULL_DISK = "#!/bin/sh\necho header\necho /dev/disk 1000 990 10 99% /\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the scripts need of a checkout, without an environment."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def call(clone: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(clone / "scripts" / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "federation.sh"])
def test_an_old_python_is_refused_in_one_line(clone: Path, script: str) -> None:
    done = call(clone, script, PYTHON=str(program(clone / "bin" / "python3.9", OLD_PYTHON)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Python 3.9.2; Photon needs 3.11 or newer" in done.stderr
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "federation.sh"])
def test_a_missing_python_and_a_full_disk_are_refused_in_one_line(clone: Path, script: str) -> None:
    done = call(clone, script, PYTHON="python-that-is-not-there")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not found; install Python 3.11" in done.stderr
    program(clone / "bin" / "df", FULL_DISK)
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = call(clone, script, PYTHON=sys.executable, PATH=path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "only 10 MB free" in done.stderr
    assert not (clone / ".venv").exists()


def make_environment(clone: Path) -> None:
    """Put the files there by which the scripts see that the environment is complete."""
    said = 'echo "photon $*"\n'
    program(clone / ".venv" / "bin" / "photon", f"#!/bin/sh\n{said}")
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    program(clone / ".venv" / "bin" / "python", python)
    content = (clone / "pyproject.toml").read_bytes() + (clone / "constraints.txt").read_bytes()
    (clone / ".venv" / ".photon-installed").write_text(hashlib.sha256(content).hexdigest())


def test_a_second_call_resumes_or_shows_what_exists(clone: Path) -> None:
    """With the environment in place, the state of the run folder decides what the script does."""
    make_environment(clone)
    assert call(clone, "quickstart.sh").stdout.strip() == "photon train run_dir=runs/quickstart"
    (clone / "runs" / "quickstart" / "checkpoints" / "round-000001").mkdir(parents=True)
    assert "photon resume runs/quickstart" in call(clone, "quickstart.sh").stdout
    (clone / "runs" / "quickstart" / "summary.json").write_text("{}")
    assert "photon summary runs/quickstart" in call(clone, "quickstart.sh").stdout


PIP_IS_SET = """#!/bin/sh
case "$*" in
  "-m pip config list")
    echo "global.find-links='/wheels'"
    echo ":env:.index-url='https://packages.example/simple'" ;;
  "-m pip install"*) echo "pip $*" ;;
  *) exec PYTHON "$@" ;;
esac
"""
UV = '#!/bin/sh\necho "uv $* from $UV_FIND_LINKS and $UV_DEFAULT_INDEX"\nexit CODE\n'


@pytest.mark.parametrize("works", [True, False])
def test_uv_installs_by_pips_settings_and_pip_where_it_cannot(clone: Path, works: bool) -> None:
    make_environment(clone)
    (clone / ".venv" / ".photon-installed").unlink()
    program(clone / ".venv" / "bin" / "python", PIP_IS_SET.replace("PYTHON", sys.executable))
    program(clone / "bin" / "uv", UV.replace("CODE", "0" if works else "1"))
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = call(clone, "quickstart.sh", PATH=path)
    # What development needs is not installed.
    installs = "pip install --quiet --python .venv/bin/python -c constraints.txt -e ."
    said = [f"uv {installs} from /wheels and https://packages.example/simple"]
    if not works:
        said.append("pip -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .")
        assert done.stderr == "photon: uv could not install; going on with pip ...\n"
    assert done.stdout.splitlines() == [*said, "photon train run_dir=runs/quickstart"]
    assert call(clone, "quickstart.sh", PATH=path).stdout == "photon train run_dir=runs/quickstart\n"


def test_tests_need_more_than_the_quickstart(clone: Path) -> None:
    make_environment(clone)
    program(clone / ".venv" / "bin" / "python", PIP_IS_SET.replace("PYTHON", sys.executable))
    for tool in ("ruff", "mypy", "pytest"):
        program(clone / ".venv" / "bin" / tool, f"#!/bin/sh\necho {tool}\n")
    program(clone / "bin" / "uv", UV.replace("CODE", "0"))
    path = f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}"
    first, second = (call(clone, "test.sh", PATH=path).stdout.splitlines() for _ in range(2))
    assert "-e .[dev]" in first[0]
    assert first[1:] == second == ["ruff", "ruff", "mypy", "pytest"]
    (clone / ".venv" / ".photon-installed").unlink()
    assert call(clone, "quickstart.sh", PATH=path).stdout == "photon train run_dir=runs/quickstart\n"


@pytest.mark.slow
def test_the_federation_of_a_clone_lies_in_the_clone(clone: Path) -> None:
    make_environment(clone)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = call(clone, "federation.sh", "status", PYTHONPATH=path, PHOTON_HOME="")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"photon: {clone / '.photon' / 'federation'}: holds no federation; start one with federation.sh up"
    )
    assert call(clone, "federation.sh", "down", PYTHONPATH=path).stdout == "nothing was running\n"
    assert call(clone, "federation.sh", "sideways", PYTHONPATH=path).returncode == 2
