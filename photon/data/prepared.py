"""The folder of prepared data: its manifest, its files, its checks.

::

    DIR/manifest.json               what is here and where it came from (class Manifest)
    DIR/tokenizer/                  tokenizer.json + tokenizer_config.json, for transformers' AutoTokenizer
    DIR/silos/NAME/train.npy        (sequences, window) of uint16 or uint32, C order
    DIR/silos/NAME/validation.npy   the same
    DIR/silos/NAME/unigram.npy      int64 counts of the train tokens, (vocab_size,)

A window of running text has a token more than a sequence, since each token is told from those before it: its
last token is the first of the next window. All others, and folders of format 1, have windows as long as
sequences.

Of conversations (kind "chat") there are also, of the shape of the windows::

    DIR/silos/NAME/train-positions.npy      place of each token in its conversation, uint16 or uint32
    DIR/silos/NAME/train-targets.npy        whether the assistant says it, uint8 of 0 and 1
    DIR/silos/NAME/validation-*.npy         the same

Of pairs of answers (kind "pairs"), which are conversations two by two, there is also::

    DIR/silos/NAME/train-pairs.npy          which pair each token is of, uint16 or uint32: 2k + 1 for the
                                            chosen side of pair k, 2k + 2 for the rejected one, 0 beyond

Of questions of which some are to be forgotten (kind "questions"), each in a window of its own, there is
also::

    DIR/silos/NAME/train-sets.npy           of which set the question is, uint16 or uint32: 1 forget,
                                            2 retain, 3 reference, 0 beyond it

Their train split has all of them, and their validation split those that are retained, which are measured.

Of texts with labels (kind "labelled") each window has one text, and there are also::

    DIR/silos/NAME/train-lengths.npy        tokens of the text, uint32 of shape (sequences, 1)
    DIR/silos/NAME/train-labels.npy         number of its class in the manifest, −1: none; int32, the same
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from photon.config.tree import SILO_NAME
from photon.data.documents import TextKind
from photon.data.split import Comparison
from photon.errors import PhotonError, printable

FORMAT = "photon-data/2"
#: Still read: its windows of running text have no token more.
EARLIER_FORMAT = "photon-data/1"
MANIFEST_NAME = "manifest.json"

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")

#: The arrays of each kind of data, beside each other window by window.
ARRAYS: dict[TextKind, tuple[str, ...]] = {
    "text": ("tokens",),
    "chat": ("tokens", "positions", "targets"),
    "pairs": ("tokens", "positions", "targets", "pairs"),
    "questions": ("tokens", "positions", "targets", "sets"),
    "labelled": ("tokens", "lengths", "labels"),
}
#: Type and width of those that have one value for each window.
_OF_WINDOWS = {"lengths": "uint32", "labels": "int32"}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ChatMarks(_Record):
    """What belongs to the windows of conversations.

    Attributes
    ----------
    targets
        Tokens that the assistant says: those that are learnt, or measured.
    shortened
        Conversations whose oldest turns were left out.
    sha256
        Of the .npy file of each further array, hexadecimal.
    """

    targets: int = Field(ge=1)
    shortened: int = Field(ge=0)
    sha256: dict[str, str]


class LabelMarks(_Record):
    """What belongs to the windows of texts with labels.

    Attributes
    ----------
    labelled
        Texts that have a label.
    sha256
        Of the .npy file of each further array, hexadecimal.
    """

    labelled: int = Field(ge=0)
    sha256: dict[str, str]


class Split(_Record):
    """One side of one silo.

    Attributes
    ----------
    documents, bytes
        Documents of the split and the UTF-8 bytes of their text.
    tokens
        Sequences times sequence_length. What is too short for a window at the end is not stored.
    sequences
        Windows in the file.
    sha256
        Of the .npy file, hexadecimal.
    chat, labels
        Of conversations, and of texts with labels, alone.
    """

    documents: int = Field(ge=1)
    bytes: int = Field(ge=0)
    tokens: int = Field(ge=1)
    sequences: int = Field(ge=1)
    sha256: str
    chat: ChatMarks | None = None
    labels: LabelMarks | None = None

    @property
    def hashes(self) -> dict[str, str]:
        """Return the hash of each array."""
        marks = self.chat or self.labels
        return {"tokens": self.sha256, **(marks.sha256 if marks is not None else {})}


class SiloEntry(_Record):
    """One silo's two splits and how well unigram models predict its validation tokens (nats per token).

    ``unigram_loss`` is the cross-entropy of the silo's validation tokens under the add-one-smoothed unigram
    counts of all silos' train tokens; ``own_unigram_loss`` the same under the silo's own. ``text_lost`` is
    the share of its text that the tokenizer loses (`photon.data.text_lost`), None in data of earlier times.
    """

    train: Split
    validation: Split
    unigram_loss: float
    own_unigram_loss: float
    text_lost: float | None = None


class SourceRead(_Record):
    """What was read under one name: documents kept, their bytes, exact duplicates left out."""

    name: str
    documents: int
    bytes: int
    duplicates: int


class SourceSkipped(_Record):
    """A file, or a part of one, that was not read, and why."""

    name: str
    file: str
    reason: str


class Sources(_Record):
    """What went into the folder and what did not."""

    read: list[SourceRead]
    skipped: list[SourceSkipped]


class Manifest(_Record):
    """The contents of ``manifest.json``; see the fields' own classes.

    ``notes`` are what else was done to a tokenizer that was given, a line each; ``classes`` are the names of
    the classes that labels are numbers of.
    """

    format: Literal["photon-data/1", "photon-data/2"]
    kind: TextKind = "text"
    sequence_length: int = Field(ge=2)
    vocab_size: int = Field(ge=2)
    dtype: Literal["uint16", "uint32"]
    partition: str
    seed: int
    validation_fraction: float
    near_duplicates: Comparison = "words"
    eos_token_id: int = Field(ge=0)
    tokenizer_sha256: str
    unigram_loss: float
    unigram_perplexity: float
    silos: dict[Annotated[str, StringConstraints(pattern=SILO_NAME)], SiloEntry] = Field(min_length=1)
    sources: Sources
    notes: list[str] = []
    classes: list[str] = []

    @property
    def window(self) -> int:
        """Return how many tokens a window has."""
        more = self.kind == "text" and self.format != EARLIER_FORMAT
        return self.sequence_length + more


def silo_file(root: Path, silo: str, name: str) -> Path:
    """Return where the array ``name`` ("train", "validation", "unigram") of a silo lies under ``root``."""
    return root / "silos" / silo / f"{name}.npy"


def array_file(root: Path, silo: str, split: SplitName, array: str) -> Path:
    """Return where an array of a split lies under ``root``."""
    return silo_file(root, silo, split if array == "tokens" else f"{split}-{array}")


def is_prepared(path: Path) -> bool:
    """Tell whether ``path`` looks like a folder of prepared data, whole or not."""
    manifest = path / MANIFEST_NAME
    return manifest.is_file() and b'"photon-data/' in manifest.read_bytes()[:200]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PreparedData:
    """A folder of prepared data whose files are where and what its manifest says.

    ``open`` looks at the manifest and at the header and size of every array, which takes milliseconds, and
    reads what has changed since the manifest was written; ``verify`` reads everything. An array that has
    changed since it was last looked at is read when it is asked for, with what belongs to it.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        #: Array to when it was changed, as it was when it was last found to be whole.
        self._whole_at: dict[Path, int] = {}
        self.silo_names = sorted(manifest.silos)
        self.tokenizer_path = path / "tokenizer"

    @classmethod
    def open(cls, path: Path) -> "PreparedData":
        """Open the folder ``path``.

        Raises
        ------
        PhotonError
            If it is no folder of prepared data, or a file is missing, cut short, of another shape or not what
            was written.
        """
        path = Path(path)
        data = cls(path, _read_manifest(path))
        if not (data.tokenizer_path / "tokenizer.json").is_file():
            raise PhotonError(f"{data.tokenizer_path / 'tokenizer.json'} is missing: {_MEND}")
        for silo in data.silo_names:
            for split in SPLITS:
                data.arrays(silo, split)
            data.unigram(silo)
        data._verify_changed()
        return data

    @classmethod
    def reopen(cls, path: Path) -> "PreparedData":
        """Return what an earlier call opened, unless the manifest or the tokenizer has changed since.

        What this costs does not depend on how many silos there are: each message calls it.

        Raises
        ------
        PhotonError
            As :meth:`open`.
        """
        try:
            manifest = (path / MANIFEST_NAME).stat()
            tokenizer = _changed(path / "tokenizer/tokenizer.json")
        except OSError:
            return cls.open(path)
        return _reopen(path, manifest.st_ino, manifest.st_mtime_ns, manifest.st_size, tokenizer)

    def dealt(self, island: int, islands: int) -> "PreparedData":
        """Return one of ``islands`` equal shares of each silo NAME, as the silo NAME-ISLAND.

        Windows are dealt like cards: the share begins with window ``island - 1`` and has every
        ``islands``-th from there. They are not copied.

        Raises
        ------
        PhotonError
            If a silo has fewer windows than there are shares.
        """
        return _share(self, island, islands)

    def text_sha256(self, silos: Sequence[str]) -> str:
        """Return one hash of the text of some silos, by what the manifest says of both splits."""
        splits: list[Split] = [getattr(self._entry(silo), split) for silo in silos for split in SPLITS]
        hashes = (digest for split in splits for _, digest in sorted(split.hashes.items(), reverse=True))
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def windows(self, silo: str, split: SplitName) -> np.ndarray:
        """Return the memory-mapped windows, (sequences, window) of the manifest's dtype.

        Raises
        ------
        PhotonError
            If there is no such silo, or the file is not what the manifest says.
        """
        return self._array(silo, split, "tokens")

    def arrays(self, silo: str, split: SplitName) -> dict[str, np.ndarray]:
        """Return all arrays of a split, memory-mapped: those of `ARRAYS`, by name.

        Raises
        ------
        PhotonError
            As :meth:`windows`.
        """
        return {name: self._array(silo, split, name) for name in self.array_names}

    @property
    def array_names(self) -> tuple[str, ...]:
        """Return the names of the arrays that there are."""
        return ARRAYS[self.manifest.kind]

    def _array(self, silo: str, split: SplitName, name: str) -> np.ndarray:
        entry: Split = getattr(self._entry(silo), split)
        length = self.manifest.window
        counted = "uint16" if length <= 2**16 else "uint32"
        dtypes = {"tokens": self.manifest.dtype, "targets": "uint8"} | _OF_WINDOWS
        columns = 1 if name in _OF_WINDOWS else length
        file = array_file(self.path, silo, split, name)
        array = _load(file, (entry.sequences, columns), dtypes.get(name, counted))
        self._look_at(file, silo, split)
        return array

    def unigram(self, silo: str) -> np.ndarray:
        """Return the memory-mapped int64 counts of the silo's train tokens, (vocab_size,)."""
        self._entry(silo)
        file = silo_file(self.path, silo, "unigram")
        array = _load(file, (self.manifest.vocab_size,), "int64")
        self._look_at(file, silo, "train")
        return array

    def vocabulary(self, silos: Sequence[str]) -> np.ndarray:
        """Return which tokens occur in the training text of any of some silos: bool, (vocab_size,)."""
        return np.logical_or.reduce([self.unigram(silo) > 0 for silo in silos])

    def verify(self) -> None:
        """Read everything: hashes, token ids below vocab_size, unigram counts equal to the train tokens.

        Raises
        ------
        PhotonError
            At the first file that fails, by name.
        """
        self._verify_tokenizer()
        for silo in self.silo_names:
            for split in SPLITS:
                self._verify_split(silo, split)

    def _look_at(self, file: Path, silo: str, split: SplitName) -> None:
        """Verify a split if one of its files has changed since it was looked at."""
        changed = _changed(file)
        before = self._whole_at.setdefault(file, changed)
        if changed != before:
            # Before it is known: to verify it, it is asked for.
            self._whole_at[file] = changed
            try:
                self._verify_split(silo, split)
            except BaseException:
                self._whole_at[file] = before
                raise

    def _verify_changed(self) -> None:
        """Read what has changed since the manifest was written, as :meth:`verify` does.

        The manifest is written last, so after a preparation that is nothing. In a copied folder it may be
        everything.
        """
        written = _changed(self.path / MANIFEST_NAME)
        if _changed(self.tokenizer_path / "tokenizer.json") > written:
            self._verify_tokenizer()
        for silo in self.silo_names:
            for split in SPLITS:
                files = [array_file(self.path, silo, split, name) for name in self.array_names]
                files += [silo_file(self.path, silo, "unigram")] if split == "train" else []
                if any(_changed(file) > written for file in files):
                    self._verify_split(silo, split)

    def _verify_tokenizer(self) -> None:
        tokenizer = self.tokenizer_path / "tokenizer.json"
        if file_sha256(tokenizer) != self.manifest.tokenizer_sha256:
            raise PhotonError(f"{tokenizer} is not the tokenizer of the manifest (SHA-256): {_MEND}")

    def _verify_split(self, silo: str, split: SplitName) -> None:
        entry: Split = getattr(self._entry(silo), split)
        for name in self.array_names:
            file = array_file(self.path, silo, split, name)
            if file_sha256(file) != entry.hashes.get(name):
                raise PhotonError(f"{file} has changed since it was written (SHA-256): {_MEND}")
        if entry.chat is not None:
            self._verify_marks(silo, split, entry.chat)
        if entry.labels is not None:
            self._verify_labels(silo, split, entry.labels)
        file = silo_file(self.path, silo, split)
        windows = self.windows(silo, split)
        highest = int(windows.max())
        if highest >= self.manifest.vocab_size:
            raise PhotonError(
                f"{file} holds token {highest}, outside the vocabulary of {self.manifest.vocab_size}: {_MEND}"
            )
        if split == "train" and not np.array_equal(
            count_tokens(windows, self.manifest.vocab_size), self.unigram(silo)
        ):
            raise PhotonError(
                f"{silo_file(self.path, silo, 'unigram')} does not count the tokens of {file}: {_MEND}"
            )

    def _verify_marks(self, silo: str, split: SplitName, marks: ChatMarks) -> None:
        arrays = self.arrays(silo, split)
        targets, positions = arrays["targets"], arrays["positions"]
        for name, whole in (
            ("targets", int(targets.max()) <= 1 and int(targets.sum(dtype=np.int64)) == marks.targets),
            # Each is 0, where a conversation begins, or the one before and one.
            (
                "positions",
                not positions[:, 0].any()
                and bool(((positions[:, 1:] == 0) | (positions[:, 1:] == positions[:, :-1] + 1)).all()),
            ),
            ("pairs", "pairs" not in arrays or _fits(arrays["pairs"], positions)),
            ("sets", "sets" not in arrays or _fits_sets(arrays["sets"], positions, targets)),
        ):
            if not whole:
                file = array_file(self.path, silo, split, name)
                raise PhotonError(f"{file} does not fit the conversations beside it: {_MEND}")

    def _verify_labels(self, silo: str, split: SplitName, marks: LabelMarks) -> None:
        arrays = self.arrays(silo, split)
        lengths, labels = arrays["lengths"], arrays["labels"]
        for name, whole in (
            ("lengths", int(lengths.min()) >= 1 and int(lengths.max()) <= self.manifest.sequence_length),
            (
                "labels",
                int(labels.min()) >= -1
                and int(labels.max()) < len(self.manifest.classes)
                and int((labels >= 0).sum()) == marks.labelled,
            ),
        ):
            if not whole:
                file = array_file(self.path, silo, split, name)
                raise PhotonError(f"{file} does not fit the texts beside it: {_MEND}")

    def _entry(self, silo: str) -> SiloEntry:
        entry = self.manifest.silos.get(silo)
        if entry is None:
            raise PhotonError(f"{self.path} has no silo {silo!r}: it has {', '.join(self.silo_names)}")
        return entry


