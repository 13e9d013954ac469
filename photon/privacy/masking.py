"""The arithmetic of secure aggregation: updates as integers, and masks that hide them.

A coordinate x of an update, |x| ≤ R, becomes q = round((x + R) / s) with s = 2 R / (2^b − 1), an integer of b
bits. Sums are taken modulo 2^32. With n participants b = 32 − ⌈log₂ n⌉, so n · (2^b − 1) < 2^32: a sum of all
never wraps, and is exact. What is lost is the rounding, at most s / 2 in each update.

A mask is the keystream of AES-256 in counter mode under a key that is used for this one mask: uniform over
the ring, so what it is added to is uniform, too, for everybody who lacks the key.
"""

from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from photon.errors import PhotonError, RunError

#: Bits of the ring.
RING_BITS = 32
#: Fewest bits of a coordinate that are worth sending.
FEWEST_BITS = 16
#: Words of a keystream that are made at a time.
_BLOCK = 2**18

#: Parameter name to integers modulo 2^32, uint32 of the parameter's shape.
Integers = dict[str, np.ndarray]


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

    def decode_mean(self, total: Integers, count: int) -> dict[str, torch.Tensor]:
        """Return the mean of ``count`` updates from the sum of their integers, float32."""
        return {
            name: torch.as_tensor(values * (self.step / count) - self._limit).float()
            for name, values in total.items()
        }


def add(total: Integers, other: Integers) -> None:
    """Add ``other`` to ``total``, modulo 2^32 and in place."""
    for name in total:
        total[name] += other[name]


def add_mask(total: Integers, key: bytes, *, subtract: bool = False) -> None:
    """Add the mask of a key of 32 bytes to ``total``, modulo 2^32 and in place.

    The keystream runs through the parameters in name order.
    """
    # The key is used once, so the counter may begin at zero.
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(4 * _BLOCK)
    for name in sorted(total):
        flat = total[name].reshape(-1)
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            words = np.frombuffer(stream.update(zeros[: 4 * len(block)]), dtype="<u4")
            if subtract:
                block -= words
            else:
                block += words
