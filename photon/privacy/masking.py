"""The arithmetic of secure aggregation: updates and sums as integers, and masks that hide them.

Updates, whose mean is asked for: a coordinate x, |x| ≤ R, becomes q = round((x + R) / s) with
s = 2 R / (2^b − 1), an integer of b bits. Sums are taken modulo 2^32. With n participants b = 32 − ⌈log₂ n⌉,
so n · (2^b − 1) < 2^32: a sum of all never wraps, and is exact. What is lost is the rounding, at most s / 2
in each update (`Quantizer`).

Sums of float64: x, |x| ≤ R, becomes the fixed-point number q = round(x 2^f) in two's complement, with
f = 62 − ⌈log₂ n⌉ − ⌈log₂ R⌉. Sums are taken modulo 2^64, so one of all never wraps, and is exact.
What is lost of a sum S is n s / 2 with s = 2^−f, and 2^−53 |S| where it becomes a float64 again
(`FixedPoint`).

A mask is the keystream of AES-256 in counter mode under a key that is used for this one mask: uniform over
the ring, so what it is added to is uniform, too, for everybody who lacks the key.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from photon.errors import PhotonError, RunError

#: Bits of the ring of updates.
RING_BITS = 32
#: The logarithm of what a sum in the ring of 64 bits stays within, beside its sign.
SUM_BITS = 62
#: Largest magnitude of a silo's part in a sum, where nothing else is said.
SUM_RANGE = 2.0**20
#: Fewest bits of a coordinate that are worth sending.
FEWEST_BITS = 16
#: Words of a keystream that are made at a time.
_BLOCK = 2**18

#: Name of a tensor to integers of its shape: modulo 2^32 as uint32, or modulo 2^64 as uint64.
Integers = dict[str, np.ndarray]
#: The same as they travel, in signed integers of as many bits.
SIGNED = {np.dtype(np.uint32): np.int32, np.dtype(np.uint64): np.int64}
UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}


class Quantizer:
    """Turn updates into integers whose sum over a cohort is exact.

    Parameters
    ----------
    limit
        R: largest magnitude of a coordinate.
    cohort
        n: most summands.

    Raises
    ------
    PhotonError
        If the sum of so many would overflow the ring, or leave too few bits.
    """

    def __init__(self, limit: float, cohort: int) -> None:
        self.bits = RING_BITS - max(0, cohort - 1).bit_length()
        if self.bits < FEWEST_BITS:
            raise PhotonError(
                f"privacy.secure_aggregation: a cohort of {cohort} leaves {self.bits} bits for a coordinate; "
                f"draw at most {2 ** (RING_BITS - FEWEST_BITS)} silos with cohort="
            )
        self._limit = limit
        self._levels = 2**self.bits - 1

    @property
    def step(self) -> float:
        """The distance s of two neighbouring integers, in units of the update."""
        return 2 * self._limit / self._levels

    def encode(self, update: Mapping[str, torch.Tensor]) -> Integers:
        """Return an update as integers.

        Raises
        ------
        PhotonError
            If a coordinate is beyond the limit: to cut it off would change the sum without a word.
        """
        encoded = {}
        for name, tensor in update.items():
            values = tensor.detach().cpu().double().numpy()
            largest = float(np.abs(values).max(initial=0))
            # Written so that NaN is refused, too.
            if not largest <= self._limit:
                raise PhotonError(
                    f"privacy.range={self._limit:g}: the update of {name} reaches {largest:g}; raise it"
                )
            encoded[name] = np.array(np.rint((values + self._limit) / self.step), dtype=np.uint32)
        return encoded

    def check_sum(self, total: Integers, count: int) -> None:
        """Check that a sum is one of ``count`` updates' integers.

        Then each coordinate of its mean lies in [−R, R], whatever was added by somebody who lies.

        Raises
        ------
        RunError
            If a coordinate is beyond what so many can reach.
        """
        most = count * self._levels
        for name, values in total.items():
            if int(values.max(initial=0)) > most:
                raise RunError(
                    f"secure aggregation: the sum of {name} is beyond what {count} updates within "
                    f"privacy.range={self._limit:g} can reach: one of them is not what it should be, and "
                    "masks hide which"
                )

    def decode(self, total: Integers, count: int) -> dict[str, torch.Tensor]:
        """Return the mean of ``count`` updates from the sum of their integers, float32."""
        return {
            name: torch.as_tensor(values * (self.step / count) - self._limit).float()
            for name, values in total.items()
        }


class FixedPoint:
    """Turn sums of float64 into integers modulo 2^64 whose sum over a cohort is exact.

    Parameters
    ----------
    limits
        R: name of a tensor to the largest magnitude of a value that one silo may have in it.
    cohort
        n: most summands.
    """

    def __init__(self, limits: Mapping[str, float], cohort: int) -> None:
        self._limits = dict(limits)
        self._bits = {name: self._bits_of(limit, cohort) for name, limit in limits.items()}

    @staticmethod
    def _bits_of(limit: float, cohort: int) -> int:
        # R = m 2^e with m in [1/2, 1), so ⌈log₂ R⌉ is e, and of a power of two e − 1.
        mantissa, exponent = math.frexp(limit)
        return SUM_BITS - max(0, cohort - 1).bit_length() - exponent + (mantissa == 0.5)

    def step(self, name: str) -> float:
        """Return the distance s of two neighbouring numbers of a tensor, in its units."""
        return math.ldexp(1.0, -self._bits[name])

    def encode(self, sums: Mapping[str, torch.Tensor]) -> Integers:
        """Return sums as integers, uint64 with the bits of int64.

        Raises
        ------
        PhotonError
            If a value is beyond its limit: to cut it off would change the sum without a word.
        """
        encoded = {}
        for name, tensor in sums.items():
            values = tensor.detach().cpu().double().numpy()
            largest, limit = float(np.abs(values).max(initial=0)), self._limits[name]
            # Written so that NaN is refused, too.
            if not largest <= limit:
                raise PhotonError(
                    f"privacy.ranges: the sum {name} reaches {largest:g}, and its range is {limit:g}; raise "
                    "it"
                )
            # A power of two moves no bit of a float64, and from 2^53 on it is an integer anyway.
            encoded[name] = np.array(np.rint(np.ldexp(values, self._bits[name])), np.int64).view(np.uint64)
        return encoded

    def check_sum(self, total: Integers, count: int) -> None:
        """Check that a sum is one of ``count`` silos' integers.

        Raises
        ------
        RunError
            If a value is beyond what so many can reach.
        """
        for name, values in total.items():
            most = count * (round(math.ldexp(self._limits[name], self._bits[name])))
            signed = values.view(np.int64)
            if int(signed.max(initial=0)) > most or int(signed.min(initial=0)) < -most:
                raise RunError(
                    f"secure aggregation: the sum of {name} is beyond what {count} silos within "
                    f"{self._limits[name]:g} each can reach: one of them is not what it should be, and masks "
                    "hide which"
                )

    def decode(self, total: Integers, count: int) -> dict[str, torch.Tensor]:
        """Return the sum of ``count`` silos, float64."""
        return {
            name: torch.as_tensor(np.ldexp(values.view(np.int64).astype(np.float64), -self._bits[name]))
            for name, values in total.items()
        }


def as_sent(values: np.ndarray) -> torch.Tensor:
    """Return integers of a ring as they travel: signed ones of as many bits."""
    return torch.from_numpy(values.view(SIGNED[values.dtype]))


def as_integers(tensor: torch.Tensor) -> np.ndarray:
    """Return what travelled as integers of a ring, in the tensor's memory."""
    return tensor.numpy().view(UNSIGNED[tensor.dtype])


def add(total: Integers, other: Integers) -> None:
    """Add ``other`` to ``total``, modulo the ring's size and in place."""
    for name in total:
        total[name] += other[name]


def add_mask(total: Integers, key: bytes, *, subtract: bool = False) -> None:
    """Add the mask of a key of 32 bytes to ``total``, modulo the ring's size and in place.

    The keystream runs through the tensors in name order, a little-endian word for each value.
    """
    # The key is used once, so the counter may begin at zero.
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * _BLOCK)
    for name in sorted(total):
        flat = total[name].reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            words = np.frombuffer(stream.update(zeros[: block.nbytes]), dtype=block.dtype.newbyteorder("<"))
            if subtract:
                block -= words
            else:
                block += words
