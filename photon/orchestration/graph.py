"""Graphs of who reads whom: contributions, order, which edges there may be, and what is answered in the end.

Everything works on batches: leading dimensions are written as ``…``. N is the number of agents, d the size of
an embedding. An edge (i, j) says that j reads what i has answered.
"""

import torch
from torch import Tensor

#: Digits by which contributions and similarities are told apart, so that equal answers tie whatever the order
#: of a sum does to the last bits.
_DIGITS = 5


def contributions(embeddings: Tensor) -> Tensor:
    """Return ψ_n = cos(r_n, r̄), the cosine of each response to the mean of all.

    Parameters
    ----------
    embeddings
        r, float of shape (…, N, d), in unit length.

    Returns
    -------
    Tensor
        Shape (…, N); 0 where the mean is nothing.
    """
    return torch.cosine_similarity(embeddings, embeddings.mean(-2, keepdim=True), dim=-1)


def ranks(psi: Tensor) -> Tensor:
    """Return the place of each agent in the order π: descending ψ, ties by the agent's number.

    Returns
    -------
    Tensor
        int64 of the shape of ``psi``; 0 is first.
    """
    order = torch.argsort(psi.round(decimals=_DIGITS), dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1)


def allowed(rank: Tensor) -> Tensor:
    """Return which edges there may be: those from an earlier place to a later one.

    Sorted by π they are the strict upper triangle, so no choice of them has a cycle.

    Returns
    -------
    Tensor
        bool of shape (…, N, N).
    """
    return rank.unsqueeze(-1) < rank.unsqueeze(-2)


def chosen(embeddings: Tensor, psi: Tensor, clip: float | None) -> Tensor:
    """Return which response is the answer: the one nearest to r* = Σ ψ_n r_n / Σ ψ_n.

    Parameters
    ----------
    embeddings
        Shape (…, N, d), in unit length.
    psi
        Shape (…, N).
    clip
        Contributions below are set to it; None: none is. Where nothing is left, all count alike.

    Returns
    -------
    Tensor
        int64 of shape (…); of equally near ones the first.
    """
    weights = psi if clip is None else psi.clamp(min=clip)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total.abs() > 1e-9, weights, torch.ones_like(weights))
    total = weights.sum(-1, keepdim=True)
    centre = (weights.unsqueeze(-1) * embeddings).sum(-2) / total
    near = torch.cosine_similarity(embeddings, centre.unsqueeze(-2), dim=-1)
    return near.round(decimals=_DIGITS).argmax(-1)


def log_probability(logits: Tensor, rank: Tensor, edges: Tensor) -> Tensor:
    """Return Σ log Bernoulli(e_ij; σ(Λ_ij)) over all pairs of which i comes before j.

    Parameters
    ----------
    logits
        Λ, of shape (…, N, N).
    rank
        Of `ranks`, shape (…, N).
    edges
        bool of shape (…, N, N).

    Returns
    -------
    Tensor
        Shape (…), in nats.
    """
    terms = -torch.nn.functional.binary_cross_entropy_with_logits(
        logits, edges.to(logits.dtype), reduction="none"
    )
    return torch.where(allowed(rank), terms, torch.zeros_like(terms)).sum((-2, -1))


def sampled(logits: Tensor, rank: Tensor, draw: torch.Generator) -> Tensor:
    """Return edges, each there with the probability σ(Λ_ij)."""
    chance = torch.rand(logits.shape, generator=draw, dtype=logits.dtype)
    return (chance < logits.detach().sigmoid()) & allowed(rank)


def likeliest(logits: Tensor, rank: Tensor) -> Tensor:
    """Return the edges whose probability is above 0.5."""
    return (logits.detach() > 0) & allowed(rank)


def in_order(rank: Tensor) -> list[int]:
    """Return the agents of one question in the order π, from ranks of shape (N,)."""
    places: list[int] = torch.argsort(rank).tolist()
    return places
