"""Attention over layers: weights of a softmax, which prefer what is alike."""

import math
from itertools import permutations
from typing import get_args

import pytest
import torch

from photon.strategy.attention import Attention, Score, attend, entropy, similarities, softmax

NAMES = ["weight", "bias"]
Block = dict[str, torch.Tensor]


def block(seed: int) -> Block:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(40, 30, generator=generator),
        "bias": torch.randn(30, generator=generator),
    }


def near(one: Block, other: Block, share: float) -> Block:
    return {name: share * one[name] + (1 - share) * other[name] for name in one}


INITIAL = block(0)


@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize("include_self", [True, False])
def test_weights_sum_to_one_and_do_not_depend_on_the_order(score: Score, include_self: bool) -> None:
    attention = Attention.model_validate({"score": score, "tau": 0.3})
    own, others = block(1), [block(2), block(3), near(block(1), block(4), 0.6)]
    reference: list[float] = []
    for request in permutations(range(3)):
        attended, weights = attend(
            own,
            [others[index] for index in request],
            NAMES,
            INITIAL,
            attention,
            include_self=include_self,
        )
        assert math.fsum(weights) == pytest.approx(1, abs=1e-6)
        assert len(weights) == 3 + include_self
        of_others = dict(zip(request, weights[include_self:], strict=True))
        in_order = [*weights[:include_self], *(of_others[index] for index in range(3))]
        reference = reference or in_order
        assert in_order == pytest.approx(reference, abs=1e-6)
        expected = sum(
            weight * one["weight"]
            for weight, one in zip(
                weights, [*([own] if include_self else []), *(others[i] for i in request)], strict=True
            )
        )
        assert torch.allclose(attended["weight"], expected, atol=1e-6)


@pytest.mark.parametrize("score", get_args(Score))
def test_the_more_similar_candidate_gets_the_larger_weight(score: Score) -> None:
    attention = Attention.model_validate({"score": score, "tau": 0.5})
    own = block(1)
    alike = near(own, block(2), 0.9)
    _, weights = attend(own, [block(3), alike, block(3)], NAMES, INITIAL, attention, include_self=False)
    assert weights[1] > weights[0]
    assert weights[0] == pytest.approx(weights[2])


def test_a_candidate_equal_to_the_query_leaves_it_unchanged() -> None:
    own = block(1)
    attended, weights = attend(own, [dict(own)], NAMES, INITIAL, Attention(), include_self=True)
    assert weights == pytest.approx([0.5, 0.5])
    assert all(torch.allclose(attended[name], own[name]) for name in NAMES)


def test_an_infinite_temperature_is_the_uniform_mean() -> None:
    others = [block(2), block(3)]
    attention = Attention(tau=math.inf)
    attended, weights = attend(block(1), others, NAMES, INITIAL, attention, include_self=False)
    assert weights == [0.5, 0.5]
    assert torch.allclose(attended["bias"], (others[0]["bias"] + others[1]["bias"]) / 2, atol=1e-7)
    assert entropy(weights) == pytest.approx(math.log(2))


def test_counts_weigh_candidates_beside_their_scores() -> None:
    attention = Attention(tau=math.inf)
    _, weights = attend(
        block(1), [block(2), block(3)], NAMES, INITIAL, attention, include_self=False, counts=[3, 1]
    )
    assert weights == [0.75, 0.25]


def test_scores_against_hand_computed_values() -> None:
    own = {"weight": torch.tensor([3.0, 4.0])}
    other = {"weight": torch.tensor([4.0, 3.0])}
    zero = {"weight": torch.zeros(2)}

    def one(score: Score, reference: Block) -> float:
        return similarities(own, [other], ["weight"], reference, Attention(score=score))[0]

    assert one("dot", zero) == pytest.approx(24 / math.sqrt(2))
    assert one("cosine", zero) == pytest.approx(0.96)
    # Changes since (3, 3): (0, 1) and (1, 0).
    assert one("delta_cosine", {"weight": torch.tensor([3.0, 3.0])}) == pytest.approx(0)
    assert softmax([0.0, math.log(3)], 1.0) == pytest.approx([0.25, 0.75])


def test_a_projection_keeps_the_cosine_about() -> None:
    own, other = block(1), near(block(1), block(2), 0.7)
    exact, projected = (
        similarities(own, [other], NAMES, INITIAL, Attention(score=score, dimensions=1024))[0]
        for score in ("delta_cosine", "projection")
    )
    # The standard deviation of a cosine in d dimensions is about (1 − c²) / √d.
    assert projected == pytest.approx(exact, abs=5 * (1 - exact**2) / math.sqrt(1024))


@pytest.mark.parametrize("score", ["dot", "cosine", "delta_cosine"])
def test_similarities_do_not_depend_on_the_number_of_threads(score: Score) -> None:
    large = {"weight": torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))}
    other = {"weight": large["weight"].flip(0) + 0.1}
    initial = {"weight": torch.zeros(1_000_003)}
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.update(similarities(large, [other], ["weight"], initial, Attention(score=score)))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
