"""LoRA without peft: what tests compare with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ByHand(nn.Module):
    """y = layer(x) + scale · x Aᵀ Bᵀ."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.a.T) @ self.b.T


def put_by_hand(plain: Any, initial: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Freeze a plain model and put adapters with these initial values to it; return them by name."""
    plain.requires_grad_(False)
    found = {}
    for name in [name.partition(".lora_A.")[0] for name in initial if ".lora_A." in name]:
        names = [f"{name}.lora_{part}.default.weight" for part in "AB"]
        layer = ByHand(plain.get_submodule(name), *(initial[one] for one in names), scale)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer)
        found |= dict(zip(names, (layer.a, layer.b), strict=True))
    return found


def trainable(model: nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
