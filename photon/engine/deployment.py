"""A SuperLink as ``flwr`` reaches it: submit a run, follow it, ask how it ended.

The command line of Flower exits with 0 when a run failed, so its status is asked for.
"""

import itertools
import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import tomli_w

from photon.config.schema import RunConfig
from photon.engine.app_folder import app_folder
from photon.engine.processes import flower_environment
from photon.errors import PhotonError, RunError
from photon.federation.listeners import watching
from photon.telemetry.events import Event, RunFinished, RunInterrupted
from photon.telemetry.log import follow, read_events

#: Seconds between questions for a run's status while its events tell nothing.
STATUS_SECONDS = 60.0
#: Seconds that Flower has to note that a run has ended.
NOTE_SECONDS = 30.0

#: Flower's status of a run that came to its end.
COMPLETED = "finished:completed"


class Connection:
    """A connection of ``$FLWR_HOME/config.toml``.

    Parameters
    ----------
    name
        Its name there.
    environment
        Environment for ``flwr``; ``FLWR_HOME`` in it names the folder.
    """

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._environment = dict(environment)

    def submit(self, config: RunConfig, *, resume: bool, settings: Path, resources: str | None = None) -> str:
        """Start a run and return its id.

        Parameters
        ----------
        config
            The resolved configuration.
        resume
            Go on from the newest checkpoint.
        settings
            File to write what the run is started with.
        resources
            Flower's ``--federation-config``, for a simulation.

        Raises
        ------
        RunError
            If Flower does not take the run.
        """
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(tomli_w.dumps({"config": config.text, "resume": resume}))
        simulation = [] if resources is None else ["--federation-config", resources]
        with app_folder() as app:
            answer = self.flwr(
                *("run", str(app), self.name, "--run-config", str(settings)),
                *(*simulation, "--format", "json"),
            )
        try:
            return str(json.loads(answer)["run-id"])
        except (ValueError, KeyError) as error:
            raise RunError(f"flwr run did not start the run: {answer.strip()[-500:]}") from error

    def status(self, run_id: str) -> str:
        """Return Flower's word for a run, such as ``running`` or ``finished:failed``."""
        answer = self.flwr("list", self.name, "--run-id", run_id, "--format", "json", check=False)
        try:
            return str(json.loads(answer)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            return "unknown"

    def follow(self, config: RunConfig, run_id: str, alive: Callable[[], bool], earlier: int) -> str:
        """Show a run's events until it ends.

        Parameters
        ----------
        config
            The run's configuration; ``run_dir`` is on this machine.
        run_id
            As :meth:`submit` returned it.
        alive
            Whether there is still somebody who could go on with the run.
        earlier
            What :func:`earlier_events` counted before the run was submitted.

        Returns
        -------
        str
            ``COMPLETED``, or why the run did not complete.

        Raises
        ------
        PhotonError
            If that was bad input.
        """
        events = Path(str(config.run_dir)) / "events.jsonl"
        end: list[Event] = []
        next_check = time.monotonic() + STATUS_SECONDS

        def over() -> bool:
            nonlocal next_check
            if end or not alive():
                return True
            if time.monotonic() > next_check:
                next_check = time.monotonic() + STATUS_SECONDS
                return self.status(run_id).startswith("finished")
            return False

        history = read_events(events)[:earlier] if earlier else []
        with watching(config, history) as shown:
            for event in itertools.islice(follow(events, over), earlier, None):
                shown.emit(event)
                if isinstance(event, RunFinished | RunInterrupted):
                    end.append(event)
        if end and isinstance(end[-1], RunInterrupted):
            if end[-1].bad_input:
                raise PhotonError(end[-1].reason)
            return end[-1].reason
        status = self._final_status(run_id)
        if end and not status.startswith("finished"):
            # The run has said itself that it has finished; on a busy machine Flower takes long to note it.
            return COMPLETED
        return status if status == COMPLETED else f"Flower reports {status}"

    def log(self, run_id: str) -> str:
        """Return what the run's ServerApp has written so far."""
        return self.flwr("log", run_id, self.name, "--show", check=False)

    def flwr(self, *arguments: str, check: bool = True) -> str:
        """Run a command of ``flwr`` and return what it writes to standard output.

        Raises
        ------
        RunError
            If it fails and ``check`` is set.
        """
        done = subprocess.run(
            ["flwr", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        if check and done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise RunError(f"flwr {arguments[0]} failed: {said[-500:]}")
        return done.stdout

    def _final_status(self, run_id: str) -> str:
        """Give Flower a moment to note that the ServerApp has returned."""
        end = time.monotonic() + NOTE_SECONDS
        while not (status := self.status(run_id)).startswith("finished") and time.monotonic() < end:
            time.sleep(0.5)
        return status


def deployed_connection(name: str | None, folder: Path | None = None) -> Connection:
    """Return the connection that a deployed run is given to.

    Parameters
    ----------
    name
        Its name in ``config.toml``; None: the default one there.
    folder
        Where that file lies; None: ``$FLWR_HOME``.

    Raises
    ------
    PhotonError
        If it is not there, or is a simulation's.
    """
    home = folder or Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr")
    file = home / "config.toml"
    mend = "see docs/deployment.md for how to make a connection, and set FLWR_HOME to its folder"
    try:
        known = tomllib.loads(file.read_text())["superlink"]
    except FileNotFoundError:
        raise PhotonError(f"federation=deployment: {file} does not exist; {mend}") from None
    except (KeyError, tomllib.TOMLDecodeError):
        raise PhotonError(f"{file}: names no SuperLinks; {mend}") from None
    chosen = name or str(known.get("default"))
    address = str(known.get(chosen, {}).get("address", ""))
    if not address or address.startswith(":"):
        others = [each for each in known if each != "default"]
        raise PhotonError(
            f"federation.connection={chosen}: no SuperLink of that name in {file} "
            f"(there are: {', '.join(others)}); {mend}"
        )
    return Connection(chosen, flower_environment(home))


def earlier_events(run_dir: Path) -> int:
    """Count the events of the attempts before the one that is about to start."""
    events = run_dir / "events.jsonl"
    return len(read_events(events)) if events.exists() else 0