class _Share(PreparedData):
    """A share of all windows. Of an entry, tokens and sequences are the share's, the rest is the whole's."""

    def __init__(self, whole: PreparedData, island: int, islands: int) -> None:
        self._whole = whole
        self._unigrams: dict[str, np.ndarray] = {}
        self._dealt = slice(island - 1, None, islands)
        self._names = {f"{name}-{island}": name for name in whole.silo_names}
        silos = {share: self._entry_of(name, islands) for share, name in self._names.items()}
        super().__init__(whole.path, whole.manifest.model_copy(update={"silos": silos}))

    def _array(self, silo: str, split: SplitName, name: str) -> np.ndarray:
        self._entry(silo)
        return self._whole._array(self._names[silo], split, name)[self._dealt]

    def unigram(self, silo: str) -> np.ndarray:
        if silo not in self._unigrams:
            windows = self.windows(silo, "train")
            self._unigrams[silo] = count_tokens(windows, self.manifest.vocab_size)
        return self._unigrams[silo]

    def _entry_of(self, name: str, islands: int) -> SiloEntry:
        splits: dict[str, Split] = {}
        for split in SPLITS:
            entry: Split = getattr(self._whole.manifest.silos[name], split)
            if entry.sequences < islands:
                raise PhotonError(
                    f"{self._whole.path}: {entry.sequences} {split} windows of {name} cannot be dealt to "
                    f"{islands} islands; use fewer islands, or more text"
                )
            count = len(range(entry.sequences)[self._dealt])
            tokens = count * self._whole.manifest.sequence_length
            splits[split] = entry.model_copy(update={"sequences": count, "tokens": tokens})
        return self._whole.manifest.silos[name].model_copy(update=splits)


