"""The tree of a federation of federations: who belongs to whom, and what each node decides for itself.

Short form, nested to any depth, and long form, which may be mixed::

    {north: [silo_a, silo_b], south: [silo_c, silo_d]}

    north:
      children: [silo_a, {silo_b: {privacy: {clip_norm: 1.0, noise_multiplier: 0.5}}}]
      rounds: 2
      outer: diloco
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.components import nearest
from photon.config.renamed import check_names
from photon.errors import PhotonError

#: What silos and federations may be called; it becomes the name of a folder.
SILO_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
#: What a file of ``conf/`` may be called that a node names: no path, and nothing that Hydra resolves.
OPTION_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"
#: Routed layers that a message may bring.
MAX_ROUTED = 1000
#: The node that the run itself is.
ROOT = "root"
_WHERE = "federation.tree"


class TreeNode(BaseModel):
    """A node of the tree: a silo, or a federation of its children.

    What a federation does not set it takes from the node above it. ``rounds`` and what crosses its border
    are its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    children: tuple["TreeNode", ...] = ()
    rounds: int | None = Field(None, ge=1, description="Rounds of its own in a round of the node above.")
    cohort: int | None = Field(None, ge=1, description="Children sampled per round; null: all of them.")
    deadline: float | None = Field(None, gt=0, description="Seconds that a round of its own may take.")
    quorum: int | None = Field(None, ge=1, description="Children that must answer for a round to count.")
    outer: dict[str, Any] | str | None = Field(
        None, description="Outer optimizer: the name of a file in conf/outer, or its section."
    )
    link: dict[str, Any] | str | None = Field(
        None, description="Link to its children: the name of a file in conf/link, or its section."
    )
    strategy: dict[str, Any] | None = Field(
        None, description="Arguments of the strategy that differ from those of the run."
    )
    privacy: dict[str, Any] | None = Field(
        None, description="Keys of `privacy` for what the node sends to the one above it."
    )
    data: str | None = Field(None, description="Silo whose text the federation itself trains on.")

    @property
    def is_silo(self) -> bool:
        """Whether it has no children."""
        return not self.children

    def walk(self) -> Iterator["TreeNode"]:
        """Yield the node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    def levels(self, depth: int = 0) -> Iterator[tuple[int, "TreeNode"]]:
        """Yield it and all below it with their levels, parents first: all that take part in rounds.

        A federation's own text is a silo among its children.
        """
        yield depth, self
        for child in self.children:
            yield from child.levels(depth + 1)
        if self.data is not None:
            yield depth + 1, TreeNode(name=self.data)

    def silos(self) -> list[str]:
        """Return the names of all silos with text below it, and its own."""
        below = [node.name for node in self.walk() if node.is_silo]
        return sorted([*below, *(node.data for node in self.walk() if node.data is not None)])

    def child(self, name: str) -> "TreeNode | None":
        """Return the child of that name."""
        return next((child for child in self.children if child.name == name), None)

    @property
    def pace(self) -> int:
        """Most rounds that a silo below takes part in during one round of the node itself."""
        return max(((child.rounds or 1) * child.pace for child in self.children), default=1)


class RoutedTag(BaseModel):
    """What a routed block is that travels across the tree: a key block of another federation.

    Attributes
    ----------
    slot
        Its place in the message: tensors of the state group ``routed block-SLOT``.
    block
        Which key block it is.
    origin
        Whose: names of nodes from the sender's children downwards, with slashes between.
    round
        Round of that federation in which it was trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slot: int = Field(ge=1, le=MAX_ROUTED)
    block: str = Field(max_length=64)
    origin: str = Field(max_length=512)
    round: int = Field(ge=0)


