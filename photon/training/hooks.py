"""What a method may add to the local steps, handed to the loop as plain callables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

#: Parameters with their names, as hooks get them. Under FSDP they are shards.
NamedParameterList = Sequence[tuple[str, nn.Parameter]]


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
        unscaling, before the norm is measured and clipped.
    """

    term: Callable[[nn.Module], Tensor] | None = None
    correct: Callable[[NamedParameterList], None] | None = None


#: The bare loop.
NO_HOOKS = StepHooks()
