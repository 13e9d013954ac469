"""Real SuperLink, SuperExec and SuperNodes on loopback, started and stopped one by one, by pid.

::

    with Deployment(tmp_path / "fed", data, secure=False) as deployment:   # data: prepared, two silos
        deployment.up()                                # everything, and wait until all nodes are online
        run = deployment.submit(["rounds=2", ...])     # a run; its events, status and folder
        run.wait_for(lambda events: ...)               # until its events say so
        deployment.kill("alpha")                       # kill -9 of a program: superlink, superexec or a silo
        deployment.start("alpha")                      # the same program again, not supervised
        assert run.wait() == "finished:completed"

The programs are those of ``photon.deployment.local``, so what is tested is what ``scripts/federation.sh``
starts. Only the supervisors are left out, unless a test starts a program ``supervised``.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from photon.config.compose import compose
from photon.data.prepared import PreparedData
from photon.data.separate import separate_silo
from photon.deployment.local import SUPEREXEC, SUPERLINK, LocalFederation, Program
from photon.engine.processes import flower_environment, stop_tree
from photon.federation.run import prepare_run
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.log import read_events
from tests.conftest import SMALL_DEPLOYED

PHOTON = str(Path(sys.executable).parent / "photon")
#: Generous: a message costs a new Python process that imports torch, and test machines are busy.
PATIENCE = 900.0


class Deployment:
    """A federation whose programs a test starts, stops, kills and freezes.

    Parameters
    ----------
    folder
        Where everything lies.
    data
        Prepared data; each silo gets a folder with its own part.
    secure
        TLS and node keys, or neither.
    silos
        Which silos there are; None: all of the data's.
    node_config
        What the node configs of the silos with data say beside their folders.
    gateways
        Files of the federations that take part as silos do, by their names.
    """

    def __init__(
        self,
        folder: Path,
        data: Path,
        *,
        secure: bool = True,
        silos: Sequence[str] | None = None,
        node_config: str = "",
        gateways: Mapping[str, Path] | None = None,
    ) -> None:
        source = PreparedData.open(data)
        self.federation = LocalFederation.create(
            folder,
            list(silos or source.silo_names),
            secure=secure,
            gateways=gateways,
            node_config=node_config,
        )
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        #: What SuperNodes connect to; a test may put something in between.
        self.seen_by_silos = self.federation.address
        for silo in set(self.federation.silos) - set(self.federation.gateways):
            separate_silo(source, silo, self.data_folder(silo))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            sys.stderr.write(self.logs())
        for name in reversed(list(self.processes)):
            self.stop(name)

    def data_folder(self, silo: str) -> Path:
        """Return where a silo's prepared data lies."""
        return self.federation.silo_folder(silo) / "data"

    def state_folder(self, silo: str) -> Path:
        """Return where a silo keeps its state between rounds."""
        return self.federation.silo_folder(silo) / "state"

    def program(self, name: str) -> Program:
        """Return a program by its name: ``superlink``, ``superexec`` or a silo's."""
        program = next(program for program in self.federation.programs() if program.name == name)
        if name not in self.federation.silos:
            return program
        command = list(program.command)
        command[command.index("--superlink") + 1] = self.seen_by_silos
        return dataclasses.replace(program, command=tuple(command))

    def up(self, silos: Sequence[str] | None = None) -> None:
        """Start SuperLink and SuperExec, and ``silos`` (None: all), and wait until they are online."""
        chosen = list(silos if silos is not None else self.federation.silos)
        self.start(SUPERLINK)
        self.federation.wait_until_up(self.processes[SUPERLINK])
        self.start(SUPEREXEC)
        for silo in self.federation.silos:
            if self.federation.secure:
                self.federation.register(silo)
        for silo in chosen:
            self.start(silo)
        self.wait_online(len(chosen))

    def start(self, name: str, *, supervised: bool = False) -> None:
        """Start a program, or start it again after it was stopped or killed."""
        before = self.processes.get(name)
        assert before is None or before.poll() is not None, f"{name} is still running"
        self.processes[name] = self.program(name).start(supervised=supervised)

    def stop(self, name: str) -> None:
        """End a program and its children in order (SIGTERM); frozen ones are woken for that."""
        process = self.processes[name]
        self._signal_tree(name, signal.SIGCONT)
        stop_tree(process, at_once=False, patience=10.0)

    def kill(self, name: str) -> None:
        """End a program outright (SIGKILL). Its children notice by themselves that it is gone."""
        process = self.processes[name]
        # A SuperNode runs under what would start it again, and end it in order.
        for one in [process, *self.children(name, "flower-supernode")]:
            one.kill()
        process.wait()

    def freeze(self, name: str) -> None:
        """Halt a program and its children, as a machine that hangs."""
        self._signal_tree(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """Let a frozen program go on."""
        self._signal_tree(name, signal.SIGCONT)

    def is_running(self, name: str) -> bool:
        """Tell whether a program that was started has not ended since."""
        return self.processes[name].poll() is None

    def children(self, name: str, containing: str = "") -> list[psutil.Process]:
        """Return what descends from a program and has ``containing`` in its command line.

        A silo that works on a message has a ``flwr-clientapp``, the SuperExec of a run a ``flwr-serverapp``.
        """
        found = []
        for child in psutil.Process(self.processes[name].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if containing in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def worker(self, silo: str) -> psutil.Process:
        """Return the worker of a silo, which is nobody's child: its log names it."""
        log = (self.state_folder(silo) / "worker.log").read_text()
        return psutil.Process(int(re.findall(r"process (\d+) serves for process", log)[-1]))

    def limit_files(self, silo: str, size: int) -> None:
        """Let no file that a silo's processes write grow beyond ``size`` bytes, as a disk that is full."""
        root = psutil.Process(self.processes[silo].pid)
        for process in [root, *root.children(recursive=True), self.worker(silo)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                _, most = process.rlimit(psutil.RLIMIT_FSIZE)
                process.rlimit(psutil.RLIMIT_FSIZE, (size, most))

    def wait_online(self, nodes: int) -> None:
        """Wait until exactly so many nodes are online."""
        wait_until(lambda: self.federation.nodes_online() == nodes, f"{nodes} nodes online", pause=1.0)

    def submit(
        self, overrides: Sequence[str], *, run_dir: Path | None = None, resume: bool = False
    ) -> "DeployedRun":
        """Start a run of the small model of ``tests.conftest``.

        Parameters
        ----------
        overrides
            Hydra overrides.
        run_dir
            Folder of the run; None: ``run`` in the federation's folder.
        resume
            Go on from the newest checkpoint in ``run_dir``.
        """
        folder = run_dir or self.federation.folder / "run"
        config = prepare_run(compose([*SMALL_DEPLOYED, *overrides, f"run_dir={folder}"]))
        settings = self.federation.folder / "submitted" / f"{time.time_ns()}.toml"
        run_id = self.federation.connection.submit(config, resume=resume, settings=settings)
        return DeployedRun(self, run_id, folder)

    def logs(self, lines: int = 30) -> str:
        """Return the last lines of every program's log."""
        parts = []
        for file in sorted((self.federation.folder / "logs").glob("*.log")):
            tail = file.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"=== {file.name}", *tail]))
        return "\n".join(parts)

    def _signal_tree(self, name: str, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.processes[name].pid)
            for member in [root, *root.children(recursive=True)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)