@lru_cache(maxsize=8)
def _share(whole: PreparedData, island: int, islands: int) -> PreparedData:
    # Kept, because a share counts its own tokens, which takes a pass over it.
    return _Share(whole, island, islands)


def _changed(file: Path) -> int:
    """Return when a file was changed, in nanoseconds: no program can set that back."""
    return file.stat().st_ctime_ns


@lru_cache(maxsize=8)
def _reopen(path: Path, *_files: int) -> PreparedData:
    return PreparedData.open(path)


def _fits(pairs: np.ndarray, positions: np.ndarray) -> bool:
    """Return whether the sides of pairs are numbered as the conversations are, by two."""
    starts = positions == 0
    sides = np.where(pairs == 0, 0, np.cumsum(starts, axis=1))
    whole = bool((pairs.max(axis=1) % 2 == 0).all()) and bool((pairs[:, 0] == 1).all())
    return whole and np.array_equal(pairs, sides) and not bool((pairs[:, 1:][pairs[:, :-1] == 0] > 0).any())


def _fits_sets(sets: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> bool:
    """Return whether each window begins with a question of one set, and has its answer at its end."""
    there = sets > 0
    ends = there.sum(axis=1)
    begins = ends - targets.sum(axis=1, dtype=np.int64)
    places = np.arange(sets.shape[1])
    marked = (places >= begins[:, None]) & (places < ends[:, None])
    whole = bool((begins > 0).all()) and np.array_equal(there, places < ends[:, None])
    one = bool((sets == np.where(there, sets[:, :1], 0)).all()) and int(sets.max()) <= 3
    return whole and one and np.array_equal(marked, targets == 1) and bool((positions[:, 0] == 0).all())


def count_tokens(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count each token id of ``windows``: int64, (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    # numpy.bincount copies to int64, so a large memory map is counted piece by piece.
    for start in range(0, len(windows), 65536):
        counts += np.bincount(windows[start : start + 65536].reshape(-1), minlength=vocab_size)
    return counts


_MEND = "prepare the data again with `photon data prepare`"


def _read_manifest(path: Path) -> Manifest:
    if not path.is_dir():
        raise PhotonError(f"{printable(path)} is not a folder: give one that `photon data prepare` wrote")
    file = path / MANIFEST_NAME
    if file.exists() and not file.is_file():
        raise PhotonError(f"{printable(file)} is not a regular file: {_MEND}")
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PhotonError(f"{path} holds no prepared data ({MANIFEST_NAME} is missing): {_MEND}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"{file} cannot be read ({error}): {_MEND}") from None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PhotonError(f"{file} is not a {FORMAT} manifest ({where}: {first['msg']}): {_MEND}") from None


def _load(file: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if file.exists() and not file.is_file():  # to open a pipe would wait for ever
        raise PhotonError(f"{file} is not a regular file: {_MEND}")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise PhotonError(f"{file} is missing: {_MEND}") from None
    except (OSError, ValueError, EOFError) as error:
        raise PhotonError(f"{file} is damaged or cut short ({error}): {_MEND}") from None
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise PhotonError(
            f"{file} holds {array.dtype} {array.shape}, the manifest says {dtype} {shape}: {_MEND}"
        )
    return array
