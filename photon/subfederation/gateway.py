"""The gateway of a sub-federation: a SuperNode of the federation above that drives a SuperLink of its own.

The SuperNodes of that SuperLink are other organisations, which the federation above never sees. Each thing
that is asked of the gateway becomes a run on its SuperLink: submitted, watched and stopped by Flower's own
command. A run goes on when the gateway's process dies, and the same request finds it again::

    STATE_DIR/NAME/running.json      Flower's run, and the assignment that it carries out
    STATE_DIR/NAME/outcome.json      how an assignment ended (written by the run)
"""

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config.explain import explain_validation
from photon.config.reader import read_file
from photon.config.schema import RunConfig
from photon.config.tree import TreeNode, read_tree
from photon.engine.deployment import Connection, deployed_connection
from photon.errors import PhotonError, RunError
from photon.federation.assignment import Assignment, Outcome
from photon.files.atomic import write_text
from photon.link.messages import TrainRequest
from photon.silo.policy import Cost
from photon.silo.site import SiloSite
from photon.state.checkpoint import CheckpointStore
from photon.subfederation.member import Drive, Member
from photon.subfederation.service import FederationNode

RUNNING = "running.json"
#: Seconds between looks for the outcome, and between questions for Flower's status of the run.
LOOK_SECONDS, STATUS_SECONDS = 0.2, 15.0
#: Seconds that a run has to end after it was stopped.
STOP_SECONDS = 60.0


class GatewaySettings(BaseModel):
    """The YAML file of a gateway; further keys are those of a node of the tree without its children."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=False)

    name: str = Field(description="What the federation above calls this one.")
    connection: str | None = Field(
        None, description="Connection of config.toml that leads to the own SuperLink; null: the default one."
    )
    flower_home: Path | None = Field(
        None, description="Folder of that config.toml; null: $FLWR_HOME of the SuperNode."
    )
    silos: int | None = Field(None, ge=1, description="Members to wait for; null: those online.")

    @property
    def node(self) -> TreeNode:
        """What the federation decides for itself."""
        rules = dict(self.model_extra or {})
        # A node without children would be a silo.
        (node,) = read_tree({self.name: {"children": [f"{self.name}.members"], **rules}}).children
        return node.model_copy(update={"children": ()})


def read_gateway(path: Path) -> GatewaySettings:
    """Read a gateway's file.

    Raises
    ------
    PhotonError
        If it cannot be read, or has an unknown key (the nearest valid one is named) or a wrong value.
    """
    try:
        values = read_file(path)
    except PhotonError as error:
        raise PhotonError(f"federation {path}: cannot be read ({error})") from error
    if not isinstance(values, dict) or "children" in values or "data" in values:
        raise PhotonError(
            f"federation {path}: expected name, connection and rules; the members are those of its SuperLink"
        )
    try:
        settings = GatewaySettings.model_validate(values)
        _ = settings.node
    except ValidationError as error:
        problem = explain_validation(error, GatewaySettings.model_fields)
        raise PhotonError(f"federation {path}: {problem}") from error
    except PhotonError as error:
        raise PhotonError(f"federation {path}: {error}") from error
    return settings


def below(settings: GatewaySettings) -> dict[str, Any]:
    """Return the keys of the configuration's ``federation`` for runs on the gateway's SuperLink."""
    return {"engine": "deployment", "tree": None, "silos": settings.silos, "connection": settings.connection}


class GatewayNode(FederationNode):
    """A federation behind a SuperLink of its own.

    Parameters
    ----------
    settings
        The gateway's file.
    site
        Where its things lie.
    config
        The configuration of the federation above, as it is carried out here.
    """

    def __init__(self, settings: GatewaySettings, site: SiloSite, config: RunConfig) -> None:
        super().__init__(settings.name, site, config)
        self._settings = settings
        self.rules = settings.node

    @cached_property
    def member(self) -> Member:
        """The federation at work."""
        carry_out = drive(self._settings)
        return Member(self._settings.node, self.site, self.config, carry_out, below(self._settings))

    @property
    def vocab_size(self) -> int:
        """Tokens that the text below it knows, as its members have told."""
        return self.member.described.vocab_size

    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what a request does with the text below it, which counts as that of one silo.

        The members are other organisations, each with a gate of its own. Here their steps count, and the
        tokens of as many of them as the gateway waits for.
        """
        before = self.config.transition.local_steps if self.config.transition is not None else None
        rounds = self._settings.node.rounds or self.config.federation.inner_rounds
        steps = rounds * max(self.config.local_steps, before or 0)
        windows = steps * self.config.training.batch_size * (self._settings.silos or 1)
        length, spans = self.member.described.sequence_length, self.member.spans
        # Every request counts for as much as the largest.
        start = spans.begins(request) * windows // spans.rounds
        return {self.name: self._cost(request, steps, windows, length, start=start)}


