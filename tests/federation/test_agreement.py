"""Agreement figures from norms equal the pairwise definition."""

import itertools

import pytest
import torch

from photon.federation.agreement import consensus, silo_cosine


def test_cosine_equals_the_weighted_mean_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    norm = float((weights[:, None] * updates).sum(0).norm())
    norms = [float(u.norm()) for u in updates]
    top = bottom = 0.0
    for i, j in itertools.combinations(range(5), 2):
        share = float(weights[i] * weights[j]) * norms[i] * norms[j]
        top += share * float(torch.nn.functional.cosine_similarity(updates[i], updates[j], dim=0))
        bottom += share
    assert silo_cosine(norm, weights.tolist(), norms) == pytest.approx(top / bottom, abs=1e-12)


def test_consensus_is_the_weighted_mean_cosine_with_the_pseudo_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    updates = torch.randn(4, 30, generator=generator, dtype=torch.float64) + 0.3
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    mean = (weights[:, None] * updates).sum(0)
    norms = updates.norm(dim=1)
    cosines = torch.nn.functional.cosine_similarity(updates, mean[None], dim=1)
    expected = float((weights * norms * cosines).sum() / (weights * norms).sum())
    assert consensus(float(mean.norm()), weights.tolist(), norms.tolist()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], 1.0),
        ([[1.0, 0.0], [0.0, 1.0]], 2**-0.5),
        ([[1.0, 0.0], [-1.0, 0.0]], 0.0),
    ],
)
def test_consensus_of_equal_orthogonal_and_opposite_updates(
    updates: list[list[float]], expected: float
) -> None:
    rows = torch.tensor(updates, dtype=torch.float64)
    norm = float(rows.mean(0).norm())
    assert consensus(norm, [0.5, 0.5], [1.0, 1.0]) == pytest.approx(expected)


def test_undefined_without_two_moving_silos() -> None:
    assert silo_cosine(1.0, [1.0], [1.0]) is None
    assert silo_cosine(0.5, [0.5, 0.5], [1.0, 0.0]) is None
    assert consensus(0.0, [0.5, 0.5], [0.0, 0.0]) is None
