"""A model whose body is applied several times, measured with other numbers of iterations than in training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.perplexity import evaluate_data
from photon.objective.perplexity import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from photon.training.precision import Precision


class Iterated(NamedTuple):
    """What a number of iterations has come to.

    Attributes
    ----------
    scores : dict[str, Score]
        Of each silo's validation text, by its name.
    angle : float
        Between a token's state after the last pass and the one before it, in radians, on average over the
        tokens. It goes to zero where iterating leads to a fixed direction; lengths would say nothing, since
        with variant D they double in every pass.
    """

    scores: dict[str, Score]
    angle: float


def evaluate_iterations(
    model: "PreTrainedModel",
    data: PreparedData,
    iterations: Sequence[int],
    *,
    batch_size: int,
    device: torch.device | str,
    precision: "Precision",
    limit: int | None = None,
) -> dict[int, Iterated]:
    """Return what `evaluate_data` does for each number of iterations, and the angle of the last pass.

    Raises
    ------
    PhotonError
        If the model does not iterate, a number is not possible, or the data does not fit the model.
    """
    found = {}
    for number in iterations:
        with iterating(model, number), _last_angle(model) as angles:
            scores = evaluate_data(
                model, data, batch_size=batch_size, device=device, precision=precision, limit=limit
            )
        tokens = sum(count for _, count in angles)
        found[number] = Iterated(scores, sum(angle for angle, _ in angles) / max(tokens, 1))
    return found


@contextmanager
def iterating(model: "PreTrainedModel", number: int) -> Iterator[None]:
    """Let the model apply its body so many times.

    Raises
    ------
    PhotonError
        If it has none, or the number is not possible.
    """
    from photon.models.abbie import MAX_ITERATIONS, body_of

    if not body_of(model):
        raise PhotonError(
            f"iterations: a {model.config.model_type} applies each block once; leave the option out"
        )
    if not 1 <= number <= MAX_ITERATIONS:
        raise PhotonError(f"iterations={number}: expected 1 to {MAX_ITERATIONS}")
    before = model.config.iterations
    model.config.iterations = number
    try:
        yield
    finally:
        model.config.iterations = before


@contextmanager
def _last_angle(model: "PreTrainedModel") -> Iterator[list[tuple[float, int]]]:
    """Collect, for each batch, the sum of the last pass's angles, and over how many tokens it is."""
    found: list[tuple[float, int]] = []

    def look(_: nn.Module, given: Any, after: torch.Tensor) -> None:
        index, before, _ = given
        if index == model.config.passes - 1:
            angles = angle_between(before, after)
            found.append((float(angles.sum(dtype=torch.float64)), angles.numel()))

    blocks: Any = model.base_model
    hook = blocks.carry.register_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def angle_between(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the angles in radians between vectors of shape (…, width), small ones to the same digits."""
    one, other = (nn.functional.normalize(vector.float(), dim=-1, eps=1e-30) for vector in (one, other))
    return 2 * torch.atan2((one - other).norm(dim=-1), (one + other).norm(dim=-1))
