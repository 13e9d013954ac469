"""What was renamed, as one table (``renamed.yaml``): an old key is an error that names the present one.

What earlier versions have written is read by the same table: configurations of runs, events, checkpoints, and
what silos have kept.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from photon.errors import PhotonError

FILE = Path(__file__).with_suffix(".yaml")

#: Sections that a node of the tree may have; the other keys of a mapping there are names.
_OF_NODES = ("link", "strategy")


class Renamed(BaseModel):
    """Old name to present name, by kind; see ``renamed.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: dict[str, str]
    values: dict[str, str]
    events: dict[str, str]
    fields: dict[str, str]
    figures: dict[str, str]
    groups: dict[str, str]
    kept: dict[str, str]
    options: dict[str, str]
    words: dict[str, str]

    def key(self, old: str) -> str | None:
        """Return what a dotted key is called now; None: it was not renamed."""
        for row, new in self.keys.items():
            if old == row or old.startswith(f"{row}."):
                return new + old[len(row) :]
        return None

    def group(self, name: str) -> str:
        """Return what a state group is called now."""
        for row, new in self.groups.items():
            prefix = row.removesuffix("*")
            if name == row or (prefix != row and name.startswith(prefix)):
                return new.removesuffix("*") + name[len(prefix) :] if prefix != row else new
        return name

    def grouped(self, groups: Mapping[str, Any]) -> dict[str, Any]:
        """Return a mapping of state groups with their present names."""
        return {self.group(name): value for name, value in groups.items()}

    def kept_by_silo(self, groups: Mapping[str, Any]) -> dict[str, Any]:
        """Return the groups in a silo's own folder with their present names."""
        return {self.kept.get(name, self.group(name)): value for name, value in groups.items()}

    def content(self, content: Any) -> Any:
        """Return a mapping that was read as JSON with the present names of its fields."""
        if not isinstance(content, dict):
            return content
        return {self.fields.get(name, name): value for name, value in content.items()}

    def event(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of an event with present names."""
        event: dict[str, Any] = self.content(content)
        event["event"] = self.events.get(event["event"], event["event"])
        for field in ("group_bytes_up", "group_bytes_down"):
            if isinstance(event.get(field), dict):
                event[field] = self.grouped(event[field])
        if isinstance(event.get("values"), dict):
            event["values"] = {self.figure(name): value for name, value in event["values"].items()}
        return event

    def figure(self, name: str) -> str:
        """Return what a figure is called now."""
        figure, slash, of_what = name.partition("/")
        return self.figures.get(figure, figure) + slash + of_what


@cache
def renamed() -> Renamed:
    """Read the table."""
    return Renamed.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def is_called(old: str, new: str) -> str:
    """Return the one line for an old name."""
    return f"{old}: it is called {new} now"


def check_override(text: str, key: str, value: Any) -> None:
    """Check that an override has no old name.

    Parameters
    ----------
    text
        The override as it was given.
    key, value
        What it sets.

    Raises
    ------
    PhotonError
        If it has one; the message names the present one.
    """
    table = renamed()
    for name in (key, *re.findall(r"\$\{([\w.]+)\}", text)):
        if (new := table.key(name)) is not None:
            raise PhotonError(is_called(name, new))
    if (option := table.values.get(f"{key}={value}")) is not None:
        raise PhotonError(is_called(f"{key}={value}", option))


def check_names(values: Mapping[str, Any], where: str = "") -> None:
    """Check that a configuration, or sections of it, have no old name.

    Parameters
    ----------
    where
        What the sections belong to, for the error message.

    Raises
    ------
    PhotonError
        If they have one; the message names the present one.
    """
    found = next(_found(values, ""), None)
    if found is not None:
        raise PhotonError(f"{where}{is_called(*found)}")


def translated(values: Any) -> Any:
    """Return the values of an earlier version's configuration under their present names."""
    return _translated(values, "") if isinstance(values, dict) else values


def _found(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    table = renamed()
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if (new := table.key(dotted)) is not None:
            yield dotted, new
        elif isinstance(value, str) and f"{dotted}={value}" in table.values:
            yield f"{dotted}={value}", table.values[f"{dotted}={value}"]
        elif isinstance(value, dict) and dotted != "federation.tree":
            yield from _found(value, f"{dotted}.")


def _translated(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    table, made = renamed(), {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        present = table.keys[dotted].rpartition(".")[2] if dotted in table.keys else key
        if dotted == "federation.tree" and isinstance(value, dict):
            made[present] = _translated_tree(value)
        elif isinstance(value, dict):
            made[present] = _translated(value, f"{dotted}.")
        else:
            option = table.values.get(f"{dotted}={value}")
            made[present] = value if option is None else option.partition("=")[2]
    return made


def _translated_tree(nodes: Any) -> Any:
    if isinstance(nodes, list):
        return [_translated_tree(node) for node in nodes]
    if not isinstance(nodes, dict):
        return nodes
    made = {}
    for name, value in nodes.items():
        section = name in _OF_NODES and isinstance(value, str | dict) and "children" not in value
        made[name] = _translated({name: value}, "")[name] if section else _translated_tree(value)
    return made
