"""Run a federation on Flower's simulation engine, through ``flwr run``.

Flower's own local SuperLink stays behind, keeps the environment of whoever started it first, and its
command line exits 0 when a run failed. So a launch starts a SuperLink of its own, with its own home and
port, follows the run's events, asks for the run's real status, and stops everything it started.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from photon.config import RunConfig, photon_home
from photon.errors import RunError
from photon.federation.assemble import app_folder
from photon.federation.run import display
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.log import EventLog, follow, read_events

CONNECTION = "photon"
START_SECONDS = 90.0
STATUS_SECONDS = 60.0


class Simulation:
    """One run under a private SuperLink.

    Parameters
    ----------
    config
        As ``prepare_run`` returned it.
    resume
        Go on from the newest checkpoint.
    """

    def __init__(self, config: RunConfig, *, resume: bool) -> None:
        assert config.run_dir is not None, "prepare_run fills it in"
        self._config = config
        self._resume = resume
        self._run_dir = Path(config.run_dir)
        self._home = self._run_dir / "flower"
        self._port = _free_port()
        self._environment = os.environ | {
            "FLWR_HOME": str(self._home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "PHOTON_HOME": str(photon_home()),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        self._run_id = ""

    def run(self) -> None:
        """Start, follow to the end, and stop everything.

        Raises
        ------
        RunError
            If the run did not complete.
        KeyboardInterrupt
            If the user stopped it; the run can be resumed.
        """
        events = self._run_dir / "events.jsonl"
        with _terminate_as_interrupt(), self._superlink() as superlink:
            self._submit()
            reason = self._follow(events, superlink)
            status = self._status()
            app_log = self._home / "app.log"
            app_log.write_text(self._flwr("log", self._run_id, CONNECTION, "--show", check=False))
        if reason is not None or status != "finished:completed":
            raise RunError(f"{reason or f'Flower reports {status}'}; see {app_log} and {self._log}")

    @property
    def _log(self) -> Path:
        return self._home / "superlink.log"

    @contextmanager
    def _superlink(self) -> Iterator[subprocess.Popen[bytes]]:
        self._home.mkdir(parents=True, exist_ok=True)
        connection = {"address": f"127.0.0.1:{self._port}", "insecure": True}
        settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self._home / "config.toml").write_text(tomli_w.dumps(settings))
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [
                    *_dying_with_us(),
                    *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
                    *("--host", "127.0.0.1", "--port", str(self._port)),
                ],
                env=self._environment,
                cwd=self._run_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C reaches the launcher alone, which then stops the rest in order.
                start_new_session=True,
            )
        at_once = True
        try:
            self._wait_until_healthy(process)
            yield process
            at_once = False
        finally:
            _stop_tree(process, at_once=at_once)

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RunError(f"flower-superlink exited with {process.returncode}; see {self._log}")
            with contextlib.suppress(urllib.error.URLError, OSError):
                opener.open(f"http://127.0.0.1:{self._port}/health", timeout=1).close()
                return
            time.sleep(0.2)
        raise RunError(f"flower-superlink did not answer within {START_SECONDS:g} s; see {self._log}")

    def _submit(self) -> None:
        federation = self._config.federation
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings = self._home / "run-config.toml"
        settings.write_text(tomli_w.dumps({"config": self._config.text, "resume": self._resume}))
        resources = (
            f"num-supernodes={federation.clients_in_parallel} "
            f"client-resources-num-cpus={max(1, cores // federation.clients_in_parallel)} "
            f"client-resources-num-gpus={federation.gpus_per_client} init-args-num-cpus={cores}"
        )
        answer = self._flwr(
            *("run", str(app_folder()), CONNECTION, "--run-config", str(settings)),
            *("--federation-config", resources, "--format", "json"),
        )
        try:
            self._run_id = str(json.loads(answer)["run-id"])
        except (ValueError, KeyError) as error:
            raise RunError(f"flwr run did not start the run: {answer.strip()[-500:]}") from error

    def _follow(self, events: Path, superlink: subprocess.Popen[bytes]) -> str | None:
        """Show events until the run ends; return why it was interrupted, if it was."""
        end: list[Event] = []
        next_check = time.monotonic() + STATUS_SECONDS

        def over() -> bool:
            nonlocal next_check
            if end or superlink.poll() is not None:
                return True
            if time.monotonic() > next_check:
                next_check = time.monotonic() + STATUS_SECONDS
                return self._status().startswith("finished")
            return False

        history = read_events(events) if events.exists() else []
        with display(self._config, live=True, history=history) as show:
            # The file's earlier events belong to the attempts before this one.
            for event in itertools.islice(follow(events, over), len(history), None):
                show(event)
                if isinstance(event, RunFinished | RunInterrupted):
                    end.append(event)
        if end and isinstance(end[-1], RunInterrupted):
            return end[-1].reason
        self._wait_for_status()
        return None

    def _wait_for_status(self) -> None:
        """Give Flower a moment to note that the ServerApp has returned."""
        end = time.monotonic() + 30
        while time.monotonic() < end and not self._status().startswith("finished"):
            time.sleep(0.5)

    def _status(self) -> str:
        answer = self._flwr("list", CONNECTION, "--run-id", self._run_id, "--format", "json", check=False)
        try:
            return str(json.loads(answer)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            return "unknown"

    def _flwr(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["flwr", *arguments],
            env=self._environment,
            cwd=self._run_dir,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise RunError(f"flwr {arguments[0]} failed: {said[-500:]}; see {self._log}")
        return done.stdout


def note_interruption(run_dir: Path, reason: str) -> None:
    """Append the end that a stopped ServerApp could not write itself."""
    path = run_dir / "events.jsonl"
    if not path.exists() or isinstance(read_events(path)[-1], RunInterrupted):
        return
    last_round = max(CheckpointStore(run_dir / "checkpoints").rounds(), default=0)
    with EventLog(path) as log:
        log(RunInterrupted(round=last_round, reason=reason))


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that both leave nothing behind."""

    def interrupt(_: int, __: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dying_with_us() -> list[str]:
    """Have the kernel end a command with the launcher, even when that is killed outright (Linux)."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def _stop_tree(process: subprocess.Popen[bytes], *, at_once: bool, patience: float = 5.0) -> None:
    """Stop a process and everything that descends from it.

    The root is asked first, so that it can end its children in order; ``at_once`` asks all of them, for a
    run that is to stop where it is. Whoever does not listen is killed.
    """
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    alive = family
    for asked in [family] if at_once else [[root], family]:
        for member in asked:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=patience)
        if not alive:
            break
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
