"""Integers that sum without wrapping, and masks that look like nothing."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from photon.errors import PhotonError, RunError
from photon.privacy.masking import UNSIGNED, FixedPoint, Quantizer, add, add_mask, as_integers, as_sent


def updates(count: int, limit: float) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "a": (2 * torch.rand(50, 7, generator=generator) - 1) * limit,
            # The ends of the range are where a sum would wrap.
            "b": torch.tensor([limit, -limit, 0.0]),
            "scalar": torch.tensor(limit / 3),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(("count", "bits"), [(1, 32), (2, 31), (3, 30), (4, 30), (5, 29), (64, 26)])
def test_a_sum_is_exact_but_for_the_rounding_of_each(count: int, bits: int) -> None:
    quantizer = Quantizer(4.0, count)
    assert quantizer.bits == bits
    summands = updates(count, 4.0)
    total = quantizer.encode(summands[0])
    for summand in summands[1:]:
        add(total, quantizer.encode(summand))
    mean = quantizer.decode(total, count)
    for name, tensor in mean.items():
        expected = sum(summand[name].double() for summand in summands) / count
        assert tensor.shape == expected.shape
        # Half a step each, and the float32 of the result.
        bound = quantizer.step / 2 + 4.0 * 2**-24
        assert float((tensor.double() - expected).abs().max()) <= bound


def test_the_largest_sum_just_fits_the_ring() -> None:
    quantizer = Quantizer(1.0, 3)
    (largest,) = quantizer.encode({"x": torch.tensor([1.0])}).values()
    assert int(largest[0]) == 2**30 - 1
    assert 4 * int(largest[0]) < 2**32


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PhotonError, match=r"a cohort of 65537 leaves 15 bits.*at most 65536"):
        Quantizer(1.0, 2**16 + 1)
    Quantizer(1.0, 2**16)
    for value in (1.01, -1.01, float("nan"), float("inf")):
        with pytest.raises(PhotonError, match=r"privacy.range=1: the update of w reaches"):
            Quantizer(1.0, 2).encode({"w": torch.tensor([0.0, value])})


def test_a_mask_is_the_keystream_of_the_cipher_in_name_order() -> None:
    key = bytes(range(32))
    total = {
        "b": np.zeros((2, 3), np.uint32),
        "a": np.zeros(300_000, np.uint32),
        "c": np.zeros((), np.uint32),
    }
    add_mask(total, key)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * 300_007))
    words = np.frombuffer(stream, "<u4")
    np.testing.assert_array_equal(total["a"], words[:300_000])
    np.testing.assert_array_equal(total["b"], words[300_000:300_006].reshape(2, 3))
    assert total["c"] == words[300_006]
    add_mask(total, key, subtract=True)
    assert not any(values.any() for values in total.values())


def test_a_masked_update_is_uniform_whatever_it_hides() -> None:
    """χ² over the 256 values of the top byte, five standard deviations either way."""
    quantizer = Quantizer(1.0, 2)
    total = quantizer.encode({"x": torch.zeros(1_000_000)})
    assert len(np.unique(total["x"])) == 1
    add_mask(total, b"k" * 32)
    seen = np.bincount(total["x"] >> 24, minlength=256)
    expected = 1_000_000 / 256
    statistic = float(((seen - expected) ** 2 / expected).sum())
    assert abs(statistic - 255) < 5 * (2 * 255) ** 0.5


# --- sums of float64 ----------------------------------------------------------------------------------


def sums(count: int, limit: float) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "a": (2 * torch.rand(50, 7, generator=generator, dtype=torch.float64) - 1) * limit,
            "b": torch.tensor([limit, -limit, 0.0, limit * 2**-60], dtype=torch.float64),
            "scalar": torch.tensor(limit / 3, dtype=torch.float64),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("limit", "count", "bits"),
    # f = 62 − ⌈log₂ n⌉ − ⌈log₂ R⌉.
    [(2.0**20, 4, 40), (1000.0, 3, 50), (1.0, 1, 62), (2.0**40, 64, 16), (0.3, 2, 62)],
)
def test_a_sum_of_float64_is_exact_but_for_its_stated_rounding(limit: float, count: int, bits: int) -> None:
    """Against exact fractions: n s / 2, and one rounding to float64."""
    quantizer = FixedPoint(dict.fromkeys(("a", "b", "scalar"), limit), count)
    assert quantizer.step("a") == 2.0**-bits
    summands = sums(count, limit)
    total = quantizer.encode(summands[0])
    assert {values.dtype for values in total.values()} == {np.dtype(np.uint64)}
    for summand in summands[1:]:
        add(total, quantizer.encode(summand))
    quantizer.check_sum(total, count)
    largest = Fraction(0)
    for name, tensor in quantizer.decode(total, count).items():
        assert (tensor.dtype, tensor.shape) == (torch.float64, summands[0][name].shape)
        for place in range(tensor.numel()):
            exact = sum(Fraction(float(summand[name].view(-1)[place])) for summand in summands)
            error = abs(Fraction(float(tensor.reshape(-1)[place])) - exact)
            assert error <= Fraction(count, 2) / 2**bits + abs(exact) / 2**53
            largest = max(largest, error)
    if bits < 40:
        assert largest > 0, "something is lost, so that the bound says something"


def test_a_sum_beyond_its_range_is_refused_by_whoever_has_it() -> None:
    quantizer = FixedPoint({"shared/gram/upper": 4.0}, 2)
    for value in (4.01, -4.01, float("nan"), float("inf")):
        with pytest.raises(PhotonError, match=r"privacy\.ranges: the sum shared/gram/upper reaches .* is 4;"):
            quantizer.encode({"shared/gram/upper": torch.tensor([0.0, value], dtype=torch.float64)})
    total = quantizer.encode({"shared/gram/upper": torch.tensor([-4.0, 4.0], dtype=torch.float64)})
    quantizer.check_sum(total, 1)
    total["shared/gram/upper"][1] += np.uint64(1)
    with pytest.raises(RunError, match="the sum of shared/gram/upper is beyond what 1 silos within 4 each"):
        quantizer.check_sum(total, 1)
    total = quantizer.encode({"shared/gram/upper": torch.tensor([-4.0, 4.0], dtype=torch.float64)})
    total["shared/gram/upper"][0] -= np.uint64(1)
    with pytest.raises(RunError, match="beyond what 1 silos"):
        quantizer.check_sum(total, 1)


def test_a_mask_of_64_bits_is_the_keystream_and_looks_like_nothing() -> None:
    key = bytes(range(32))
    total = {"b": np.zeros((2, 3), np.uint64), "a": np.zeros(300_000, np.uint64)}
    add_mask(total, key)
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 300_006))
    words = np.frombuffer(stream, "<u8")
    np.testing.assert_array_equal(total["a"], words[:300_000])
    np.testing.assert_array_equal(total["b"], words[300_000:].reshape(2, 3))
    seen = np.bincount((total["a"] >> np.uint64(56)).astype(np.int64), minlength=256)
    statistic = float(((seen - 300_000 / 256) ** 2 / (300_000 / 256)).sum())
    assert abs(statistic - 255) < 5 * (2 * 255) ** 0.5
    add_mask(total, key, subtract=True)
    assert not any(values.any() for values in total.values())
    for dtype in (torch.int32, torch.int64):
        sent = as_sent(np.array([0, 2**31 + 5], dtype=UNSIGNED[dtype]))
        assert sent.dtype == dtype
        assert as_integers(sent)[1] == 2**31 + 5