class DeployedRun:
    """A run under a :class:`Deployment`."""

    def __init__(self, deployment: Deployment, run_id: str, run_dir: Path) -> None:
        self.run_id = run_id
        self.run_dir = run_dir
        self._deployment = deployment

    def events(self) -> list[Event]:
        """Return what the run has told so far."""
        file = self.run_dir / "events.jsonl"
        return read_events(file) if file.exists() else []

    def status(self) -> str:
        """Return Flower's word for the run."""
        return self._deployment.federation.connection.status(self.run_id)

    def log(self) -> str:
        """Return what the run's ServerApp wrote."""
        return self._deployment.federation.connection.log(self.run_id)

    def wait_for(self, happened: Callable[[list[Event]], bool], what: str = "the event") -> None:
        """Wait until the run's events show something; a run that ends before is a failure."""
        next_check = time.monotonic() + 10.0

        def seen() -> bool:
            nonlocal next_check
            if happened(self.events()):
                return True
            if time.monotonic() > next_check:
                next_check = time.monotonic() + 10.0
                ended = self.status().startswith("finished")
                assert not ended or happened(self.events()), f"{what}: the run ended before\n{self.log()}"
            return False

        wait_until(seen, what)

    def _ended_after(self, count: int) -> bool:
        return any(isinstance(event, RunFinished | RunInterrupted) for event in self.events()[count:])

    def resume(self) -> None:
        """Go on with it as its operator would, to the end."""
        resumed = subprocess.run(
            [PHOTON, "resume", str(self.run_dir)],
            env=flower_environment(self._deployment.federation.home),
            capture_output=True,
            text=True,
        )
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr

    def wait(self, patience: float = PATIENCE) -> str:
        """Wait until the run ends and return Flower's status of it."""
        end = time.monotonic() + patience
        # Each question starts a Python process, so events are looked at in between.
        while not (status := self.status()).startswith("finished"):
            assert time.monotonic() < end, f"waited {patience:g} s for the run's end\n{self.log()}"
            count = len(self.events())
            pause = time.monotonic() + 10.0
            while time.monotonic() < pause and not self._ended_after(count):
                time.sleep(0.2)
        return status


def wait_until(
    happened: Callable[[], bool], what: str, patience: float = PATIENCE, *, pause: float = 0.1
) -> None:
    """Wait until something holds; fail with its name when it does not in time."""
    end = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < end, f"waited {patience:g} s for {what}"
        time.sleep(pause)
