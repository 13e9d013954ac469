"""Numbers that JSON has no word for, as transformers writes them: ``{"__float__": "Infinity"}``."""

import math
from typing import Any

_TAG = "__float__"
_NUMBERS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def tagged(value: Any) -> Any:
    """Return a value with a tag in the place of every infinity and NaN in it."""
    if isinstance(value, dict):
        return {key: tagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [tagged(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def untagged(value: Any) -> Any:
    """Undo `tagged`; what is no tag stays as it is."""
    if isinstance(value, dict):
        tag = value.get(_TAG)
        if len(value) == 1 and isinstance(tag, str) and tag in _NUMBERS:
            return _NUMBERS[tag]
        return {key: untagged(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [untagged(inner) for inner in value]
    return value
