"""Run a federation on Flower's simulation engine, through ``flwr run``.

Flower's own local SuperLink stays behind and keeps the environment of whoever started it first. So a launch
starts a SuperLink of its own, with its own home and port, follows the run's events, asks for the run's real
status, and stops everything it started.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w
from rich.console import Console

from photon import code
from photon.config.folders import photon_home
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.engine.deployment import COMPLETED, Connection, earlier_events
from photon.engine.guardian import AT_ONCE, IN_ORDER
from photon.engine.processes import dying_with_us, flower_environment, free_port, wait_until_healthy
from photon.errors import RunError
from photon.files.processes import usable_cores

CONNECTION = "photon"
#: Nodes of a simulation, where not more silos train at a time. Flower's engine hands each node one message
#: every tenth of a second, and looks at every message for every node.
NODES = 16
#: What Ray logs when its processes were not up after thirty seconds, which nothing can set.
RAY_WAS_LATE = "The current node timed out during startup"
#: How often a run is given to Flower before that ends it.
STARTS = 3


class Simulation:
    """One run under a private SuperLink.

    Parameters
    ----------
    config
        As ``prepare_run`` returned it.
    resume
        Go on from the newest checkpoint.
    lock
        Descriptor of the run's lock, which is held until the last process has ended; None: it has none.
    """

    def __init__(self, config: RunConfig, *, resume: bool, lock: int | None = None) -> None:
        assert config.run_dir is not None, "prepare_run fills it in"
        self._lock = () if lock is None else (lock,)
        self._config = config
        self._resume = resume
        self._run_dir = Path(config.run_dir)
        self._home = self._run_dir / "flower"
        self._address = f"127.0.0.1:{free_port()}"
        self._environment = flower_environment(self._home) | {
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PHOTON_HOME": str(photon_home()),
        }
        self.connection = Connection(CONNECTION, self._environment)

    def run(self) -> None:
        """Start, follow to the end, and stop everything.

        Raises
        ------
        RunError
            If the run did not complete.
        KeyboardInterrupt
            If the user stopped it; the run can be resumed.
        """
        app_log = self._home / "app.log"
        say = Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print
        with self.superlink() as superlink:
            earlier = earlier_events(self._run_dir)
            for start in range(1, STARTS + 1):
                run_id = self.connection.submit(
                    self._config,
                    resume=self._resume,
                    settings=self._home / "run-config.toml",
                    resources=self._resources(),
                )
                end = self.connection.follow(self._config, run_id, lambda: superlink.poll() is None, earlier)
                logged = self.connection.log(run_id)
                app_log.write_text(logged)
                # One that has told of an event has begun, and is to be resumed instead.
                late = end != COMPLETED and RAY_WAS_LATE in logged
                if not late or earlier_events(self._run_dir) > earlier:
                    break
                end = "Ray did not start within 30 s: other work keeps this machine busy"
                if start < STARTS:
                    say(f"{end}; starting again")
        if end != COMPLETED:
            raise RunError(f"{end}; see {app_log} and {self._log}")

    @contextmanager
    def superlink(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the SuperLink, and stop it and whatever it started at the end.

        Raises
        ------
        RunError
            If it does not come up.
        """
        self._home.mkdir(parents=True, exist_ok=True)
        connection = {"address": self._address, "insecure": True}
        settings = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self._home / "config.toml").write_text(tomli_w.dumps(settings))
        host, _, port = self._address.rpartition(":")
        reader, writer = os.pipe()
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [
                    *code.command("photon.engine.guardian"),
                    *("--owner", str(reader), "--run-dir", str(self._run_dir), *dying_with_us()),
                    *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
                    *("--host", host, "--port", port),
                ],
                env=code.environment(self._environment),
                cwd=self._run_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(reader, *self._lock),
                # Ctrl-C reaches the launcher alone, which then stops the rest in order.
                start_new_session=True,
            )
        os.close(reader)
        how = AT_ONCE
        try:
            wait_until_healthy(process, self._address, self._log)
            yield process
            how = IN_ORDER
        finally:
            with suppress(BrokenPipeError):
                os.write(writer, how)
            process.wait()
            os.close(writer)

    @property
    def _log(self) -> Path:
        return self._home / "superlink.log"

    def _resources(self) -> str:
        federation = self._config.federation
        cores = usable_cores()
        return (
            f"num-supernodes={nodes_of(self._config)} "
            f"client-resources-num-cpus={max(1, cores // federation.silos_in_parallel)} "
            f"client-resources-num-gpus={federation.gpus_per_silo} init-args-num-cpus={cores}"
        )


def nodes_of(config: RunConfig) -> int:
    """Return how many nodes a simulation has: one for each silo, or child of a tree's root, up to `NODES`.

    How many of them work at a time is another matter: ``federation.silos_in_parallel``.
    """
    root = config.federation.root
    if root is not None:
        silos = len(root.children)
    else:
        assert config.data.path is not None, "prepare_run fills it in"
        silos = len(PreparedData.open(Path(config.data.path)).silo_names)
    return max(config.federation.silos_in_parallel, min(NODES, silos))
