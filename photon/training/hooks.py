"""What the local loop is handed as plain callables: the loss of a batch, and what a method adds to a step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""Array name → rows of it, (batch, …). All arrays of a batch have the same number of rows."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    Attributes
    ----------
    value
        What the steps make smaller: a mean over the counted items of the batch, a scalar. The model's own
        auxiliary losses are in it. Of a batch without any item it is 0.
    figures
        Further scalars to tell, means over the same items. ``loss`` among them is reported in place of
        ``value``.
    """

    value: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Batch, Tensor | None], Loss]
"""Model, batch, and the rows of the vocabulary that the softmax runs over (None: all) to the loss."""

CountFunction = Callable[[Batch], Tensor | None]
"""Batch to the number of items that its loss is a mean over; None: equal for batches of equal size."""

NamedParameterList = Sequence[tuple[str, nn.Parameter]]
"""Parameters with their names, as hooks get them. Under FSDP they are shards."""


@dataclass(frozen=True)
class StepHooks:
    """Callables of the local loop. One that is None is absent: the loop has no line of it.

    Attributes
    ----------
    term
        Model to a scalar that is added to the loss of a step, once per step. It is no part of the loss that
        is reported.
    correct
        Changes the gradients of named parameters in place: after accumulation, averaging over devices and
        unscaling, before the norm is measured and clipped. A parameter that the loss did not reach has no
        gradient. In fp16 a gradient may be infinite: the loss scaler leaves such a step out.
    """

    term: Callable[[nn.Module], Tensor] | None = None
    correct: Callable[[NamedParameterList], None] | None = None


#: The bare loop.
NO_HOOKS = StepHooks()


def equal_counts(_: Batch) -> None:
    """Count no items: all batches of a size count the same."""
