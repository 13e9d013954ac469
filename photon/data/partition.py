"""Who gets which documents: by source, independent and identically distributed, or a Dirichlet mixture."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from photon.config.tree import SILO_NAME
from photon.data.documents import Document
from photon.data.spool import joined, taken
from photon.errors import PhotonError

PartitionKind = Literal["by-source", "iid", "dirichlet", "field"]


@dataclass(frozen=True)
class Partition:
    """A parsed partition.

    Attributes
    ----------
    kind
        "by-source": a silo per source. "iid": all documents shuffled over ``silos`` silos. "dirichlet": each
        of ``silos`` silos draws a mixture over the sources from Dirichlet(``alpha``). "field": a silo per
        value of the field ``field`` of JSON lines or parquet rows.
    """

    kind: PartitionKind
    silos: int = 0
    alpha: float = 0.0
    field: str = ""


def parse_partition(text: str) -> Partition:
    """Parse ``by-source``, ``iid:N``, ``dirichlet:N:ALPHA`` or ``field:NAME``.

    Raises
    ------
    PhotonError
        If ``text`` is none of these, with N at least 1 and ALPHA above 0.
    """
    kind, *values = text.split(":")
    try:
        if kind == "by-source" and not values:
            return Partition("by-source")
        if kind == "field" and len(values) == 1 and values[0]:
            return Partition("field", field=values[0])
        if kind == "iid" and len(values) == 1 and int(values[0]) >= 1:
            return Partition("iid", silos=int(values[0]))
        if kind == "dirichlet" and len(values) == 2 and int(values[0]) >= 1:
            alpha = float(values[1])
            if 0 < alpha < float("inf"):
                return Partition("dirichlet", silos=int(values[0]), alpha=alpha)
    except ValueError:
        pass
    raise PhotonError(
        f"partition {text!r} is not understood: use by-source, iid:N, dirichlet:N:ALPHA or field:NAME "
        "(N a whole number from 1, ALPHA above 0), for instance iid:4 or dirichlet:8:0.5"
    )


def partition_documents(
    sources: Mapping[str, Sequence[Document]], partition: Partition, seed: int
) -> dict[str, Sequence[Document]]:
    """Give every document to exactly one silo.

    Parameters
    ----------
    sources
        Documents by source.
    seed
        Decides the shuffles and the mixtures.

    Returns
    -------
    dict
        Documents by silo, none empty.

    Raises
    ------
    PhotonError
        If there are fewer documents than silos, or two values of a field give the same silo name.
    """
    if partition.kind == "by-source":
        return {name: documents for name, documents in sources.items() if documents}
    if partition.kind == "field":
        return _by_field(sources)
    count = sum(len(documents) for documents in sources.values())
    if count < partition.silos:
        raise PhotonError(
            f"{count} documents cannot fill {partition.silos} silos: give more documents or fewer silos"
        )
    rng = np.random.default_rng([seed, 1])
    if partition.kind == "iid":
        parts = _iid(sources, partition.silos, rng)
    else:
        parts = _dirichlet(sources, partition.silos, partition.alpha, rng)
    width = len(str(partition.silos - 1))
    return {f"silo-{index:0{width}d}": part for index, part in enumerate(parts)}


def _by_field(sources: Mapping[str, Sequence[Document]]) -> dict[str, Sequence[Document]]:
    whole = joined(sources[source] for source in sorted(sources))
    places: dict[str, list[int]] = {}
    names = SiloNames()
    for place, document in enumerate(whole):
        places.setdefault(names.of(document.source), []).append(place)
    return {name: taken(whole, its) for name, its in places.items()}


def check_silo_name(name: str) -> None:
    """Refuse what cannot be the name of a silo.

    Raises
    ------
    PhotonError
        If it cannot be the name of a folder.
    """
    if not re.fullmatch(SILO_NAME, name):
        raise PhotonError(
            f"silo name {name!r} cannot be a folder name: use letters, digits and . _ + - (at most 64)"
        )


class SiloNames:
    """Names of silos for the values of a field: two values that would give one name are an error."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def of(self, value: str) -> str:
        """Return the name for a value.

        Raises
        ------
        PhotonError
            If it cannot be a folder name, or is that of another value already.
        """
        name = folder_name(value)
        other = self._values.setdefault(name, value)
        if other != value:
            raise PhotonError(
                f"the field's values {other!r} and {value!r} give the same silo name {name!r}: "
                "rename one of them"
            )
        return name


def folder_name(value: str) -> str:
    """Make a silo name of any text: what a folder name cannot hold becomes ``-``.

    Raises
    ------
    PhotonError
        If nothing is left.
    """
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", value).strip("-.")[:64]
    if not re.fullmatch(SILO_NAME, name):
        raise PhotonError(
            f"{value!r} cannot be made a silo name: it needs a letter or a digit from a to z, 0 to 9"
        )
    return name


def _iid(
    sources: Mapping[str, Sequence[Document]], silos: int, rng: np.random.Generator
) -> list[Sequence[Document]]:
    documents = joined(sources[name] for name in sorted(sources))
    order = rng.permutation(len(documents))
    return [taken(documents, order[silo::silos]) for silo in range(silos)]


def _dirichlet(
    sources: Mapping[str, Sequence[Document]], silos: int, alpha: float, rng: np.random.Generator
) -> list[Sequence[Document]]:
    """Fill silos of about equal size, each by its own mixture, with every document used once.

    Silo k draws a mixture p_k ~ Dirichlet(alpha, …, alpha) over the sources. Mixtures alone would ask for
    more of one source than there is; iterative proportional fitting finds the counts nearest to them (in
    relative entropy) whose rows are equal and whose columns are the sources' sizes.
    """
    names = [name for name in sorted(sources) if sources[name]]
    sizes = np.array([len(sources[name]) for name in names])
    # The floor keeps the fitting possible where no silo wants a source.
    share = rng.dirichlet([alpha] * len(names), size=silos) + 1e-9
    for _ in range(500):
        share *= (sizes.sum() / silos / share.sum(axis=1))[:, None]
        share *= sizes / share.sum(axis=0)
    parts: list[list[int]] = [[] for _ in range(silos)]
    before = 0
    for column, size in enumerate(sizes):
        order = rng.permutation(size)
        ends = np.rint(np.cumsum(share[:, column])).astype(int)
        for part, chosen in zip(parts, np.split(order, ends[:-1]), strict=True):
            part.extend(int(place) + before for place in chosen)
        before += int(size)
    for part in parts:
        if not part:  # Rounding may leave nothing where documents are few.
            part.append(max(parts, key=len).pop())
    whole = joined(sources[name] for name in names)
    return [taken(whole, part) for part in parts]
