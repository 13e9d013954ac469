"""Near-duplicates: what of each document is compared, and the clusters that are found.

Two documents count as near-duplicates when the sets of their three-word shingles, without regard to case,
digits, punctuation and white space, overlap by some 60 % or more (Jaccard). They are found by MinHash with
locality-sensitive hashing: 24 bands of 5 hashes meet for 99.99 % of pairs that overlap by 80 %, for 98.7 %
at 70 % and for 5.7 % at 30 %, and a meeting counts when the estimated overlap is at least 55 %. Clusters are
what such pairs connect. A text that contains another among as much of its own is no near-duplicate of it.

Texts that are made by one template, such as sums and logs, may differ in their digits alone: digits can count
as words, or nothing but equal texts as duplicates.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

BANDS = 24
ROWS = 5
SHINGLE = 3
SIMILAR = 0.55

Comparison = Literal["words", "digits", "none"]

# Scripts without spaces between words: every character counts as a word.
_CHARACTER = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
_WORD: dict[Comparison, re.Pattern[str]] = {
    "words": re.compile(rf"{_CHARACTER}|[^\W\d]+"),
    "digits": re.compile(rf"{_CHARACTER}|[^\W\d]+|\d+"),
}
# Shingles hashed at a time: with 120 hashes of 8 bytes each, half a megabyte, which a core's own cache holds.
_BLOCK = 512
# Pairs whose signatures are compared at a time.
_PAIRS = 2**16


@dataclass(frozen=True)
class Looks:
    """What is compared of some documents.

    Attributes
    ----------
    bands
        The MinHash signatures by band: uint32, (BANDS, documents, ROWS); no band if nothing is compared.
    keys
        Hashes of the content, two of 16 bytes each: of the text without regard to case, digits and white
        space, and, to decide between texts of one template, of the text itself: uint8, (documents, 32).
    """

    bands: np.ndarray
    keys: np.ndarray

    def save(self, folder: Path, name: str) -> None:
        """Write both arrays."""
        np.save(folder / f"{name}-bands.npy", self.bands, allow_pickle=False)
        np.save(folder / f"{name}-keys.npy", self.keys, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, name: str) -> "Looks":
        """Read what `save` has written; the bands stay on the disk."""
        bands = np.load(folder / f"{name}-bands.npy", mmap_mode="r")
        return cls(bands, np.load(folder / f"{name}-keys.npy"))


def look(
    texts: Iterable[str],
    count: int,
    comparison: Comparison,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Looks:
    """Look at texts one by one.

    Parameters
    ----------
    texts, count
        The texts, and how many they are.
    comparison
        What near-duplicates are: documents alike in their "words", in words and "digits", or "none".
    seed
        Mixed into the hashes of the content.
    advance
        Called with 1 for each.
    """
    hash_of = _WordHashes()
    bands = np.empty((BANDS if comparison != "none" else 0, count, ROWS), dtype=np.uint32)
    keys = np.empty((count, 32), dtype=np.uint8)
    for index, text in enumerate(texts):
        if comparison != "none":
            bands[:, index] = _signature(_shingles(text, _WORD[comparison], hash_of)).reshape(BANDS, ROWS)
        keys[index] = np.frombuffer(_content_hash(text, seed), dtype=np.uint8)
        advance(1)
    return Looks(bands, keys)


def clusters(parts: Sequence[Looks]) -> np.ndarray:
    """Find for each document the cluster of near-duplicates that it belongs to, if only its own.

    Parameters
    ----------
    parts
        What was seen of the documents, some after the others.

    Returns
    -------
    numpy.ndarray
        For each document the index of the first one of its cluster, int64.
    """
    count = sum(len(part.keys) for part in parts)
    bands = len(parts[0].bands) if parts else 0
    pairs = _alike([_meetings(_band(parts, band)) for band in range(bands)], parts)
    parent = np.arange(count)

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    # A parent comes before its children, so that its own root is known already.
    for index in np.flatnonzero(parent != np.arange(count)):
        parent[index] = parent[parent[index]]
    return parent


def _band(parts: Sequence[Looks], band: int) -> np.ndarray:
    """Return a band of all documents: uint32, (documents, ROWS)."""
    return np.concatenate([part.bands[band] for part in parts])


def _meetings(band: np.ndarray) -> np.ndarray:
    """Pair each document with the first one that has the same band: int64, (pairs, 2)."""
    whole = np.ascontiguousarray(band).view(np.dtype((np.void, band.dtype.itemsize * ROWS))).reshape(-1)
    _, first, group = np.unique(whole, return_index=True, return_inverse=True)
    others = first[group]
    place = np.flatnonzero(others != np.arange(len(band)))
    return np.stack([place, others[place]], axis=1)


def _alike(meetings: Sequence[np.ndarray], parts: Sequence[Looks]) -> np.ndarray:
    """Return those of the pairs that are alike enough, each once: int64, (pairs, 2)."""
    if not meetings:
        return np.empty((0, 2), dtype=np.int64)
    pairs = np.unique(np.concatenate(meetings), axis=0)
    equal = np.zeros(len(pairs), dtype=np.int64)
    for number in range(len(meetings)):
        band = _band(parts, number)
        for start in range(0, len(pairs), _PAIRS):
            block = pairs[start : start + _PAIRS]
            equal[start : start + _PAIRS] += (band[block[:, 0]] == band[block[:, 1]]).sum(axis=1)
    return pairs[equal / (BANDS * ROWS) >= SIMILAR]


class _WordHashes(dict[str, int]):
    """Hashes of words, remembered. CRC-32: Python's own hash of a string differs between processes."""

    def __missing__(self, word: str) -> int:
        value = self[word] = zlib.crc32(word.encode())
        return value


