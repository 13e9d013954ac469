"""Integers that sum without wrapping, and masks that look like nothing."""

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from photon.errors import PhotonError
from photon.privacy.masking import Quantizer, add, add_mask


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
    mean = quantizer.decode_mean(total, count)
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
