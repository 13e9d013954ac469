"""Which silos are online, and on which node each of them lives."""

import time
from collections.abc import Callable, Mapping, Sequence

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from photon.config.decided import agreed
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.federation.admission import Admission
from photon.federation.exchange import Failure, exchange, time_to_live
from photon.federation.names import Names
from photon.link.messages import BODY, MAX_MEMBERS, Describe, SiloInfo, pack

#: Seconds a node may take to describe its silos (it imports torch and opens its data).
DESCRIBE_DEADLINE = 120.0


class Roster:
    """The silos of the federation, learnt by asking every node.

    Node ids change from run to run, so cohorts are drawn from silo names. A simulated node hosts all
    silos of the prepared data; the silos are then spread over the nodes.

    Parameters
    ----------
    grid
        Where the nodes are.
    config
        The run's configuration, as nodes get it.
    admission
        Judges what nodes say of their silos.
    names
        Whose name each is; None: all nodes are one's own, and each hosts all silos.
    on_problem
        Called with a line for the user when a node cannot describe itself.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        admission: Admission,
        names: Names | None,
        on_problem: Callable[[str], None],
    ) -> None:
        self._grid = grid
        self._config = config
        self._admission = admission
        self._names = names
        self._on_problem = on_problem
        self._hosts: dict[int, list[SiloInfo]] = {}
        self._places: _Places | None = None
        #: Where one machine simulates all nodes, what one of them says holds for all.
        self._alike = names is None and config.federation.engine == "simulation"
        self._problems: dict[int, str] = {}
        self._keys: dict[int, bytes] = {}
        self._reference: SiloInfo | None = None

    def refresh(self) -> None:
        """Ask nodes that came online since the last call, and forget those that left."""
        for problem in self._ask():
            self._on_problem(problem)

    def _ask(self) -> list[str]:
        """Refresh, and return what went wrong and was not told before."""
        online = set(self._grid.get_node_ids())
        if self._names is not None:
            self._keys = {node.node_id: node.public_key for node in self._grid.get_nodes()}
        if self._alike and online == set(self._hosts):
            return []
        self._places = None
        self._hosts = {node: silos for node, silos in self._hosts.items() if node in online}
        lines: list[str] = []
        for host, hosted in self._hosts.items():
            # Somebody may have been ejected since.
            self._hosts[host], strangers = self._own(host, hosted)
            lines += [f"node {host}: {line}" for line in strangers]
        unknown = sorted(online - set(self._hosts))
        if not unknown:
            return lines
        if self._alike:
            unknown = unknown[:1]
        messages = {
            str(node): Message(
                RecordDict({BODY: pack(Describe(), self._config)}),
                dst_node_id=node,
                message_type="query",
                ttl=2 * DESCRIBE_DEADLINE,
            )
            for node in unknown
        }

        def receive(_: str, reply: Message) -> tuple[list[SiloInfo], list[str]] | Failure:
            return self._admission.described(reply)

        problems: dict[int, str] = {}
        for node, answer in exchange(self._grid, messages, receive, deadline=DESCRIBE_DEADLINE):
            if isinstance(answer, Failure):
                problems[int(node)] = answer.reason
                continue
            silos, turned_away = answer
            silos, strangers = self._own(int(node), silos)
            self._hosts[int(node)], others = self._fitting(silos)
            others += strangers
            lines += [f"node {node}: {line}" for line in turned_away + others]
            if silos == [] and turned_away:
                problems[int(node)] = turned_away[0]
        if self._alike and self._hosts:
            self._hosts = dict.fromkeys(online, next(iter(self._hosts.values())))
        told, self._problems = self._problems, problems
        failed = [
            f"node {node} cannot describe its silos: {reason}"
            for node, reason in problems.items()
            if told.get(node) != reason and node not in self._hosts
        ]
        return failed + lines

    def _own(self, node: int, silos: list[SiloInfo]) -> tuple[list[SiloInfo], list[str]]:
        """Return the silos whose names are a node's own, and why the rest is turned away."""
        if self._names is None:
            return silos, []
        key = self._keys.get(node, b"")
        problems: dict[str, str | None] = {}
        for silo in silos:
            other = next(
                (
                    at
                    for at, hosted in self._hosts.items()
                    if at != node and silo.name in {one.name for one in hosted}
                ),
                None,
            )
            problems[silo.name] = (
                self._names.problem(silo.name, key)
                if other is None
                else f"node {other}, which is online, has that name"
            )
        return _parted(silos, problems)

    def agree_on(self, reference: SiloInfo) -> None:
        """Turn away all silos whose text was not prepared as this one's, now and whenever they join."""
        self._reference = reference
        self._places = None
        if self._alike:
            silos, lines = self._fitting(self.silos())
            self._hosts = dict.fromkeys(self._hosts, silos)
            for line in lines:
                self._on_problem(line)
            return
        for node, silos in list(self._hosts.items()):
            self._hosts[node], lines = self._fitting(silos)
            for line in lines:
                self._on_problem(f"node {node}: {line}")

    def _fitting(self, silos: list[SiloInfo]) -> tuple[list[SiloInfo], list[str]]:
        """Return the silos that go with the others, and why the rest is turned away."""
        if self._reference is None:
            return silos, []
        problems = {silo.name: difference(self._reference, silo) for silo in silos}
        return _parted(silos, problems)

    def wait(self, silos: int | None, seconds: float, *, nodes_may_join: bool) -> None:
        """Wait until ``silos`` silos are online (None: any).

        Raises
        ------
        PhotonError
            If they are not after ``seconds``, or, where no other node can join, as soon as a node has
            failed to describe its silos.
        """
        end = time.monotonic() + seconds
        while True:
            problems = self._ask()
            count = len(self.silos())
            if self._problems and not nodes_may_join and count < (silos or 1):
                raise PhotonError(list(self._problems.values())[-1])
            for problem in problems:
                self._on_problem(problem)
            if count >= (silos or 1):
                return
            if time.monotonic() > end:
                raise PhotonError(
                    f"federation: {count} of {silos or 'at least 1'} silos online after {seconds:g} s; "
                    "start the missing SuperNodes, or lower federation.silos"
                )
            time.sleep(1.0)

    def silos(self) -> list[SiloInfo]:
        """Return the online silos in name order."""
        return list(self._placed.silos.values())

    def is_federation(self, name: str) -> bool:
        """Tell whether an online silo is a federation."""
        silo = self._placed.silos.get(name)
        return silo is not None and silo.federation

    @property
    def _placed(self) -> "_Places":
        if self._places is None:
            self._places = _Places(self._hosts)
        return self._places

    def message(self, content: RecordDict, members: Sequence[str], kind: str, group: str) -> Message:
        """Return a message to the node that hosts all of ``members``.

        Parameters
        ----------
        content
            What it brings.
        kind
            What it asks for: query, train or evaluate.
        group
            Flower's name for the messages of one occasion.

        Raises
        ------
        PhotonError
            If no single node hosts them.
        """
        return Message(
            content,
            dst_node_id=self.node_of(members),
            message_type=kind,
            ttl=time_to_live(self._config.federation.deadline),
            group_id=group,
        )

    def node_of(self, members: Sequence[str]) -> int:
        """Return a node that hosts all of ``members``; silos that share nodes are spread over them.

        Raises
        ------
        PhotonError
            If no single node hosts them.
        """
        nodes, index = self._placed.nodes_of(members)
        if not nodes:
            raise PhotonError(
                f"federation: no node holds the text of {', '.join(members)} together; "
                "pooled training needs simulation or federation=inprocess"
            )
        return nodes[index % len(nodes)]


