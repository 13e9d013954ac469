"""The privacy loss of releasing several noised updates."""

import math


def epsilon(noise_multiplier: float, releases: int, delta: float) -> float:
    """Return the ε for which ``releases`` of the Gaussian mechanism are (ε, δ)-differentially private.

    T releases with noise multiplier z are as one with μ = √T / z, whatever each depends on (Dong, Roth and Su
    2022, corollary 3.3), and the exact trade-off of one is (Balle and Wang 2018, theorem 8)

        δ(ε) = Φ(μ/2 − ε/μ) − exp(ε) Φ(−μ/2 − ε/μ).

    Nothing is taken off for the sampling of cohorts: the receiver knows who was in one.

    Parameters
    ----------
    noise_multiplier
        z: standard deviation of the noise over the L2 bound of an update; 0: no noise.
    releases
        T: updates that have left.
    delta
        δ, in (0, 1).

    Returns
    -------
    float
        ε, correct to nine digits and never below; infinite if updates left without noise.
    """
    if releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    mu = math.sqrt(releases) / noise_multiplier
    if _delta(0.0, mu) <= delta:
        return 0.0
    # What zero-concentrated privacy gives is never too small (Bun and Steinke 2016, proposition 1.3).
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, mu) > delta else (low, middle)
    return high


def _delta(epsilon: float, mu: float) -> float:
    import torch

    x = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    first, second = torch.special.log_ndtr(x).tolist()
    # Both terms as logarithms: the exponential alone would overflow.
    return -math.exp(first) * math.expm1(epsilon + second - first)
