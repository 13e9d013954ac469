"""Attention over the layers of federations: how alike two blocks are, and their mean weighted by that.

    a = softmax_i(s_i),   AttnAgg(k_q; {k_i}) = Σ_i a_i k_i        (WorldLM, 2405.14446)

with one of the similarities s_i between the own block k_q and a candidate k_i, n = dim vec(k):

    dot            ⟨k_q, k_i⟩ / (τ √n)
    cosine         cos(k_q, k_i) / τ
    delta_cosine   cos(k_q − ref, k_i − ref) / τ,   ref: the block as it was before any training
    projection     as delta_cosine, of random projections of the changes to a few dimensions
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field

from photon.config.section import Section
from photon.models.partition import flatten

Score = Literal["dot", "cosine", "delta_cosine", "projection"]
Block = Mapping[str, torch.Tensor]
#: Values that torch sums in one thread.
_PIECE = 2**14
#: Values of a random projection that are drawn at a time.
_CHUNK = 2**22


class Attention(Section):
    """How key blocks attend to each other."""

    score: Score = Field("delta_cosine", description="Similarity of two blocks.")
    tau: float = Field(1.0, gt=0, description="Temperature τ; inf: every candidate counts alike.")
    include_self_down: bool = Field(True, description="Whether the own block is a candidate on the way down.")
    include_self_up: bool = Field(True, description="Whether the own block is a candidate on the way up.")
    dimensions: int = Field(64, ge=1, description="Dimensions of score=projection.")


def similarities(
    own: Block, others: Sequence[Block], names: Sequence[str], reference: Block | None, attention: Attention
) -> list[float]:
    """Return how similar each of some blocks is to the own one, before the temperature.

    Parameters
    ----------
    own, others
        Blocks, perhaps among other parameters.
    names
        Parameters of the block.
    reference
        The block before any training, for the scores that look at changes.
    """

    def vector(block: Block) -> torch.Tensor:
        if attention.score in ("dot", "cosine"):
            return flatten(block, names)
        assert reference is not None, "the strategy sends it to whoever has none"
        change = flatten(block, names) - flatten(reference, names)
        return _project(change, attention.dimensions) if attention.score == "projection" else change

    query = vector(own)
    if attention.score == "dot":
        return [_inner(query, vector(other)) / math.sqrt(len(query)) for other in others]
    return [_cosine(query, vector(other)) for other in others]


def softmax(scores: Sequence[float], tau: float) -> list[float]:
    """Return exp(s_i / τ) / Σ_j exp(s_j / τ)."""
    return torch.softmax(torch.tensor(scores, dtype=torch.float64) / tau, dim=0).tolist()


def attend(
    own: Block,
    others: Sequence[Block],
    names: Sequence[str],
    reference: Block | None,
    attention: Attention,
    *,
    include_self: bool,
    counts: Sequence[float] | None = None,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Aggregate blocks by attention.

    Parameters
    ----------
    counts
        Multiplicity of each of ``others``, such as the leaves that it stands for; None: 1 each. The own
        block counts once.

    Returns
    -------
    tuple
        The aggregated block, and the weights of the candidates, the own block first if it is one. They sum
        to 1.
    """
    candidates = [own, *others] if include_self or not others else list(others)
    if len(candidates) == 1:
        return {name: candidates[0][name] for name in names}, [1.0]
    attended = softmax(similarities(own, candidates, names, reference, attention), attention.tau)
    multiplicity = [1.0] * (len(candidates) - len(others)) + list(counts or [1.0] * len(others))
    shares = [count * share for count, share in zip(multiplicity, attended, strict=True)]
    weights = [share / math.fsum(shares) for share in shares]
    return {
        name: sum(
            (weight * block[name] for weight, block in zip(weights, candidates, strict=True)),
            torch.zeros(()),
        )
        for name in names
    }, weights


def entropy(weights: Sequence[float]) -> float:
    """Return −Σ a_i ln a_i: ln of the number of candidates if they count alike, 0 if one alone does."""
    return -math.fsum(weight * math.log(weight) for weight in weights if weight > 0)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    norms = math.sqrt(_inner(one, one) * _inner(other, other))
    # What has not changed yet is like everything.
    return _inner(one, other) / norms if norms > 0 else 1.0


def _inner(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ⟨one, other⟩, the same whatever the number of threads: nodes and engines must agree."""
    pieces = zip(one.split(_PIECE), other.split(_PIECE), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in pieces)


def _project(vector: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Project by random signs: every node draws the same ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(b"projection"))
    result = torch.zeros(dimensions)
    step = max(1, _CHUNK // dimensions)
    for start in range(0, len(vector), step):
        piece = vector[start : start + step]
        signs = torch.randint(0, 2, (dimensions, len(piece)), generator=generator, dtype=torch.float32)
        result += (2 * signs - 1) @ piece
    return result
