"""Labels that a model gave to the training windows of a silo: files beside them, and windows chosen by them.

::

    DIR/silos/NAME/given.npy    number of each training window's class, int32 of shape (sequences,)
    DIR/silos/NAME/given.json   the classes, what they are of, and what gave them (class Given)

They belong to whoever has the text: nothing of them is in the manifest, and they never leave.
"""

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.components import nearest
from photon.data.labelled import LONGEST_NAME, MOST_CLASSES
from photon.data.prepared import PreparedData, SiloEntry, SplitName, count_tokens, file_sha256
from photon.errors import PhotonError
from photon.files.atomic import atomic_file, write_text

_MEND = "label the text again with `photon data label`"


class Given(BaseModel):
    """The contents of ``given.json``.

    Attributes
    ----------
    classes
        Names of the classes, in the order of their numbers.
    by
        What gave the labels, in words.
    text_sha256, sha256
        Of the training windows, and of the labels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["photon-given/1"] = "photon-given/1"
    classes: list[str] = Field(min_length=2, max_length=MOST_CLASSES)
    by: str = Field(max_length=1000)
    text_sha256: str
    sha256: str


def given_files(folder: Path, silo: str) -> tuple[Path, Path]:
    """Return where a silo's labels lie, and what is known of them."""
    return folder / "silos" / silo / "given.npy", folder / "silos" / silo / "given.json"


def write_given(data: PreparedData, silo: str, labels: np.ndarray, classes: Sequence[str], by: str) -> None:
    """Write the labels of a silo's training windows; earlier ones are replaced.

    Parameters
    ----------
    labels
        Number of each window's class, (sequences,).
    """
    file, about = given_files(data.path, silo)
    # What is known of them goes first: labels without it are none.
    about.unlink(missing_ok=True)
    with atomic_file(file) as stream:
        np.save(stream, labels.astype(np.int32), allow_pickle=False)
    text = data.manifest.silos[silo].train.sha256
    given = Given(classes=list(classes), by=by, text_sha256=text, sha256=file_sha256(file))
    write_text(about, given.model_dump_json(indent=2) + "\n")


def read_given(data: PreparedData, silo: str) -> tuple[np.ndarray, Given]:
    """Return the labels of a silo's training windows, (sequences,), and what is known of them.

    Raises
    ------
    PhotonError
        If it has none, or they are damaged, or of other text.
    """
    file, about = given_files(data.path, silo)
    if not about.is_file():
        raise PhotonError(f"{silo}: its text in {data.path} has no labels; {_MEND.replace(' again', '')}")
    try:
        given = Given.model_validate_json(about.read_text(encoding="utf-8"))
        labels = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, ValidationError) as error:
        raise PhotonError(f"{about}: cannot be read ({str(error).splitlines()[0]}); {_MEND}") from None
    entry = data.manifest.silos[silo].train
    if given.text_sha256 != entry.sha256:
        raise PhotonError(f"{about}: these labels are of other text than {silo} has now; {_MEND}")
    whole = labels.shape == (entry.sequences,) and labels.dtype == np.int32
    if not whole or file_sha256(file) != given.sha256:
        raise PhotonError(f"{file}: not what was written; {_MEND}")
    if int(labels.min()) < 0 or int(labels.max()) >= len(given.classes):
        raise PhotonError(f"{file}: a label is of none of the {len(given.classes)} classes; {_MEND}")
    if any(len(name) > LONGEST_NAME or not name.isprintable() for name in given.classes):
        raise PhotonError(
            f"{about}: a class has no printable name of up to {LONGEST_NAME} characters; {_MEND}"
        )
    return labels, given


