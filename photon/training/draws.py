"""Seeds of random draws: a function of the run's seed, the round, the silo and the purpose.

Models, losses and optimizers draw from the global sources of torch, numpy and Python. A round is to draw the
same whatever its process did before: another silo's round, a probe, or nothing because it was just started.
Noise for privacy and what hides sums have other sources, which nobody can foretell.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def draw_seed(seed: int, server_round: int, silo: str, purpose: str) -> int:
    """Return the seed of a purpose's draws, in [0, 2^63).

    Parameters
    ----------
    seed
        The run's.
    purpose
        Tells apart what is drawn in one round for one silo.
    """
    text = f"{seed}/{server_round}/{silo}/{purpose}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let the block draw from a seed; afterwards the global sources are as they were before.

    Parameters
    ----------
    seed
        As of `draw_seed`.
    device
        Where the block draws, beside the CPU.
    """
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # `torch.manual_seed` would also seed the devices that the block leaves alone, for good.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