class _Places:
    """Silos and where they are, in the order of names: asked for every message, made when nodes change.

    Parameters
    ----------
    hosts
        Node to the silos that it hosts.
    """

    def __init__(self, hosts: Mapping[int, Sequence[SiloInfo]]) -> None:
        found = {silo.name: silo for silos in hosts.values() for silo in silos}
        self.silos = {name: found[name] for name in sorted(found)}
        self._index = {name: index for index, name in enumerate(self.silos)}
        #: Nodes that host the same silos are one entry: in a simulation all are.
        self._alike: dict[int, tuple[frozenset[str], list[int]]] = {}
        for node, silos in sorted(hosts.items()):
            if id(silos) not in self._alike:
                self._alike[id(silos)] = frozenset(silo.name for silo in silos), []
            self._alike[id(silos)][1].append(node)
        self._of: dict[str, list[int]] = {}
        for key, (names, _) in self._alike.items():
            for name in names:
                self._of.setdefault(name, []).append(key)

    def nodes_of(self, members: Sequence[str]) -> tuple[list[int], int]:
        """Return the nodes that host all members, in order, and the place of the first member."""
        keys = [key for key in self._of.get(members[0], ()) if self._alike[key][0] >= set(members)]
        nodes = sorted(node for key in keys for node in self._alike[key][1])
        return nodes, self._index.get(members[0], 0)


def _parted(
    silos: Sequence[SiloInfo], problems: Mapping[str, str | None]
) -> tuple[list[SiloInfo], list[str]]:
    """Return the silos without a problem, and why the others are turned away."""
    return (
        [silo for silo in silos if problems[silo.name] is None],
        [f"silo {name} is turned away: {problem}" for name, problem in problems.items() if problem],
    )


def difference(one: SiloInfo, other: SiloInfo) -> str | None:
    """Return in what two silos differ that must be alike, or None."""
    for what in ("tokenizer_sha256", "vocab_size", "sequence_length"):
        if getattr(one, what) != getattr(other, what):
            return (
                f"silos {one.name} and {other.name} differ in {what} ({getattr(one, what)} and "
                f"{getattr(other, what)}); prepare both with the same tokenizer and sequence length"
            )
    return None


def joined(name: str, members: list[SiloInfo], rounds: int = 1) -> SiloInfo:
    """Describe a federation by its members together; ``rounds`` are its own in one of the one above."""
    shared = [silo for silo in members if silo.validation_tokens is not None]
    validation = sum(silo.validation_tokens or 0 for silo in shared)
    unigram = sum((silo.unigram_loss or 0.0) * (silo.validation_tokens or 0) for silo in shared)
    return members[0].model_copy(
        update={
            "name": name,
            "train_tokens": sum(silo.train_tokens for silo in members),
            "validation_tokens": validation if shared else None,
            "unigram_loss": unigram / validation if validation else None,
            "federation": True,
            "leaves": min(MAX_MEMBERS, sum(silo.leaves for silo in members)),
            "pace": min(MAX_MEMBERS, rounds * max(silo.pace for silo in members)),
            "decided": agreed(silo.decided for silo in members),
        }
    )