@dataclass(frozen=True)
class Choice:
    """Which training windows of a silo are read, by their labels.

    Attributes
    ----------
    left_out
        Labels whose windows are not.
    weights
        Label to a weight; others have 1. Of the windows of a label the share ``weight / largest weight`` is
        read: no window is read more than once in an epoch.
    seed
        Which those are.
    """

    left_out: tuple[str, ...]
    weights: tuple[tuple[str, float], ...]
    seed: int

    def windows(self, silo: str, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Return the indices of the windows that are read, in order.

        Parameters
        ----------
        labels, classes
            Number of each window's class, and the names of the classes.

        Raises
        ------
        PhotonError
            If a label is none of the classes, or nothing is left.
        """
        weights = dict(self.weights)
        for where, name in (
            *(("filter", one) for one in self.left_out),
            *(("mixture", one) for one in weights),
        ):
            if name not in classes:
                raise PhotonError(
                    f"data.{where}: {silo} has no label {name!r}{nearest(name, classes)}; its labels are "
                    f"{', '.join(classes)}"
                )
        of_class = np.array([0.0 if name in self.left_out else weights.get(name, 1.0) for name in classes])
        most = max(of_class.max(), np.finfo(float).tiny)
        draws = np.random.default_rng([self.seed, zlib.crc32(silo.encode())]).random(len(labels))
        chosen = np.flatnonzero(draws < (of_class / most)[labels])
        if not len(chosen):
            raise PhotonError(
                f"data.filter, data.mixture: leave no window of {silo}, whose labels are "
                f"{', '.join(classes[one] for one in np.unique(labels))}; leave out fewer, or this silo"
            )
        return chosen

    def of(self, data: PreparedData) -> PreparedData:
        """Return prepared data whose training windows are those that are read; see `Choice.windows`.

        What was read of the labels is kept until they are written anew.

        Raises
        ------
        PhotonError
            If a silo has no labels, or not these.
        """
        return _chosen(data, self, tuple(_written(data.path, silo) for silo in data.silo_names))


class _Chosen(PreparedData):
    """Some of the training windows. Of an entry, tokens and sequences are theirs, the rest is the whole's."""

    def __init__(self, whole: PreparedData, choice: Choice) -> None:
        self._whole = whole
        self._windows: dict[str, np.ndarray] = {}
        self._unigrams: dict[str, np.ndarray] = {}
        self._labels: dict[str, str] = {}
        silos: dict[str, SiloEntry] = {}
        for silo in whole.silo_names:
            labels, given = read_given(whole, silo)
            chosen = choice.windows(silo, labels, given.classes)
            entry = whole.manifest.silos[silo]
            tokens = len(chosen) * whole.manifest.sequence_length
            train = entry.train.model_copy(update={"sequences": len(chosen), "tokens": tokens})
            silos[silo] = entry.model_copy(update={"train": train})
            self._windows[silo], self._labels[silo] = chosen, given.sha256
        super().__init__(whole.path, whole.manifest.model_copy(update={"silos": silos}))
        self._choice = choice

    def _array(self, silo: str, split: SplitName, name: str) -> np.ndarray:
        self._entry(silo)
        array = self._whole._array(silo, split, name)
        return array if split == "validation" else array[self._windows[silo]]

    def unigram(self, silo: str) -> np.ndarray:
        if silo not in self._unigrams:
            windows = self.windows(silo, "train")
            self._unigrams[silo] = count_tokens(windows, self.manifest.vocab_size)
        return self._unigrams[silo]

    def text_sha256(self, silos: Sequence[str]) -> str:
        labels = ",".join(self._labels[silo] for silo in silos)
        text = f"{self._whole.text_sha256(silos)}/{labels}/{self._choice}"
        return hashlib.sha256(text.encode()).hexdigest()


def _written(folder: Path, silo: str) -> tuple[int, int, int] | None:
    """Return what tells labels that were written from those that were there before."""
    try:
        status = os.stat(given_files(folder, silo)[1])
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@lru_cache(maxsize=8)
def _chosen(whole: PreparedData, choice: Choice, _written: tuple[object, ...]) -> PreparedData:
    # Kept, because it holds copies of indices, and a silo asks for it with every message.
    return _Chosen(whole, choice)


def choice_of(left_out: Sequence[str], weights: Mapping[str, float] | None, seed: int) -> Choice | None:
    """Return the choice that a configuration asks for; None: all windows are read."""
    if not left_out and not weights:
        return None
    return Choice(tuple(left_out), tuple(sorted((weights or {}).items())), seed)
