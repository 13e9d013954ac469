"""The split into train and validation, so that nothing lies on both sides.

The split is by document, and near-duplicates go to one side together, across all silos. Two documents count
as near-duplicates when the sets of their three-word shingles, without regard to case, digits, punctuation and
white space, overlap by some 60 % or more (Jaccard). They are found by MinHash with locality-sensitive
hashing: 24 bands of 5 hashes meet for 99.99 % of pairs that overlap by 80 %, for 98.7 % at 70 % and for 5.7 %
at 30 %, and a meeting counts when the estimated overlap is at least 55 %. Clusters are what such pairs
connect. A text that contains another among as much of its own is no near-duplicate of it.

Texts that are made by one template, such as sums and logs, may differ in their digits alone: digits can count
as words, or nothing but equal texts as duplicates.
"""

import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from photon.data.documents import Document
from photon.errors import PhotonError

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

# What to do where too much is alike.
_LESS: dict[Comparison, str] = {
    "words": "--near-duplicates digits (digits count as words) or none",
    "digits": "--near-duplicates none",
    "none": "another --partition",
}

# How far over its share a silo's validation may go to keep a cluster whole.
_TOLERANCE = 1.25


def drop_exact_duplicates(
    sources: dict[str, list[Document]],
) -> tuple[dict[str, list[Document]], dict[str, int]]:
    """Keep the first of equal texts, in the order of the sources' names, within the whole corpus.

    Returns
    -------
    tuple
        The documents kept by source, and the number left out by source.
    """
    seen: set[bytes] = set()
    kept: dict[str, list[Document]] = {}
    dropped: dict[str, int] = {}
    for name in sorted(sources):
        kept[name] = []
        for document in sources[name]:
            key = hashlib.blake2b(document.text.strip().encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                kept[name].append(document)
        dropped[name] = len(sources[name]) - len(kept[name])
    return kept, dropped


def split_documents(
    silos: dict[str, list[Document]],
    validation_fraction: float,
    smallest_validation: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    *,
    comparison: Comparison = "words",
) -> dict[str, tuple[list[Document], list[Document]]]:
    """Split every silo into train and validation documents.

    Clusters of near-duplicates are walked in the order of a hash of their content, and each goes to
    validation if every silo that it touches still has room for it there.

    Parameters
    ----------
    validation_fraction
        Share of a silo's bytes that validation should hold; above 0, below 1.
    smallest_validation
        Bytes that a silo's validation should hold at least, if half of the silo is not less.
    seed
        Mixed into the hash.
    advance
        Called with the number of documents compared so far since the last call, for a progress bar.
    comparison
        What near-duplicates are: documents alike in their "words", in words and "digits", or "none".

    Returns
    -------
    dict
        For each silo (train documents, validation documents), in the order given, none empty.

    Raises
    ------
    PhotonError
        If a silo cannot be split because all its documents are one cluster.
    """
    names = sorted(silos)
    documents = [document for name in names for document in silos[name]]
    owners = [name for name in names for _ in silos[name]]
    cluster_of = cluster_near_duplicates([document.text for document in documents], advance, comparison)
    chosen = _choose(documents, owners, cluster_of, validation_fraction, smallest_validation, seed)
    split: dict[str, tuple[list[Document], list[Document]]] = {name: ([], []) for name in names}
    for document, owner, cluster in zip(documents, owners, cluster_of, strict=True):
        split[owner][cluster in chosen].append(document)
    for name, (train, validation) in split.items():
        if not train or not validation:
            if len(silos[name]) == 1:
                raise PhotonError(
                    f"silo {name!r} has one document, and train and validation take whole ones: give it "
                    "several files, or a .jsonl file with a document in each line"
                )
            raise PhotonError(
                f"silo {name!r} cannot be split into train and validation: its {len(silos[name])} documents "
                "are near-duplicates of each other or of another silo's; give it more, different documents, "
                f"or compare less with {_LESS[comparison]}"
            )
    return split


def _choose(
    documents: Sequence[Document],
    owners: Sequence[str],
    cluster_of: Sequence[int],
    fraction: float,
    smallest: int,
    seed: int,
) -> set[int]:
    """Choose the clusters that go to validation."""
    keys: dict[int, tuple[bytes, bytes]] = {}
    sizes: dict[int, dict[str, int]] = {}
    totals: dict[str, int] = dict.fromkeys(owners, 0)
    for document, owner, cluster in zip(documents, owners, cluster_of, strict=True):
        size = len(document.text.encode())
        key = _content_hash(document.text, seed)
        keys[cluster] = min(keys.get(cluster, key), key)
        silo_sizes = sizes.setdefault(cluster, {})
        silo_sizes[owner] = silo_sizes.get(owner, 0) + size
        totals[owner] += size
    wanted = {name: max(fraction * total, min(smallest, total / 2)) for name, total in totals.items()}
    taken = dict.fromkeys(totals, 0)
    chosen: set[int] = set()

    def take(cluster: int) -> None:
        chosen.add(cluster)
        for name, size in sizes[cluster].items():
            taken[name] += size

    order = sorted(keys, key=lambda cluster: (keys[cluster], cluster))
    for cluster in order:
        fits = all(taken[name] + size <= _TOLERANCE * wanted[name] for name, size in sizes[cluster].items())
        if fits and any(taken[name] < wanted[name] for name in sizes[cluster]):
            take(cluster)
    # A silo of few large clusters may have got too little: it gives its smallest, but never its last.
    for name in sorted(totals):
        rest = sorted(
            (c for c in order if name in sizes[c] and c not in chosen),
            key=lambda c: (sizes[c][name], keys[c]),
        )
        while len(rest) > 1 and taken[name] < min(smallest, wanted[name]):
            take(rest.pop(0))
    return chosen


def cluster_near_duplicates(
    texts: Sequence[str],
    advance: Callable[[int], None] = lambda _: None,
    comparison: Comparison = "words",
) -> list[int]:
    """Find for each text the cluster of near-duplicates that it belongs to, if only its own.

    Returns
    -------
    list of int
        For each text the index of the first text of its cluster.
    """
    parent = list(range(len(texts)))
    if comparison == "none":
        advance(len(texts))
        return parent

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    word, hash_of = _WORD[comparison], _WordHashes()
    signatures = np.empty((len(texts), BANDS * ROWS), dtype=np.uint32)
    for index, text in enumerate(texts):
        signatures[index] = _signature(_shingles(text, word, hash_of))
        advance(1)
    for band in range(BANDS):
        first: dict[bytes, int] = {}
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        for index in range(len(texts)):
            other = first.setdefault(rows[index].tobytes(), index)
            if other != index and np.mean(signatures[index] == signatures[other]) >= SIMILAR:
                low, high = sorted((root(index), root(other)))
                parent[high] = low
    return [root(index) for index in range(len(texts))]


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
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), 4096):
        values = _A[:, None] * shingles[None, start : start + 4096] + _B[:, None]
        np.minimum(least, values.min(axis=1), out=least)
    return (least >> np.uint64(32)).astype(np.uint32)


_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
# Multiply-shift hashing: odd multipliers, arithmetic modulo 2^64, the high half of the result.
_A, _B = np.random.default_rng(20190814).integers(
    0, 2**64, size=(2, BANDS * ROWS), dtype=np.uint64
) | np.uint64(1)


def _content_hash(text: str, seed: int) -> tuple[bytes, bytes]:
    """Hash the normalised text (case, digits and white space do not count), and the text itself.

    The second decides between texts of one template, which would otherwise go by their order.
    """
    normal = " ".join(re.sub(r"\d+", "0", text.lower()).split())
    key = str(seed).encode()
    first, second = (
        hashlib.blake2b(one.encode(), digest_size=16, key=key).digest() for one in (normal, text)
    )
    return first, second
