"""The noise scale against updates whose noise and signal are known."""

import math

import numpy as np
import pytest

from photon.state.noise_scale import NoiseScale


def test_equal_updates_have_no_noise() -> None:
    """g_s = g_b gives tr = 0 and |G|² = |g|²."""
    figures = NoiseScale().add(3.0, [3.0, 3.0, 3.0]).figures()
    assert figures["trace"] == pytest.approx(0.0, abs=1e-12)
    assert figures["square"] == pytest.approx(9.0)
    assert figures["scale"] == pytest.approx(0.0, abs=1e-12)


def test_known_noise_and_signal_are_found() -> None:
    generator = np.random.default_rng(0)
    signal, noise, size, silos = 2.0, 0.5, 400, 4
    running = NoiseScale()
    for _ in range(300):
        updates = signal / math.sqrt(size) + noise * generator.standard_normal((silos, size))
        norms = np.linalg.norm(updates, axis=1)
        running = running.add(float(np.linalg.norm(updates.mean(axis=0))), norms.tolist())
    figures = running.figures()
    assert figures["trace"] == pytest.approx(noise**2 * size, rel=0.03)
    assert figures["square"] == pytest.approx(signal**2, rel=0.15)
    assert figures["scale"] == pytest.approx(figures["trace"] / figures["square"])


def test_the_average_is_corrected_for_its_start() -> None:
    once = NoiseScale().add(2.0, [3.0, 3.0]).figures()
    assert once == pytest.approx({"trace": 10.0, "square": -1.0})
    assert NoiseScale().add(2.0, [3.0, 3.0]).add(2.0, [3.0, 3.0]).figures() == pytest.approx(once)


def test_a_single_silo_says_nothing() -> None:
    assert NoiseScale().add(1.0, [1.0]) == NoiseScale()
    assert NoiseScale().figures() == {}
