"""How much the silos of a round agree, from norms alone."""

from collections.abc import Sequence


def silo_cosine(norm: float, weights: Sequence[float], update_norms: Sequence[float]) -> float | None:
    """Return the norm-weighted mean cosine between the updates of different silos.

    With Δ = Σ_k w_k Δ_k and a_k = w_k ‖Δ_k‖,

        Σ_{i≠j} a_i a_j cos(Δ_i, Δ_j) / Σ_{i≠j} a_i a_j = (‖Δ‖² − Σ a_k²) / ((Σ a_k)² − Σ a_k²),

    which needs no pair of updates in memory.

    Parameters
    ----------
    norm
        ‖Δ‖, the norm of the pseudo-gradient.
    weights
        Shares w_k, summing to 1.
    update_norms
        ‖Δ_k‖ of each silo.

    Returns
    -------
    float or None
        In [−1, 1] up to rounding; None for fewer than two moving silos.
    """
    lengths = [weight * update for weight, update in zip(weights, update_norms, strict=True)]
    squares = sum(length**2 for length in lengths)
    pairs = sum(lengths) ** 2 - squares
    if pairs <= 1e-12 * squares or pairs <= 0:
        return None
    return (norm**2 - squares) / pairs


def consensus(norm: float, weights: Sequence[float], update_norms: Sequence[float]) -> float | None:
    """Return ‖Σ_k w_k Δ_k‖ / Σ_k w_k ‖Δ_k‖: 1 for equal updates, 1/√K for orthogonal ones of one norm.

    With Δ = Σ_k w_k Δ_k it is the mean of cos(Δ_k, Δ), weighted by w_k ‖Δ_k‖: Σ_k w_k ⟨Δ_k, Δ⟩ = ‖Δ‖².
    """
    total = sum(weight * update for weight, update in zip(weights, update_norms, strict=True))
    return norm / total if total > 0 else None
