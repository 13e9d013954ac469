"""The privacy loss against the literature's formula at high precision, and against another library."""

import math

import pytest
from mpmath import erfc, exp, findroot, mp, mpf, sqrt

from photon.privacy.accountant import epsilon


def delta_of(eps: mpf, mu: mpf) -> mpf:
    """δ(ε) of one Gaussian mechanism whose sensitivity is μ standard deviations, by its two tails."""

    def phi(x: mpf) -> mpf:
        return erfc(-x / sqrt(2)) / 2

    return phi(mu / 2 - eps / mu) - exp(eps) * phi(-mu / 2 - eps / mu)


@pytest.mark.parametrize("noise", [0.3, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("releases", [1, 8, 500])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_epsilon_solves_the_exact_trade_off_of_one_mechanism(
    noise: float, releases: int, delta: float
) -> None:
    found = epsilon(noise, releases, delta)
    with mp.workdps(60):
        mu = sqrt(mpf(releases)) / mpf(noise)
        # Never too small, and not by more than a billionth too large.
        assert delta_of(mpf(found), mu) <= mpf(delta)
        assert delta_of(mpf(found) * (1 - mpf("1e-9")), mu) > mpf(delta)


@pytest.mark.parametrize(
    ("noise", "releases", "delta", "expected"),
    [
        # dp-accounting 0.6.0: PLDAccountant, discretised at 1e-4, pessimistic.
        (1.0, 1, 1e-5, 4.3771781),
        (1.0, 10, 1e-5, 17.8565866),
        (0.5, 8, 1e-6, 42.1654944),
        (4.0, 100, 1e-5, 13.2067122),
        (10.0, 3, 1e-5, 0.6200045),
    ],
)
def test_epsilon_is_that_of_another_library(
    noise: float, releases: int, delta: float, expected: float
) -> None:
    assert epsilon(noise, releases, delta) == pytest.approx(expected, abs=2e-4)


def test_releases_compose_as_the_square_root() -> None:
    assert epsilon(3.0, 9, 1e-5) == pytest.approx(epsilon(1.0, 1, 1e-5))


def test_the_ends_of_the_scale() -> None:
    assert epsilon(1.0, 0, 1e-5) == 0
    assert epsilon(0.0, 1, 1e-5) == math.inf
    # Noise so large that δ alone covers what is left.
    with mp.workdps(30):
        exact = delta_of(mpf(0), mpf(1) / 1000)
    assert epsilon(1000.0, 1, float(exact) * 1.01) == 0
    assert epsilon(1000.0, 1, float(exact) * 0.99) > 0
    # Far beyond where exp(ε) overflows.
    with mp.workdps(2000):
        root = findroot(lambda eps: delta_of(eps, mpf(100)) - mpf("1e-5"), 5426)
    assert epsilon(0.1, 100, 1e-5) == pytest.approx(float(root), rel=1e-9)
