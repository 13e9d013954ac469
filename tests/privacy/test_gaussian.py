"""Clipping is exact, and the noise has the distribution that the accountant counts on."""

import math

import pytest
import torch

from photon.config.schema import PrivacySection
from photon.errors import PhotonError
from photon.privacy.gaussian import gaussian, privatise

COUNT = 400_000


def settings(clip_norm: float, noise_multiplier: float = 0.0) -> PrivacySection:
    return PrivacySection(
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        delta=1e-5,
        seed=None,
        secure_aggregation=False,
        threshold=None,
        range=8.0,
    )


def tensors(*norms: float) -> dict[str, torch.Tensor]:
    """Tensors of the given norms."""
    generator = torch.Generator().manual_seed(1)
    drawn = {f"w{i}": torch.randn(7, i + 3, generator=generator) for i in range(len(norms))}
    return {
        name: tensor * norm / tensor.norm() for (name, tensor), norm in zip(drawn.items(), norms, strict=True)
    }


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((first[name] - second[name]).double().square().sum()) for name in first))


def test_an_update_beyond_the_bound_is_scaled_to_it_as_a_whole() -> None:
    start, update = tensors(1.0, 1.0), tensors(3.0, 4.0)
    trained = {name: start[name] - update[name] for name in start}
    privatised, norm = privatise(start, trained, settings(2.0), None)
    assert norm == pytest.approx(5.0, rel=1e-5)
    assert distance(start, privatised) == pytest.approx(2.0, rel=1e-5)
    for name in start:
        torch.testing.assert_close(start[name] - privatised[name], update[name] * 2 / 5, atol=1e-6, rtol=1e-5)


def test_an_update_within_the_bound_is_released_bit_for_bit() -> None:
    start, trained = tensors(1.0, 1.0), tensors(3.0, 4.0)
    within = distance(start, trained) * 1.001
    privatised, norm = privatise(start, trained, settings(within), None)
    assert norm == pytest.approx(distance(start, trained))
    assert all(torch.equal(privatised[name], trained[name]) for name in trained)


@pytest.mark.parametrize("generator", [seeded(), None], ids=["seeded", "operating system"])
def test_the_noise_is_normal_with_the_stated_variance(generator: torch.Generator | None) -> None:
    """Bounds of five standard errors; the update is at the bound, so that both steps are seen together."""
    start = {"a": torch.zeros(COUNT // 2), "b": torch.zeros(COUNT // 4, 2)}
    trained = {name: torch.ones_like(tensor) for name, tensor in start.items()}
    privatised, _ = privatise(start, trained, settings(0.5, 3.0), generator)
    expected = 0.5 / math.sqrt(COUNT)
    noise = (torch.cat([tensor.flatten() for tensor in privatised.values()]).double() - expected) / 1.5
    assert abs(float(noise.mean())) < 5 / math.sqrt(COUNT)
    # Σ x² is χ² with COUNT degrees of freedom, of variance 2 · COUNT.
    assert abs(float(noise.square().sum()) - COUNT) < 5 * math.sqrt(2 * COUNT)
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * math.sqrt(96 / COUNT)
    # Independent from coordinate to coordinate.
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 / math.sqrt(COUNT)
    for bound in (1.0, 2.0, 3.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs(float((noise.abs() > bound).double().mean()) - share) < 5 * math.sqrt(share / COUNT)


def test_a_seed_repeats_the_noise_and_the_operating_system_does_not() -> None:
    assert torch.equal(gaussian(1000, seeded()), gaussian(1000, seeded()))
    assert not torch.equal(gaussian(1000, None), gaussian(1000, None))
    assert torch.isfinite(gaussian(2**20 + 3, None)).all(), "more than one block"


def test_what_cannot_be_bounded_is_not_released() -> None:
    start, trained = tensors(1.0), tensors(2.0)
    trained["w0"][0, 0] = math.inf
    with pytest.raises(PhotonError, match="not finite"):
        privatise(start, trained, settings(1.0), None)
