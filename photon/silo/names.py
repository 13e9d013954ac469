"""Which components a silo builds for a run: no module is imported that is not known here.

Known are Photon's own packages, those of torch, what an installed package has registered as an entry point,
and the modules that the silo's policy names. A section takes from its own packages alone.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.errors import RefusedError

_DOTTED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)+")


@dataclass(frozen=True)
class Kind:
    """What a section of the configuration may name.

    Attributes
    ----------
    modules
        Packages and modules that hold them, with all below.
    group
        Group of entry points under which other packages register theirs.
    """

    modules: tuple[str, ...]
    group: str


KINDS = {
    "objective": Kind(("photon.objective",), "photon.objectives"),
    "optimizer": Kind(("photon.optim", "torch.optim"), "photon.optimizers"),
    "outer": Kind(("photon.optim", "torch.optim"), "photon.optimizers"),
    "schedule": Kind(("photon.training.schedule",), "photon.schedules"),
    "strategy": Kind(("photon.strategy",), "photon.strategies"),
    "link": Kind(("photon.link",), "photon.codecs"),
    "telemetry": Kind(("photon.telemetry",), "photon.listeners"),
}


def check_components(who: str, config: RunConfig, modules: Collection[str], named: Collection[str]) -> None:
    """Check that all that a configuration names may be imported; nothing is.

    Parameters
    ----------
    who
        Silo whose policy says no.
    modules
        Modules that the policy adds to those that are known.
    named
        Dotted paths that it names one by one.

    Raises
    ------
    RefusedError
        For the first that may not.
    """
    for where, kind, target in _targets_of(config):
        if not _is_known(KINDS[kind], target, modules, named):
            raise RefusedError(
                f"refused by {who}'s policy: {where}._target_={target!r:.200} is not registered there; "
                f"known are {', '.join(KINDS[kind].modules)}, entry points of the group {KINDS[kind].group}, "
                "and what `modules` of the policy names"
            )


def _is_known(kind: Kind, target: Any, modules: Collection[str], named: Collection[str]) -> bool:
    if not isinstance(target, str) or not _DOTTED.fullmatch(target):
        return False
    module = target.rpartition(".")[0]
    within = any(module == one or module.startswith(f"{one}.") for one in (*kind.modules, *modules))
    return within or target in named or target in _registered(kind.group)


@lru_cache(maxsize=16)
def _registered(group: str) -> frozenset[str]:
    """Return what installed packages have registered, which is read from their metadata alone."""
    return frozenset(point.value.replace(":", ".").replace(" ", "") for point in entry_points(group=group))


def _targets_of(config: RunConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield all that is named in a configuration: the key, the kind, and the dotted path."""
    for kind in ("objective", "optimizer", "outer", "schedule", "strategy"):
        section = getattr(config, kind)
        if section is not None:
            yield from _within(section.as_mapping(), kind, kind)
    if config.transition is not None:
        yield from _within(config.transition.optimizer, "transition.optimizer", "optimizer")
    yield from _within(config.link.model_dump(by_alias=True), "link", "link")
    yield from _within(config.telemetry.model_dump(by_alias=True), "telemetry", "telemetry")
    root = config.federation.root
    for node in [] if root is None else root.walk():
        yield from _within_node(node)


def _within_node(node: TreeNode) -> Iterator[tuple[str, str, Any]]:
    for kind in ("outer", "strategy", "link"):
        yield from _within(getattr(node, kind), f"federation.tree: {node.name}: {kind}", kind)


def _within(value: Any, where: str, kind: str) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield where, kind, value["_target_"]
        for key, inner in value.items():
            yield from _within(inner, f"{where}.{key}", kind)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _within(inner, f"{where}.{index}", kind)
