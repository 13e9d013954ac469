"""Contributions, order, edges and aggregation, against what is computed by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.orchestration.graph import (
    allowed,
    chosen,
    contributions,
    in_order,
    likeliest,
    log_probability,
    ranks,
    sampled,
)


def embeddings(agents: int, seed: int, size: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn((agents, size), generator=draw, dtype=torch.float64)
    return torch.nn.functional.normalize(values, dim=-1)


def test_contributions_are_cosines_to_the_mean() -> None:
    r = embeddings(5, 0)
    mean = r.mean(0)
    by_hand = [float(row @ mean / mean.norm()) for row in r]
    assert contributions(r).tolist() == pytest.approx(by_hand, abs=1e-12)
    # Batches are their parts.
    both = torch.stack([r, embeddings(5, 1)])
    assert torch.allclose(contributions(both)[0], contributions(r))


def test_equal_contributions_go_by_number() -> None:
    assert ranks(torch.tensor([0.2, 0.9, 0.9 + 1e-9, -0.1, 0.9])).tolist() == [3, 0, 1, 4, 2]
    assert in_order(torch.tensor([3, 0, 1, 4, 2])) == [1, 2, 4, 0, 3]
    # Equal drafts tie, whatever the order of sums does to the last bits.
    same = torch.nn.functional.normalize(torch.randn(384), dim=0).expand(10, 384)
    assert ranks(contributions(same.contiguous())).tolist() == list(range(10))


@settings(max_examples=50, deadline=None)
@given(agents=st.integers(1, 9), seed=st.integers(0, 1000), size=st.floats(0, 30))
def test_no_logits_give_a_cycle(agents: int, seed: int, size: float) -> None:
    """Adjacency is strictly upper triangular in the order π, and its N-th power is nothing."""
    draw = torch.Generator().manual_seed(seed)
    rank = ranks(contributions(embeddings(agents, seed)))
    logits = size * torch.randn((agents, agents), generator=draw)
    order = in_order(rank)
    assert sorted(order) == list(range(agents))
    for edges in (sampled(logits, rank, draw), likeliest(logits, rank), allowed(rank)):
        in_place = edges[order][:, order].long()
        assert torch.equal(in_place, in_place.triu(1))
        assert not torch.linalg.matrix_power(edges.double(), agents).any()
        for source, target in edges.nonzero().tolist():
            assert order.index(source) < order.index(target)


def graphs_of(agents: int, rank: Tensor) -> Tensor:
    """Return every graph that there may be."""
    pairs = allowed(rank).nonzero().tolist()
    made = []
    for bits in itertools.product([False, True], repeat=len(pairs)):
        graph = torch.zeros((agents, agents), dtype=torch.bool)
        for (i, j), bit in zip(pairs, bits, strict=True):
            graph[i, j] = bit
        made.append(graph)
    return torch.stack(made)


def test_log_probabilities_are_sums_of_bernoulli_terms_and_sum_to_one() -> None:
    rank = torch.tensor([1, 2, 0])
    logits = torch.tensor([[9.0, 0.3, -1.2], [2.0, 9.0, 0.7], [1.1, -0.4, 9.0]], dtype=torch.float64)
    graphs = graphs_of(3, rank)
    assert len(graphs) == 8
    found = log_probability(logits.expand(8, 3, 3), rank.expand(8, 3), graphs)
    pairs = [(2, 0), (2, 1), (0, 1)]  # by π = 2, 0, 1
    for graph, value in zip(graphs, found.tolist(), strict=True):
        by_hand = 0.0
        for i, j in pairs:
            chance = 1 / (1 + math.exp(-float(logits[i, j])))
            by_hand += math.log(chance if graph[i, j] else 1 - chance)
        assert value == pytest.approx(by_hand, abs=1e-12)
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_sampling_follows_the_probabilities_and_its_seed() -> None:
    rank = torch.tensor([0, 1, 2])
    logits = torch.tensor([[0.0, 1.0, -2.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    many, of_many = logits.expand(20_000, 3, 3), rank.expand(20_000, 3)
    first = sampled(many, of_many, torch.Generator().manual_seed(3))
    assert torch.equal(first, sampled(many, of_many, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sampled(many, of_many, torch.Generator().manual_seed(4)))
    share = first.float().mean(0)
    assert torch.allclose(share.triu(1), logits.sigmoid().triu(1), atol=0.015)
    assert not share.tril().any()


def test_the_answer_is_one_of_the_responses() -> None:
    for seed in range(20):
        r = embeddings(6, seed)
        psi = contributions(r)
        weights = psi.clamp(min=0)
        centre = (weights[:, None] * r).sum(0) / weights.sum()
        distances = (weights * (r[:, None] - r[None]).pow(2).sum(-1)).sum(1)
        number = int(chosen(r, psi, 0.0))
        assert number == int((r @ centre).argmax())
        # In unit length the same as the least weighted squared distance.
        assert number == int(distances.argmin())


def test_a_majority_answers_and_equal_responses_are_the_first() -> None:
    one, other = embeddings(2, 0)
    for outlier in range(4):
        r = one.repeat(4, 1)
        r[outlier] = other
        assert int(chosen(r, contributions(r), 0.0)) != outlier
    r = one.repeat(4, 1)
    assert int(chosen(r, contributions(r), 0.0)) == 0


def test_outliers_count_nothing_and_nothing_left_is_guarded() -> None:
    axis = torch.eye(3, dtype=torch.float64)
    r = torch.stack([axis[0], axis[0], -axis[0]])
    psi = contributions(r)
    assert psi.tolist() == [1, 1, -1]
    assert int(chosen(r, psi, 0.0)) == 0
    # Two opposite responses have no mean: every contribution is 0, and the first answers.
    r = torch.stack([axis[0], -axis[0]])
    assert contributions(r).tolist() == [0, 0]
    assert int(chosen(r, contributions(r), 0.0)) == 0
    # Without clipping the sum of weights may vanish.
    assert int(chosen(r, torch.tensor([1.0, -1.0], dtype=torch.float64), None)) == 0