def drive(settings: GatewaySettings) -> Drive:
    """Return what carries out assignments on the gateway's SuperLink."""
    connection = deployed_connection(settings.connection, settings.flower_home)

    def carry_out(config: RunConfig, resume: bool) -> None:
        run_dir = Path(str(config.run_dir))
        assignment = Assignment.read(run_dir)
        key = assignment.key
        run_id = _running(run_dir, key, connection)
        if run_id is None:
            checkpoints = CheckpointStore(run_dir / "checkpoints")
            if _stopped(run_dir, connection):
                # It may have gone on after the request that is now to be followed was prepared.
                checkpoints.discard_after(assignment.begins if assignment.begins else -1)
                resume = bool(checkpoints.rounds())
            (run_dir / Outcome.FILE).unlink(missing_ok=True)
            run_id = connection.submit(config, resume=resume, settings=run_dir / "run-config.toml")
            write_text(run_dir / RUNNING, json.dumps({"run_id": run_id, "assignment": key}), flush=False)
        outcome = _wait(run_dir, key, connection, run_id)
        if outcome.error is not None:
            raise RunError(outcome.error)

    return carry_out


def _running(run_dir: Path, key: str, connection: Connection) -> str | None:
    """Return Flower's run that is at work on an assignment already."""
    running = _noted(run_dir)
    if running is None or running["assignment"] != key or _has_ended(run_dir, running, connection):
        return None
    return running["run_id"]


def _stopped(run_dir: Path, connection: Connection) -> bool:
    """Stop Flower's run that is at work on another assignment; return whether there was one.

    Raises
    ------
    RunError
        If it does not stop.
    """
    running = _noted(run_dir)
    if running is None or _has_ended(run_dir, running, connection):
        return False
    connection.flwr("stop", running["run_id"], connection.name, check=False)
    end = time.monotonic() + STOP_SECONDS
    while not _is_over(connection.status(running["run_id"])):
        if time.monotonic() > end:
            raise RunError(f"run {running['run_id']} of an earlier request does not stop")
        time.sleep(1.0)
    return True


def _noted(run_dir: Path) -> dict[str, str] | None:
    try:
        running = json.loads((run_dir / RUNNING).read_text())
        return {"run_id": str(running["run_id"]), "assignment": str(running["assignment"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _has_ended(run_dir: Path, running: dict[str, str], connection: Connection) -> bool:
    outcome = Outcome.read(run_dir)
    told = outcome is not None and outcome.assignment == running["assignment"]
    return told or _is_over(connection.status(running["run_id"]))


def _wait(run_dir: Path, key: str, connection: Connection, run_id: str) -> Outcome:
    next_question = time.monotonic() + STATUS_SECONDS
    while True:
        outcome = Outcome.read(run_dir)
        if outcome is not None and outcome.assignment == key:
            return outcome
        if time.monotonic() > next_question:
            next_question = time.monotonic() + STATUS_SECONDS
            status = connection.status(run_id)
            if _is_over(status) and Outcome.read(run_dir) is None:
                see = f"flwr log {run_id} {connection.name} --show"
                raise RunError(f"Flower reports {status} for run {run_id}; see `{see}`")
        time.sleep(LOOK_SECONDS)


def _is_over(status: str) -> bool:
    return status.startswith("finished") or status == "unknown"
