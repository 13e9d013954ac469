"""What runs of one process share: they take turns, and show themselves as they are told."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from photon.config.schema import RunConfig

Shown = Literal["auto", "plain", "none"]

#: Held by whoever trains or evaluates.
_TURN = threading.Lock()


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread of this process trains, and leave torch's settings as they were."""
    import torch

    with _TURN:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def shown_as(config: RunConfig, display: Shown | None) -> RunConfig:
    """Return the configuration with another ``telemetry.display``; None: as it is."""
    if display is None:
        return config
    return config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"display": display})})
