"""What code in a notebook may try: each attempt succeeds outside the sandbox first, and fails within."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from photon.benchmarks.notebook.kernel import Kernel
from photon.benchmarks.notebook.sandbox import (
    SOCKETS,
    WORK,
    Limits,
    Sandbox,
    Shut,
    _environment,
    _interpreter,
    check_sandbox,
)
from photon.errors import PhotonError, RunError

pytest.importorskip("ipykernel")

LIMITS = Limits(cell_seconds=30, memory=2 << 30, disk=8 << 20, files=500, processes=40)
SECRET = "the key of somebody's account"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with data, and beside it what is nobody's business."""
    above = tmp_path_factory.mktemp("home")
    (above / "secret.txt").write_text(SECRET)
    (above / "work").mkdir()
    (above / "work" / "data.csv").write_text("x\n1\n")
    return above / "work"


Attempt = Callable[[str], Any]


@pytest.fixture(scope="module")
def outside(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """Run code as a program, in a copy of the work folder; return what it prints as JSON."""
    copy = tmp_path_factory.mktemp("outside") / "work"
    shutil.copytree(work, copy)
    shutil.copy(work.parent / "secret.txt", copy.parent)

    def run(code: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-I", "-c", code],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PHOTON_TEST_KEY": SECRET},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def inside(shut: Shut, work: Path) -> Iterator[Attempt]:
    """Run code as a cell."""
    with (
        pytest.MonkeyPatch.context() as patch,
        Kernel({"data.csv": work / "data.csv"}, LIMITS, shut) as kernel,
    ):
        patch.setenv("PHOTON_TEST_KEY", SECRET)

        def run(code: str) -> Any:
            ran = kernel.run(code)
            assert ran.error is None, ran.error
            assert ran.stopped is None, ran.stopped
            return json.loads("".join(output["text"] for output in ran.outputs))

        yield run


def tried(code: str) -> str:
    """Return code that prints what an expression gives, or the name of what it raises."""
    return f"""
import json, os, socket, subprocess
def attempt():
{chr(10).join("    " + line for line in code.strip().splitlines())}
try:
    result = attempt()
except Exception as error:
    result = type(error).__name__
print(json.dumps(result))
"""


def test_the_network_is_not_reached(outside: Attempt, inside: Attempt) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = tried(f"""
connection = socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=5)
return "reached"
""")
        assert outside(code) == "reached"
        assert inside(code) in ("OSError", "ConnectionRefusedError")
    code = tried("return sorted(name for _, name in socket.if_nameindex())")
    assert len(outside(code)) >= 1
    assert inside(code) == ["lo"]
    # Sockets of the machine that have a name of their own are in its network, too.
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"photon-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.listen()
        code = tried(f'socket.socket(socket.AF_UNIX).connect("\\0{name}"); return "reached"')
        assert outside(code) == "reached"
        assert inside(code) == "ConnectionRefusedError"


def test_folders_above_are_not_seen(outside: Attempt, inside: Attempt, work: Path) -> None:
    by_parent = tried('return open("../secret.txt").read()')
    by_path = tried(f"return open({str(work.parent / 'secret.txt')!r}).read()")
    by_link = tried(f'os.symlink({str(work.parent)!r}, "up"); return open("up/secret.txt").read()')
    for code in (by_parent, by_path, by_link):
        assert outside(code) == SECRET
        assert inside(code) == "FileNotFoundError"
    home = tried("return os.path.exists('/etc/shadow')")
    assert outside(home) is True
    assert inside(home) is False
    # Nor is this checkout, where answers might lie.
    here = tried(f"return os.path.exists({str(Path(__file__).parent)!r})")
    assert outside(here) is True
    assert inside(here) is False


def test_processes_of_others_are_not_seen(outside: Attempt, inside: Attempt) -> None:
    mine = os.getpid()
    seen = tried(f'return {mine} in [int(name) for name in os.listdir("/proc") if name.isdecimal()]')
    signalled = tried(f"os.kill({mine}, 0); return 'signalled'")
    environment = tried(f'return b"PATH=" in open("/proc/{mine}/environ", "rb").read()')
    root = tried(f'return len(os.listdir("/proc/{mine}/root")) > 0')
    for code, result in ((seen, True), (signalled, "signalled"), (environment, True), (root, True)):
        assert outside(code) == result
    assert inside(seen) is False
    assert inside(signalled) == "ProcessLookupError"
    assert inside(environment) == "FileNotFoundError"
    assert inside(root) == "FileNotFoundError"
    # What started the kernel is there, and no way out: neither its files nor its variables can be looked at.
    above = tried('return open("/proc/1/environ", "rb").read().decode() + str(os.listdir("/proc/1/root"))')
    assert inside(above) == "PermissionError"
    assert inside(tried("os.kill(1, 9); return 'sent'")) in ("sent", "PermissionError")
    assert inside(tried("return 1 + 1")) == 2


def test_keys_are_not_in_the_environment(outside: Attempt, inside: Attempt) -> None:
    code = tried('return os.environ.get("PHOTON_TEST_KEY")')
    assert outside(code) == SECRET
    assert inside(code) is None
    # Nor those of the launcher, which is above it.
    assert SECRET not in str(inside(tried("return dict(os.environ)")))


def test_a_fork_bomb_ends_at_the_limit(outside: Attempt, inside: Attempt) -> None:
    code = tried("""
import signal, time
made = []
try:
    for _ in range(50):
        made.append(subprocess.Popen(["/bin/sleep", "30"]))
except OSError:
    pass
for one in made:
    one.kill()
    one.wait()
return len(made)
""")
    assert outside(code) == 50
    assert inside(code) < LIMITS.processes
    assert inside(tried("return 1 + 1")) == 2


def test_data_is_read_only(outside: Attempt, inside: Attempt, work: Path) -> None:
    write = tried('open("data.csv", "w").write("x"); return "written"')
    remove = tried('os.remove("data.csv"); return "removed"')
    assert (outside(write), outside(remove)) == ("written", "removed")
    assert inside(write) in ("OSError", "PermissionError")
    assert inside(remove) in ("OSError", "PermissionError")
    assert inside(tried('return open("data.csv").read()')) == "x\n1\n"
    assert (work / "data.csv").read_text() == "x\n1\n"
    for place in ("/usr", "/etc", os.path.dirname(os.__file__), "/", os.path.dirname(WORK)):
        assert inside(tried(f'open({place!r} + "/photon-test", "w"); return "written"')) in (
            "OSError",
            "PermissionError",
        )


def test_no_rights_are_to_be_had(inside: Attempt) -> None:
    rights = tried('return [l.split()[1] for l in open("/proc/self/status") if l.startswith("Cap")]')
    assert set(inside(rights)) == {"0" * 16}
    assert inside(tried("return os.getuid()")) != 0
    namespaces = tried("""
import ctypes
return [ctypes.CDLL(None).unshare(flag) for flag in (0x10000000, 0x00020000, 0x20000000)]
""")
    assert inside(namespaces) == [-1, -1, -1]
    remount = tried(f"""
import ctypes
return ctypes.CDLL(None).mount(None, b"{WORK}/data.csv", None, 32 | 4096, None)
""")
    assert inside(remount) == -1


def test_sockets_cannot_be_changed(inside: Attempt) -> None:
    """A link in the place of a socket would lead whoever talks to the kernel elsewhere."""
    code = tried("""
folder = json.load(open(os.environ["TMPDIR"] + "/.kernel.json"))["ip"].rpartition("/")[0]
os.remove(folder + "/k-1")
return "removed"
""")
    assert inside(code) in ("OSError", "PermissionError")


def test_the_disk_is_not_filled(outside: Attempt, inside: Attempt) -> None:
    code = tried("""
written = 0
try:
    for number in range(3):
        with open(f"large-{number}", "wb") as file:
            for _ in range(6):
                written += file.write(bytes(1 << 20))
                file.flush()
except OSError:
    pass
for number in range(3):
    if os.path.exists(f"large-{number}"):
        os.remove(f"large-{number}")
return written >> 20
""")
    assert outside(code) == 18
    assert inside(code) <= 8
    many = tried("""
made = 0
try:
    for number in range(1000):
        open(f"small-{number}", "w").close()
        made += 1
except OSError:
    pass
for number in range(made):
    os.remove(f"small-{number}")
return made
""")
    assert outside(many) == 1000
    assert inside(many) < LIMITS.files


# --- the sandbox itself ---------------------------------------------------------------------------------


def stand_in(sockets: str) -> list[str]:
    """Return arguments of something that makes the files a kernel would, and stays."""
    code = (
        "import pathlib, sys, time; "
        "[pathlib.Path(sys.argv[1], name).touch() for name in sys.argv[2:]]; time.sleep(60)"
    )
    return ["-I", "-c", code, sockets, *SOCKETS]


def test_all_that_it_started_ends_with_it(shut: Shut) -> None:
    box = Sandbox({}, stand_in("{sockets}"), LIMITS, shut)
    base = box.sockets.parent
    assert base.exists()
    assert box.running
    box.close()
    assert not box.running
    assert not base.exists()


def test_it_ends_with_whoever_started_it(shut: Shut) -> None:
    code = """
import os, sys
from photon.benchmarks.notebook.sandbox import Limits, Sandbox, Shut
from tests.benchmarks.notebook.test_sandbox import stand_in
box = Sandbox({}, stand_in("{sockets}"), Limits(), Shut())
print(box._process.pid, box.sockets, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    launcher, sockets = done.stdout.split()
    gone = threading.Event()
    for _ in range(100):
        if not Path(f"/proc/{launcher}").exists():
            gone.set()
            break
        gone.wait(0.05)
    assert gone.is_set()
    assert not Path(sockets).parent.exists()


def test_what_cannot_start_says_why(shut: Shut) -> None:
    with pytest.raises(RunError, match="no_such_module_at_all"):
        Sandbox({}, ["-m", "no_such_module_at_all"], LIMITS, shut)
    with pytest.raises(RunError, match=r"did not begin within 0\.5 s"):
        Sandbox({}, ["-c", "import time; time.sleep(60)"], LIMITS, shut, start_seconds=0.5)
    with pytest.raises(PhotonError, match="no Python that runs"):
        Sandbox({}, [], LIMITS, replace(shut, python="/nonexistent/python"))


def test_it_is_refused_where_nothing_can_be_shut_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunError("namespaces: Operation not permitted")

    monkeypatch.setattr(Sandbox, "__init__", refuse)
    with pytest.raises(PhotonError, match="--no-sandbox"):
        check_sandbox(Shut())
    check_sandbox(Shut(isolate=False))


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root that gives up rights"
)
def test_it_needs_no_rights(shut: Shut) -> None:
    """Without the rights of root, a user namespace stands in for them."""
    code = "from photon.benchmarks.notebook.sandbox import *; check_sandbox(Shut()); print('shut in')"
    # To map root itself is a right of its own; who is not root needs none.
    drop = ["setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all"]
    done = subprocess.run([*drop, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "shut in\n", done.stderr


def test_without_a_sandbox_data_is_a_copy(work: Path) -> None:
    how = Shut(isolate=False)
    with Kernel({"data.csv": work / "data.csv"}, replace(LIMITS, memory=4 << 30), how) as kernel:
        ran = kernel.run("import os; os.remove('data.csv'); os.listdir('.')")
        assert ran.outputs[0]["data"]["text/plain"] == "[]"
    assert (work / "data.csv").read_text() == "x\n1\n"


def test_limits_are_more_than_none() -> None:
    with pytest.raises(PhotonError, match="processes=0"):
        Limits(processes=0)


def test_only_packages_of_the_interpreter_are_seen() -> None:
    checkout = str(Path(__file__).parents[3])
    assert checkout not in _interpreter(sys.executable)
    assert not any(checkout == str(Path(part)) for part in _interpreter(sys.executable))
    assert "PYTHONPATH" not in _environment("/tmp")