def _shingles(text: str, word: re.Pattern[str], hash_of: _WordHashes) -> np.ndarray:
    """Hash every run of three words: uint64, at least one value."""
    words = word.findall(text.lower())
    if len(words) < SHINGLE:
        # Too few words to compare: equal words count as the same, or equal characters if there is no word.
        alone = " ".join(words) or "".join(text.split())
        return np.array([zlib.crc32(alone.encode())], dtype=np.uint64)
    hashes = np.array([hash_of[one] for one in words], dtype=np.uint64)
    mixed = hashes[: len(hashes) - SHINGLE + 1].copy()
    for offset in range(1, SHINGLE):
        mixed *= _MULTIPLIER
        mixed ^= hashes[offset : len(hashes) - SHINGLE + 1 + offset]
    # Finaliser of splitmix64: neighbouring values are spread over all 64 bits.
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MULTIPLIER
    mixed ^= mixed >> np.uint64(27)
    return mixed


def _signature(shingles: np.ndarray) -> np.ndarray:
    """Return the MinHash signature: for each of BANDS * ROWS hash functions the least value, uint32."""
    # A set has no second copy of a shingle, and code and tables repeat many.
    shingles = np.unique(shingles)
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        values = _A[:, None] * shingles[None, start : start + _BLOCK]
        values += _B[:, None]
        np.minimum(least, values.min(axis=1), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
# Multiply-shift hashing: odd multipliers, arithmetic modulo 2^64, the high half of the result.
_A, _B = np.random.default_rng(20190814).integers(
    0, 2**64, size=(2, BANDS * ROWS), dtype=np.uint64
) | np.uint64(1)


def _content_hash(text: str, seed: int) -> bytes:
    """Hash the normalised text (case, digits and white space do not count), and the text itself."""
    normal = " ".join(re.sub(r"\d+", "0", text.lower()).split())
    key = str(seed).encode()
    return b"".join(hashlib.blake2b(one.encode(), digest_size=16, key=key).digest() for one in (normal, text))
