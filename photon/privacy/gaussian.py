"""The Gaussian mechanism on an update: clip it, add noise, and let only the result out.

    Δ = θ_start − θ_trained,   Δ̃ = Δ · min(1, C / ‖Δ‖₂) + N(0, (z C)² I),   privatised = θ_start − Δ̃

The norm is over all tensors together, so C bounds what one participant adds in one round. θ_start must be
known to the receiver already, and Δ̃ is then all that it learns from the tensors. How the participant came to
θ_trained, and what it keeps of it, plays no part in the guarantee.
"""

import math
import os
from collections.abc import Mapping

import torch

from photon.config.schema import PrivacySection
from photon.errors import PhotonError

#: Values of noise that are drawn at a time.
_BLOCK = 2**20
#: Values that a double holds in [0, 1) at equal distances.
_STEPS = 2**53


def privatise(
    start: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    settings: PrivacySection,
    generator: torch.Generator | None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Return what may leave in the place of ``trained``.

    Parameters
    ----------
    start
        Tensors that the receiver knows; those of ``trained`` at least.
    trained
        Floating-point tensors, on any device.
    settings
        C is its ``clip_norm``, which is set, and z its ``noise_multiplier``.
    generator
        Where the noise comes from; None: the operating system. A generator of torch makes a run repeatable,
        but whoever sees enough of its noise (as in a coordinate that was not trained) can foretell the rest.

    Returns
    -------
    tuple
        The tensors to release, on the CPU, and the norm of the update before it was clipped. With no noise
        an update within the bound is released as it is, bit for bit.

    Raises
    ------
    PhotonError
        If the update is not finite, and so cannot be bounded.
    """
    norms = [
        float(torch.linalg.vector_norm(start[name] - tensor.cpu(), dtype=torch.float64))
        for name, tensor in trained.items()
    ]
    norm = math.hypot(*norms)
    if not math.isfinite(norm):
        raise PhotonError("privacy: the trained update is not finite, so nothing of it is released")
    clip_norm = settings.clip_norm
    assert clip_norm is not None, "there is something to bound the update by"
    sigma = settings.noise_multiplier * clip_norm
    privatised = {}
    for name, tensor in trained.items():
        kept = tensor.cpu()
        if norm > clip_norm:
            kept = start[name] - (start[name] - kept) * (clip_norm / norm)
        if sigma > 0:
            kept = kept - gaussian(kept.numel(), generator).mul_(sigma).view(kept.shape)
        privatised[name] = kept
    return privatised, norm


def gaussian(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw ``count`` values of N(0, 1) as float32 of shape (count,); ``generator`` is that of `privatise`."""
    values = torch.empty(count)
    for block in values.split(_BLOCK):
        # In the middle of its step, where the inverse of the distribution is finite.
        uniform = (_integers(block.numel(), generator).double() + 0.5) / _STEPS
        block.copy_(torch.special.ndtri(uniform))
    return values


def _integers(count: int, generator: torch.Generator | None) -> torch.Tensor:
    """Draw ``count`` integers in [0, 2^53)."""
    if generator is not None:
        return torch.randint(_STEPS, (count,), generator=generator)
    return torch.frombuffer(bytearray(os.urandom(8 * count)), dtype=torch.int64) & (_STEPS - 1)
