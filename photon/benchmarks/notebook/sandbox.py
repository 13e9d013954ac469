"""A process of its own for a notebook's kernel, shut in by Linux namespaces.

Within there is no network, no file but the interpreter's, the system's and the data it was given, all of them
read-only, no other process, and room in memory alone. What the namespaces do not bound, limits do.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

from photon.errors import PhotonError, RunError, printable

#: Folder within where the notebook works.
WORK = "/capsule"
_ENTER = Path(__file__).with_name("enter.py")
#: Folders of the system that programs need; what is a link stays one.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
#: Files of ``/etc`` that libraries ask for; none of them is anybody's secret.
_ETC = ("/etc/ld.so.cache", "/etc/localtime", "/etc/fonts", "/etc/alternatives")
#: Names that the sockets of a kernel end with.
SOCKETS = tuple(f"k-{number}" for number in range(1, 6))


@dataclass(frozen=True)
class Limits:
    """What a kernel may use.

    Attributes
    ----------
    cell_seconds
        Time that a cell may run.
    cpu_seconds
        Processor time of each process.
    memory
        Bytes: addresses of each process, and real memory of all of them together.
    disk
        Bytes of what is written in the work folder; half as much again in ``/tmp``.
    files
        Files and folders that may be made.
    processes
        Processes and threads at one time.
    output
        Bytes that a cell may send; above it the cell is stopped.
    """

    cell_seconds: float = 60.0
    cpu_seconds: int = 600
    memory: int = 4 << 30
    disk: int = 256 << 20
    files: int = 10_000
    processes: int = 64
    output: int = 8 << 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise PhotonError(f"limits: {name}={value}: a kernel needs more than none")


@dataclass(frozen=True)
class Shut:
    """How a kernel is started.

    Attributes
    ----------
    isolate
        Whether namespaces shut it in. Without them only the limits of each process hold.
    python
        The interpreter, of which ``ipykernel`` is a package; default: this one.
    """

    isolate: bool = True
    python: str = field(default_factory=lambda: sys.executable)


class Sandbox:
    """A running process that a kernel is in; `close` ends it and all that it started.

    Parameters
    ----------
    data
        Name in the work folder to the file or folder that is seen there, read-only.
    arguments
        Arguments of the interpreter; ``{sockets}`` in them is the folder for sockets, ``{scratch}`` the one
        for what is temporary.
    files
        Name in the folder for what is temporary to a text that is there from the start.
    start_seconds
        Time until the kernel's sockets must be there.

    Raises
    ------
    RunError
        If the kernel does not start.
    """

    def __init__(
        self,
        data: Mapping[str, Path],
        arguments: Sequence[str],
        limits: Limits,
        how: Shut,
        *,
        files: Mapping[str, str] | None = None,
        start_seconds: float = 60.0,
    ) -> None:
        self._limits, self._how = limits, how
        # Paths of sockets have at most 107 bytes.
        self._base = Path(tempfile.mkdtemp(prefix="photon-kernel-"))
        self.sockets = self._base / "s"
        try:
            self.sockets.mkdir(mode=0o700)
            plan = self._plan(data, arguments, files or {})
            plan["start_seconds"] = start_seconds
            self._start(plan)
        except BaseException:
            self.close()
            raise

    def _start(self, plan: dict[str, Any]) -> None:
        # Isolated and without site: nothing of the user's own Python starts with it, and it is quick.
        command = [sys.executable, "-I", "-S", str(_ENTER), json.dumps(plan)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}, cwd="/"
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline(4096).decode(errors="replace").strip()
        if said != "ready":
            raise RunError(
                f"a kernel could not be started: {printable(said.removeprefix('error ')) or 'it ended'}"
            )

    def _plan(
        self, data: Mapping[str, Path], arguments: Sequence[str], files: Mapping[str, str]
    ) -> dict[str, Any]:
        limits, isolate = self._limits, self._how.isolate
        work = WORK if isolate else str(self._base / "work")
        scratch = "/tmp" if isolate else str(self._base / "tmp")
        bounds = {
            "RLIMIT_AS": limits.memory,
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_FSIZE": limits.disk,
            "RLIMIT_NOFILE": 1024,
            "RLIMIT_CORE": 0,
        }
        plan: dict[str, Any] = {
            "isolate": isolate,
            "as_root": _may_be_root(),
            "base": str(self._base),
            "work": work,
            "log": f"{scratch}/.start.log",
            "sockets": str(self.sockets),
            "socket_names": SOCKETS,
            "argv": [
                self._how.python,
                *(
                    text.replace("{sockets}", str(self.sockets)).replace("{scratch}", scratch)
                    for text in arguments
                ),
            ],
            "texts": {
                f"{scratch}/{name}": text.replace("{sockets}", str(self.sockets))
                for name, text in files.items()
            },
            "env": _environment(scratch),
            "limits": bounds,
        }
        if isolate:
            if plan["as_root"]:
                os.chmod(self._base, 0o711)
                os.chown(self.sockets, 65534, 65534)
            # Processes are counted for each user: without a namespace that would be the user's own, too.
            bounds["RLIMIT_NPROC"] = limits.processes
            root = self._base / "root"
            root.mkdir()
            plan |= self._layout(data) | {"root": str(root), "files": limits.files}
            plan["texts"] |= _identity()
        else:
            for folder in (work, scratch):
                Path(folder).mkdir()
            for name, path in data.items():
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, Path(work, name))
        return plan

    def _layout(self, data: Mapping[str, Path]) -> dict[str, Any]:
        """Return what is where within."""
        limits = self._limits
        links = {name: os.readlink(name) for name in _SYSTEM if os.path.islink(name)}
        folders = [*(name for name in _SYSTEM if name not in links), *_ETC, *_interpreter(self._how.python)]
        return {
            "tmpfs": {
                WORK: limits.disk,
                "/tmp": limits.disk // 2,
                "/dev/shm": min(limits.disk // 2, 64 << 20),
            },
            "links": links,
            "read_only": {
                **{name: name for name in _outermost(folders)},
                **{f"{WORK}/{name}": str(path.resolve()) for name, path in data.items()},
            },
        }

    def overuse(self) -> str | None:
        """Return what all processes together use too much of, or None."""
        memory = count = 0
        try:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                try:
                    memory += process.memory_info().rss
                    count += 1
                except psutil.NoSuchProcess:
                    continue
        except psutil.NoSuchProcess:
            return None
        if memory > self._limits.memory:
            return f"its processes used more than {self._limits.memory >> 20} MiB of memory together"
        if count > self._limits.processes:
            return f"it had more than {self._limits.processes} processes"
        return None

    @property
    def running(self) -> bool:
        """Whether the kernel is there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the kernel and all that it started, and remove what it wrote."""
        process = getattr(self, "_process", None)
        if process is not None:
            # The launcher ends what is within when nobody holds its standard input any more.
            for pipe in (process.stdin, process.stdout):
                pipe.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._base, ignore_errors=True)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_sandbox(how: Shut) -> None:
    """Try whether kernels can be shut in on this machine.

    Raises
    ------
    PhotonError
        If they cannot; the message says why, and what would do without.
    """
    if not how.isolate:
        return
    try:
        # Something that makes the files a kernel would, and stays.
        code = (
            "import sys, time, pathlib; "
            "[pathlib.Path(sys.argv[1], name).touch() for name in sys.argv[2:]]; time.sleep(60)"
        )
        with Sandbox({}, ["-I", "-c", code, "{sockets}", *SOCKETS], Limits(), how):
            return
    except (RunError, OSError) as error:
        raise PhotonError(
            f"kernels cannot be shut in on this machine: {printable(error)}. Allow user namespaces "
            "(docs/bixbench.md), or run them unprotected with --no-sandbox where every answer is trusted"
        ) from None


def _identity() -> dict[str, str]:
    """Return the files by which a process within has a name."""
    own = 65534 if _may_be_root() else os.geteuid()
    return {
        "/etc/passwd": f"sandbox:x:{own}:{own}::/tmp:/bin/sh\n",
        "/etc/group": f"sandbox:x:{own}:\n",
        "/etc/hosts": "127.0.0.1 localhost sandbox\n",
    }


def _may_be_root() -> bool:
    """Return whether this process is root with its rights, which root of a container may not have."""
    told = dict(
        line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    rights = int(told["CapEff"], 16)
    # CAP_CHOWN, CAP_SETGID, CAP_SETUID and CAP_SYS_ADMIN.
    return os.geteuid() == 0 and all(rights >> right & 1 for right in (0, 6, 7, 21))


@lru_cache
def _interpreter(python: str) -> tuple[str, ...]:
    """Return the folders that an interpreter and its packages lie in.

    Packages only: a checkout on the path may hold what a notebook must not see, answers for instance.
    """
    code = (
        "import json, os, sys; real = os.path.dirname(os.path.realpath(sys.executable)); "
        "print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix, real, *sys.path]))"
    )
    try:
        told = subprocess.run(
            [python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True, env={}
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PhotonError(f"{printable(python)}: no Python that runs ({type(error).__name__})") from None
    prefix, base, exec_prefix, real, *path = json.loads(told.stdout)
    packages = [part for part in path if Path(part).name in ("site-packages", "dist-packages")]
    return tuple(
        part for part in (prefix, base, exec_prefix, real, *packages) if os.path.isdir(part) and part != "/"
    )


def _outermost(folders: Sequence[str]) -> list[str]:
    """Return the existing ones of ``folders`` that lie in no other one."""
    found: list[str] = []
    for folder in sorted({os.path.normpath(one) for one in folders if os.path.exists(one)}):
        if not any(folder.startswith(f"{above}/") for above in found):
            found.append(folder)
    return found


def _environment(scratch: str) -> dict[str, str]:
    """Return the variables of a kernel: none of those of whoever started it, keys among them."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "IPYTHONDIR": f"{scratch}/.ipython",
        "MPLCONFIGDIR": f"{scratch}/.matplotlib",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONDONTWRITEBYTECODE": "1",
        **dict.fromkeys(threads, "1"),
    }
