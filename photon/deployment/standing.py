"""How an aggregator stands: ``photon aggregator status``."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from photon.deployment.aggregator import AggregatorPlace
from photon.deployment.place import running
from photon.deployment.superlink import nodes_of, runs_of
from photon.federation.names import ADMITTED, Admitted

#: Why a silo has no node: the aggregator does not run, or registered none.
WAITING = "registered when the aggregator comes up"
UNKNOWN = "no node that `photon aggregator admit` has registered"


class StandingSilo(BaseModel):
    """A silo that was admitted.

    Attributes
    ----------
    name, fingerprint
        Its name, and the fingerprint of the node key that the name belongs to.
    standing
        Flower's word for its node (``registered``: it has never connected; ``online``, ``offline``,
        ``unregistered``), or why there is none.
    since
        When that began, in Flower's words; empty where nobody knows.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    fingerprint: str
    standing: str
    since: str


class StandingRun(BaseModel):
    """A run that the SuperLink has, with Flower's number and word for it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    status: str
    seconds: float


class AggregatorStanding(BaseModel):
    """How an aggregator stands.

    Attributes
    ----------
    process
        The process of ``up``; None: not running.
    answers
        Whether the SuperLink answers.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    address: str
    authority: str
    process: int | None
    answers: bool
    silos: list[StandingSilo]
    ejected: list[str]
    runs: list[StandingRun]

    @property
    def is_well(self) -> bool:
        """Whether it answers and every silo that was admitted is online."""
        return self.answers and all(silo.standing == "online" for silo in self.silos)


def standing_of(place: AggregatorPlace) -> AggregatorStanding:
    """Return how an aggregator stands, without a change to anything.

    Raises
    ------
    PhotonError
        If what the operator has decided cannot be read.
    """
    decided = Admitted.read(place.photon_home / ADMITTED)
    process, answers = running(place.folder), place.is_up()
    line = place.line()
    nodes = {str(node["node-id"]): node for node in nodes_of(place.connection)} if answers else {}
    return AggregatorStanding(
        folder=str(place.folder),
        address=line.address,
        authority=line.fingerprint,
        process=None if process is None else process.pid,
        answers=answers,
        silos=[
            _silo(place, name, fingerprint, nodes, answers)
            for name, fingerprint in sorted(decided.names.items())
        ],
        ejected=decided.ejected,
        runs=[
            StandingRun(run_id=run["run-id"], status=run["status"], seconds=run["elapsed"])
            for run in (runs_of(place.connection) if answers else [])
        ],
    )


#: Flower's word for a node to the field that says since when.
_SINCE = {
    "online": "online-at",
    "offline": "offline-at",
    "registered": "created-at",
    "unregistered": "deleted-at",
}


def _silo(
    place: AggregatorPlace, name: str, fingerprint: str, nodes: dict[str, dict[str, Any]], answers: bool
) -> StandingSilo:
    noted = place.node_file(name)
    try:
        number = noted.read_text().strip()
    except FileNotFoundError:
        standing = WAITING if place.public_key(name).exists() else UNKNOWN
        return StandingSilo(name=name, fingerprint=fingerprint, standing=standing, since="")
    node = nodes.get(number, {})
    standing = str(node.get("status", UNKNOWN if answers else "the SuperLink does not answer"))
    since = str(node.get(_SINCE.get(standing, ""), "")).removesuffix("Z")
    return StandingSilo(name=name, fingerprint=fingerprint, standing=standing, since=since)
