"""A small problem that every optimizer can step on, the same for all that start from one seed."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Make = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]

#: One larger than a block, one with a last piece, small ones, and one that is not contiguous.
SHAPES = {"embed": (2500, 120), "hidden": (24, 32), "tall": (40, 12), "bias": (32,), "scale": (1,)}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)))
        for name, shape in SHAPES.items()
    ]


def set_gradients(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    """Give every parameter the gradient of a bowl, plus noise that is a function of the step."""
    for number, (_, parameter) in enumerate(named):
        generator = torch.Generator().manual_seed(1000 * step + number)
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = 0.3 * parameter.detach() + noise


def trajectory(make: Make, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the parameters after ``steps`` steps."""
    named = parameters(seed, dtype)
    optimizer = make(named)
    for step in range(steps):
        set_gradients(named, step)
        optimizer.step()
    return [parameter.detach() for _, parameter in named]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
