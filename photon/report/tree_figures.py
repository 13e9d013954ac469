"""What the events of a federation of federations tell of its tree: edges, own models, attention, routes.

Each federation has its rounds in a run folder of its own; where that is not at hand, as on other machines,
only what the run's own events hold is known.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from photon.config.tree import TreeNode
from photon.telemetry.events import Diagnostics, Evaluated, Event, SiloFinished
from photon.telemetry.log import current_history, read_events

_ROUTE = "routed/"


@dataclass(frozen=True)
class Branch:
    """One node of the tree, and the edge to the one above it.

    Attributes
    ----------
    name, level, is_silo
        The root is at level 0.
    first, last
        Perplexity that its own model gives on its own text, before training and last; the root's is the
        global model's on all text.
    up, down
        Bytes of training on the edge; ``None`` where the events of the node above are not at hand.
    """

    name: str
    level: int
    is_silo: bool
    first: float | None
    last: float | None
    up: int | None
    down: int | None


@dataclass(frozen=True)
class Route:
    """Routed layers of one key block that went one way: in how many rounds, the last one, similarity then."""

    block: str
    origin: str
    child: str
    rounds: int
    last_round: int
    similarity: float


def histories(folder: Path, history: Sequence[Event], root: TreeNode) -> dict[str, Sequence[Event]]:
    """Return the events that stand of the root and of each federation below whose run folder is at hand.

    Raises
    ------
    PhotonError
        A federation's events cannot be read.
    """
    found = {root.name: history}
    for child in root.children:
        below = folder / "silos" / child.name
        if not child.is_silo and (below / "events.jsonl").is_file():
            found |= histories(below, current_history(read_events(below / "events.jsonl")), child)
    return found


def branches(root: TreeNode, events: Mapping[str, Sequence[Event]]) -> list[Branch]:
    """Return the nodes of the tree, parents first."""
    rows: list[Branch] = []
    path: list[str] = []
    for level, node in root.levels():
        path[level:] = [node.name]
        above = events.get(path[level - 1]) if level else None
        edge = [e for e in above or () if isinstance(e, SiloFinished) and e.silo == node.name]
        curve = [value for _, value in perplexities(events[root.name], node.name if level else None)]
        rows.append(
            Branch(
                name=node.name,
                level=level,
                is_silo=node.is_silo,
                first=curve[0] if curve else None,
                last=curve[-1] if curve else None,
                up=None if above is None else sum(event.bytes_up for event in edge),
                down=None if above is None else sum(event.bytes_down for event in edge),
            )
        )
    return rows


def perplexities(history: Sequence[Event], node: str | None) -> list[tuple[int, float]]:
    """Return round and perplexity of a node's own model, or of the global one; a round counts once."""
    found: dict[int, float] = {}
    for event in history:
        if not isinstance(event, Evaluated):
            continue
        if node is None:
            found[event.round] = event.perplexity
        elif node in event.per_node:
            found[event.round] = event.per_node[node]["perplexity"]
    return sorted(found.items())


def attention_to_children(history: Sequence[Event]) -> dict[str, dict[str, float]]:
    """Return the weights of each key block in the last round that has some, by child and for ``self``."""
    for values in _diagnostics_backwards(history):
        weights: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            figure, _, of_what = name.partition("/")
            block, _, who = of_what.rpartition("/")
            if figure == "attention" and block:
                weights.setdefault(block, {})[who] = value
        if weights:
            return weights
    return {}


def attention_to_above(node: TreeNode, history: Sequence[Event], above: Sequence[Event]) -> float | None:
    """Return the weight, averaged over key blocks, that a node last gave to its own key layers.

    A federation tells it among its own events, a silo to the federation above it.
    """
    name = f"attention_self/{node.name}" if node.is_silo else "attention_self/down"
    for values in _diagnostics_backwards(above if node.is_silo else history):
        if name in values:
            return values[name]
    return None


def routes(history: Sequence[Event]) -> list[Route]:
    """Return the ways that routed layers took from a node to its children, the most frequent first."""
    found: dict[str, Route] = {}
    diagnosed = [event for event in history if isinstance(event, Diagnostics)]
    for event in diagnosed:
        for name, value in event.values.items():
            if not name.startswith(_ROUTE):
                continue
            block, _, way = name.removeprefix(_ROUTE).partition("/")
            origin, _, child = way.rpartition(">")
            before = found[name].rounds if name in found else 0
            found[name] = Route(block, origin, child, before + 1, event.round, value)
    return sorted(found.values(), key=lambda route: -route.rounds)


def _diagnostics_backwards(history: Sequence[Event]) -> Iterator[dict[str, float]]:
    for event in reversed(history):
        if isinstance(event, Diagnostics):
            yield {name: value for name, value in event.values.items() if math.isfinite(value)}
