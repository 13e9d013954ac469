"""The split into train and validation, so that nothing lies on both sides.

The split is by document, and near-duplicates (`photon.data.alike`) go to one side together, across all silos.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from photon.data.alike import Comparison, Looks, clusters, look
from photon.data.documents import Document
from photon.data.spool import joined, sizes_of, taken
from photon.errors import PhotonError

# What to do where too much is alike.
_LESS: dict[Comparison, str] = {
    "words": "--near-duplicates digits (digits count as words) or none",
    "digits": "--near-duplicates none",
    "none": "another --partition",
}

# How far over its share a silo's validation may go to keep a cluster whole.
_TOLERANCE = 1.25

#: Looks at documents one after the other, and returns what it saw of some, then of the next.
Look = Callable[[Sequence[Document], Comparison, int], Sequence[Looks]]


def drop_exact_duplicates(
    sources: Mapping[str, Sequence[Document]],
) -> tuple[dict[str, Sequence[Document]], dict[str, int]]:
    """Keep the first of equal texts, in the order of the sources' names, within the whole corpus.

    Returns
    -------
    tuple
        The documents kept by source, and the number left out by source.
    """
    seen: set[bytes] = set()
    kept: dict[str, Sequence[Document]] = {}
    dropped: dict[str, int] = {}
    for name in sorted(sources):
        places = []
        for place, document in enumerate(sources[name]):
            key = hashlib.blake2b(document.text.strip().encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                places.append(place)
        kept[name] = taken(sources[name], places)
        dropped[name] = len(sources[name]) - len(places)
    return kept, dropped


def look_here(documents: Sequence[Document], comparison: Comparison, seed: int) -> Sequence[Looks]:
    """Look at all documents in this process."""
    return [look((document.text for document in documents), len(documents), comparison, seed)]


def split_documents(
    silos: Mapping[str, Sequence[Document]],
    validation_fraction: float,
    smallest_validation: int,
    seed: int,
    *,
    comparison: Comparison = "words",
    look: Look = look_here,
) -> dict[str, tuple[Sequence[Document], Sequence[Document]]]:
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
    comparison
        What near-duplicates are: documents alike in their "words", in words and "digits", or "none".
    look
        Looks at the documents.

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
    documents = joined(silos[name] for name in names)
    owners = np.repeat(np.arange(len(names)), [len(silos[name]) for name in names])
    looks = look(documents, comparison, seed)
    cluster_of = clusters(looks)
    keys = np.concatenate([one.keys for one in looks])
    chosen = _choose(
        sizes_of(documents), owners, cluster_of, keys, names, validation_fraction, smallest_validation
    )
    split: dict[str, tuple[Sequence[Document], Sequence[Document]]] = {}
    for owner, name in enumerate(names):
        held_out = chosen[owners == owner]
        train, validation = (taken(silos[name], np.flatnonzero(side)) for side in (~held_out, held_out))
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
        split[name] = (train, validation)
    return split


def _choose(
    sizes: np.ndarray,
    owners: np.ndarray,
    cluster_of: np.ndarray,
    keys: np.ndarray,
    names: Sequence[str],
    fraction: float,
    smallest: int,
) -> np.ndarray:
    """Choose the clusters that go to validation: of each document whether it does, bool."""
    order, shares = _in_order(sizes, owners, cluster_of, keys, len(names))
    totals = [int(sizes[owners == owner].sum()) for owner in range(len(names))]
    wanted = [max(fraction * total, min(smallest, total / 2)) for total in totals]
    taken_bytes = [0] * len(names)
    chosen: set[int] = set()

    def take(place: int) -> None:
        chosen.add(place)
        for owner, size in shares(place):
            taken_bytes[owner] += size

    for place in range(len(order)):
        parts = shares(place)
        fits = all(taken_bytes[owner] + size <= _TOLERANCE * wanted[owner] for owner, size in parts)
        if fits and any(taken_bytes[owner] < wanted[owner] for owner, _ in parts):
            take(place)
    # A silo of few large clusters may have got too little: it gives its smallest, but never its last.
    for owner in range(len(names)):
        if taken_bytes[owner] >= min(smallest, wanted[owner]):
            continue
        own = {place: dict(shares(place)).get(owner) for place in range(len(order)) if place not in chosen}
        rest = sorted((size, place) for place, size in own.items() if size is not None)
        while len(rest) > 1 and taken_bytes[owner] < min(smallest, wanted[owner]):
            take(rest.pop(0)[1])
    return np.isin(cluster_of, order[sorted(chosen)])


def _in_order(
    sizes: np.ndarray, owners: np.ndarray, cluster_of: np.ndarray, keys: np.ndarray, silos: int
) -> tuple[np.ndarray, Callable[[int], list[tuple[int, int]]]]:
    """Return the clusters by their least key, and what gives a place's (silo, bytes) pairs."""
    words = np.ascontiguousarray(keys).view(">u8")
    by_key = np.lexsort((cluster_of, *(words[:, column] for column in reversed(range(words.shape[1])))))
    roots, first = np.unique(cluster_of[by_key], return_index=True)
    order = roots[np.argsort(first)]
    place_of = np.empty(len(cluster_of), dtype=np.int64)
    place_of[order] = np.arange(len(order))
    pairs, pair_of = np.unique(place_of[cluster_of] * silos + owners, return_inverse=True)
    parts = np.zeros(len(pairs), dtype=np.int64)
    np.add.at(parts, pair_of, sizes)
    starts = np.searchsorted(pairs // silos, np.arange(len(order) + 1))

    def shares(place: int) -> list[tuple[int, int]]:
        span = slice(starts[place], starts[place + 1])
        return list(zip((pairs[span] % silos).tolist(), parts[span].tolist(), strict=True))

    return order, shares
