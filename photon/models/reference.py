"""The model that a run starts from, beside the one that it trains."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
#: Name of the part of a model that is its reference.
_NAME = "reference"


class Reference(nn.Module):
    """A frozen copy of a model, always in evaluation mode."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Reference":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, **inputs: Any) -> Any:
        """Return what the model returns, without a graph."""
        with torch.no_grad():
            return self.model(**inputs)


def add_reference(model: "PreTrainedModel") -> "PreTrainedModel":
    """Put a frozen copy of a model into it, as a part that it does not call by itself.

    So the copy is among the parameters that no step moves: it is in checkpoints, is sent once to each silo,
    and never leaves one.
    """
    reference = Reference(model)
    model.add_module(_NAME, reference)
    return model


def reference_of(model: nn.Module) -> Reference | None:
    """Return the reference of a model, or of what a wrapper wraps; None: it has none."""
    found = getattr(getattr(model, "module", model), _NAME, None)
    return found if isinstance(found, Reference) else None


def take_reference(model: nn.Module) -> bool:
    """Remove the reference from a model; return whether there was one."""
    found = reference_of(model) is not None
    if found:
        delattr(model, _NAME)
    return found


def without_reference(params: Mapping[str, T]) -> dict[str, T]:
    """Return what belongs to a model alone, by name."""
    return {name: one for name, one in params.items() if not name.startswith(f"{_NAME}.")}