def read_tree(value: Any, inner_rounds: int | None = None) -> TreeNode:
    """Read a tree from its short or long form.

    Parameters
    ----------
    value
        Mapping of the root's children, as YAML gives it.
    inner_rounds
        ``rounds`` of the federations that do not set their own.

    Raises
    ------
    PhotonError
        If a name is malformed or used twice, a federation is empty or contains itself, or a key is unknown
        (the nearest valid one is named).
    """
    root = TreeNode(name=ROOT, children=_children(value, _WHERE, ()))
    if inner_rounds is not None:
        root = root.model_copy(update={"children": _paced(root.children, inner_rounds)})
    seen: set[str] = {ROOT}
    for node in list(root.walk())[1:]:
        for name in (node.name, *([node.data] if node.data is not None else [])):
            if name in seen:
                raise PhotonError(f"{_WHERE}: {name} is named twice; every node has one place in the tree")
            seen.add(name)
    return root


def _paced(nodes: Iterable[TreeNode], rounds: int) -> tuple[TreeNode, ...]:
    return tuple(
        node.model_copy(update={"rounds": node.rounds or rounds, "children": _paced(node.children, rounds)})
        if node.children
        else node
        for node in nodes
    )


def _children(value: Any, where: str, above: tuple[int, ...]) -> tuple[TreeNode, ...]:
    if id(value) in above:
        raise PhotonError(f"{where}: the tree contains itself; give each node one place")
    above = (*above, id(value))
    if isinstance(value, Mapping) and value:
        return tuple(_node(name, inner, where, above) for name, inner in value.items())
    if isinstance(value, list | tuple) and value:
        return tuple(
            child
            for entry in value
            for child in (
                _children(entry, where, above)
                if isinstance(entry, Mapping)
                else (_node(entry, None, where, above),)
            )
        )
    raise PhotonError(f"{where}: expected children, as in {{north: [silo_a, silo_b], south: [silo_c]}}")


def _node(name: Any, value: Any, where: str, above: tuple[int, ...]) -> TreeNode:
    if not isinstance(name, str) or not re.fullmatch(SILO_NAME, name):
        raise PhotonError(f"{where}: {name!r} is not a name; use letters, digits, '-', '_' and '.'")
    where = f"{where}.{name}"
    if value is None:
        return TreeNode(name=name)
    if not isinstance(value, Mapping) or not _is_long(value):
        return TreeNode(name=name, children=_children(value, where, above))
    settings = {key: setting for key, setting in value.items() if key != "children"}
    children = _children(value["children"], where, above) if "children" in value else ()
    known = set(TreeNode.model_fields) - {"name"}
    check_names(settings, f"{where}: ")
    if unknown := [key for key in settings if key not in known]:
        raise PhotonError(f"{where}.{unknown[0]}: unknown key{nearest(str(unknown[0]), known)}")
    try:
        node = TreeNode(name=name, children=children, **settings)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise PhotonError(f"{where}.{key}={problem['input']!r}: {problem['msg']}") from error
    for key in ("outer", "link"):
        option = getattr(node, key)
        if isinstance(option, str) and not re.fullmatch(OPTION_NAME, option):
            raise PhotonError(f"{where}.{key}={option!r}: not the name of a file in conf/{key}")
    if node.is_silo and (extra := [key for key in settings if key != "privacy"]):
        raise PhotonError(f"{where}.{extra[0]}: a silo has no children; give it some, or remove the key")
    return node


def _is_long(value: Mapping[Any, Any]) -> bool:
    """Tell settings of a node from a mapping of its children; a near miss of a setting is an error."""
    known = set(TreeNode.model_fields) - {"name"}
    return "children" in value or (bool(value) and set(value) <= known)


def plain_tree(node: TreeNode) -> dict[str, Any]:
    """Return the children of a node as a mapping that `read_tree` reads."""
    return {child.name: _plain_node(child) for child in node.children}


def _plain_node(node: TreeNode) -> dict[str, Any] | None:
    settings = node.model_dump(exclude={"name", "children"}, exclude_defaults=True)
    if node.children:
        return {"children": plain_tree(node), **settings}
    return settings or None


def unknown_silo(tree: TreeNode, silos: list[str]) -> str | None:
    """Return why a tree does not fit the silos that have data, or None."""
    for name in tree.silos():
        if name not in silos:
            return f"{_WHERE}: {name} has no data{nearest(name, silos)}; there are {', '.join(silos)}"
    return None
