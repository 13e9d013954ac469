"""What has changed between two states of a page, so that only what is new travels."""

from typing import Any

#: What is to be done: ``=`` take the value, ``+`` append it to the list, ``{`` change what it names.
Delta = list[Any]


def delta(old: Any, new: Any) -> Delta | None:
    """Return what makes ``new`` of ``old``, both JSON; None: they are the same."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        changed = {key: _of_key(old, new, key) for key in new}
        return ["{", {key: one for key, one in changed.items() if one is not None}]
    if isinstance(old, list) and isinstance(new, list):
        if old and new[: len(old)] == old:
            return ["+", new[len(old) :]]
        if len(old) == len(new) and all(isinstance(one, dict | list) for one in [*old, *new]):
            pairs = [delta(one, other) for one, other in zip(old, new, strict=True)]
            return ["{", {str(place): one for place, one in enumerate(pairs) if one is not None}]
    return ["=", new]


def _of_key(old: dict[str, Any], new: dict[str, Any], key: str) -> Delta | None:
    return delta(old[key], new[key]) if key in old else ["=", new[key]]
