"""What a silo's machine chose where the configuration leaves the choice to it.

It is chosen once, before a run's first round, and holds for the whole run: other bits come of another number
format, of other threads, and of micro-batches of another size under dropout.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from photon.config.training import TrainingSection

#: Sequences of a micro-batch, at most.
MAX_SEQUENCES = 2**24


class Decided(BaseModel):
    """What a machine trains with; None: it is not known.

    Attributes
    ----------
    device
        Where it trains.
    precision
        Format of the forward and backward pass.
    threads
        CPU threads.
    micro_batch_size
        Sequences per forward pass.
    attention
        How attention is computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["cpu", "cuda"] | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    micro_batch_size: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    attention: Literal["sdpa", "products"] | None = None

    def completed(self, later: "Decided | None") -> "Decided":
        """Return this with what is not known yet taken from a later one."""
        return self if later is None else Decided.model_validate({**_known(later), **_known(self)})

    def applied_to(self, training: TrainingSection) -> TrainingSection:
        """Return a ``training`` section with what it leaves open as it was decided."""
        open_keys = {
            "device": training.device == "auto",
            "precision": training.precision == "auto",
            "threads": training.threads is None,
            "micro_batch_size": training.micro_batch_size == "auto",
            "attention": training.attention == "auto",
        }
        return training.model_copy(
            update={key: value for key, value in _known(self).items() if open_keys[key]}
        )


def agreed(decided: Iterable[Decided | None]) -> Decided | None:
    """Return what machines have decided, as far as those that say so say the same; None: nothing."""
    told: dict[str, set[object]] = {}
    for one in decided:
        for key, value in _known(one or Decided()).items():
            told.setdefault(key, set()).add(value)
    same = {key: values.pop() for key, values in told.items() if len(values) == 1}
    return Decided.model_validate(same) if same else None


def _known(decided: Decided) -> dict[str, object]:
    return decided.model_dump(exclude_none=True)
