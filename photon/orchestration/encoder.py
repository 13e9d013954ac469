"""Vectors of texts: hashed n-grams of characters, or a sentence encoder from a folder."""

import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from photon.models.sentences import Sentences
from photon.orchestration.method import EncoderSection

Encode = Callable[[Sequence[str]], Tensor]
"""Makes vectors of texts: float32 of shape (n, d), in unit length."""

#: Characters of an n-gram.
_LENGTHS = (1, 2, 3, 4)
#: Where a text begins and ends.
_BEGIN, _END = "\x02", "\x03"
#: Characters of a text that are looked at.
_MOST = 20_000


class NGrams:
    """Hashes the n-grams of a text's characters into a vector, each with a sign (feature hashing).

    The same everywhere and always: a checksum decides, and no random state.

    Parameters
    ----------
    size
        d, the numbers of a vector.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors: float32 of shape (n, d), in unit length."""
        made = torch.zeros((len(texts), self.size))
        for row, text in enumerate(texts):
            for gram, count in _grams(text).items():
                code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
                made[row, (code >> 1) % self.size] += count**0.5 * (1 if code & 1 else -1)
        # Of a text whose n-grams cancel out nothing is left; then one number stands for it.
        made[made.norm(dim=1) == 0, 0] = 1.0
        return torch.nn.functional.normalize(made, dim=1)


def _grams(text: str) -> dict[str, int]:
    plain = " ".join(unicodedata.normalize("NFKC", text[:_MOST]).casefold().split())
    framed = f"{_BEGIN}{plain}{_END}"
    counts: dict[str, int] = {}
    for length in _LENGTHS:
        for start in range(len(framed) - length + 1):
            gram = framed[start : start + length]
            if gram not in (_BEGIN, _END):
                counts[gram] = counts.get(gram, 0) + 1
    return counts


def encoder_of(section: EncoderSection) -> NGrams | Sentences:
    """Return the encoder that settings name."""
    return (
        NGrams(section.size) if section.folder is None else Sentences(Path(section.folder), "encoder.folder")
    )
