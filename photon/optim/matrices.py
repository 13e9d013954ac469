"""Which parameters are hidden matrices: the ones that low-rank and orthogonalised steps are made for."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")
"""Parts of the names of embeddings and output layers in transformers' models."""


def hidden_matrices(group: dict[str, Any], excluded: Sequence[str]) -> list[bool]:
    """Return for each parameter of a group whether it is a matrix that ``excluded`` does not name.

    Parameters
    ----------
    group
        A parameter group of a torch optimizer. If its parameters have no names, all matrices count.
    excluded
        Parts of names.
    """
    parameters: list[Tensor] = group["params"]
    names: list[str] = group.get("param_names") or [""] * len(parameters)
    return [
        parameter.ndim == 2 and not any(part in name for part in excluded)
        for name, parameter in zip(names, parameters, strict=True)
    ]
