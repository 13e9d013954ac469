"""Documents on the disk, so that the memory of a preparation does not grow with the corpus.

What is read is written down at once; from then on a document is a number. A corpus is a sequence of such
numbers, and its texts are read again one at a time.
"""

import errno
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np
from pydantic import TypeAdapter

from photon.data.documents import Chat, Document, Pair, Question
from photon.errors import PhotonError, printable
from photon.files.atomic import name_beside

#: What a document may be; the place in this list is what is written of it.
_KINDS: tuple[type[Document], ...] = (Document, Chat, Pair, Question)
_TEXTS, _REST, _INDEX = "texts", "rest", "index.npy"


class Texts:
    """Texts in a file, by number; any process can open them.

    Parameters
    ----------
    folder
        Where a `Spool` has written them.
    spans
        Where the text of each document begins, and its size: int64 bytes, (documents, 2).
    """

    def __init__(self, folder: Path, spans: np.ndarray) -> None:
        self._file = open(folder / _TEXTS, "rb", buffering=0)  # noqa: SIM115 - it lives as long as this does
        self.spans = spans

    @classmethod
    def open(cls, folder: Path) -> "Texts":
        """Open what `Spool.seal` has left."""
        return cls(folder, np.load(folder / _INDEX))

    def __getitem__(self, number: int) -> str:
        # Read, not mapped: pages of a mapped file count as this process's memory.
        start, size = self.spans[number]
        return os.pread(self._file.fileno(), int(size), int(start)).decode()


class Spool:
    """Documents that were written to a folder in the order in which they came.

    Parameters
    ----------
    folder
        An empty folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # 1 MiB at a time: a document is often no more than a line.
        self._texts = open(folder / _TEXTS, "w+b", buffering=1 << 20)  # noqa: SIM115
        self._rest = open(folder / _REST, "w+b", buffering=1 << 20)  # noqa: SIM115
        self._text_ends, self._rest_ends = array("q", [0]), array("q", [0])
        self._flushed = True

    @classmethod
    @contextmanager
    def beside(cls, output: Path) -> Iterator["Spool"]:
        """Yield one in a folder beside ``output``, which is removed in the end.

        Raises
        ------
        PhotonError
            If the disk is full, or cannot be written.
        """
        folder = name_beside(output.resolve())
        try:
            folder.mkdir(parents=True)
            spool = cls(folder)
        except OSError as error:
            raise disk_fault(folder.parent, error) from None
        try:
            yield spool
        finally:
            spool.close()
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files."""
        self._texts.close()
        self._rest.close()

    def documents(self) -> "Documents":
        """Return an empty sequence; what is appended to it is written here."""
        return Documents(self, array("q"))

    def add(self, document: Document) -> int:
        """Write a document, and return its number.

        Raises
        ------
        PhotonError
            If the disk is full, or cannot be written.
        """
        kind = _KINDS.index(type(document))
        rest = document.source.encode() if not kind else _ADAPTERS[kind].dump_json(document)
        text = document.text.encode()
        try:
            self._texts.write(text)
            self._rest.write(bytes([kind]) + rest)
        except OSError as error:
            raise disk_fault(self.folder.parent, error) from None
        self._text_ends.append(self._text_ends[-1] + len(text))
        self._rest_ends.append(self._rest_ends[-1] + 1 + len(rest))
        self._flushed = False
        return len(self._text_ends) - 2

    def read(self, number: int) -> Document:
        """Return a document."""
        self._flush()
        text = _between(self._texts.fileno(), self._text_ends, number).decode()
        rest = _between(self._rest.fileno(), self._rest_ends, number)
        kind = rest[0]
        return Document(rest[1:].decode(), text) if not kind else _ADAPTERS[kind].validate_json(rest[1:])

    def sizes(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the bytes of the texts, int64."""
        ends = np.frombuffer(self._text_ends, dtype=np.int64)
        return np.diff(ends)[np.asarray(numbers, dtype=np.int64)]

    def seal(self) -> None:
        """Let other processes open the texts."""
        self._flush()
        ends = np.frombuffer(self._text_ends, dtype=np.int64)
        np.save(self.folder / _INDEX, np.stack([ends[:-1], np.diff(ends)], axis=1), allow_pickle=False)

    def _flush(self) -> None:
        if not self._flushed:
            try:
                self._texts.flush()
                self._rest.flush()
            except OSError as error:
                raise disk_fault(self.folder.parent, error) from None
            self._flushed = True


class Documents(Sequence[Document]):
    """Documents of a spool, read when they are looked at."""

    def __init__(self, spool: Spool, numbers: "array[int]") -> None:
        self.spool = spool
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Documents": ...
    def __getitem__(self, index: int | slice) -> "Document | Documents":
        if isinstance(index, slice):
            return Documents(self.spool, self.numbers[index])
        return self.spool.read(self.numbers[index])

    def append(self, document: Document) -> None:
        """Write a document, and have it last."""
        self.numbers.append(self.spool.add(document))

    def __delitem__(self, index: slice) -> None:
        del self.numbers[index]

    def taken(self, order: Iterable[int]) -> "Documents":
        """Return those at the places ``order``."""
        return Documents(self.spool, array("q", (self.numbers[place] for place in order)))

    def sizes(self) -> np.ndarray:
        """Return the bytes of the texts, int64."""
        return self.spool.sizes(self.numbers)


#: What takes documents that are read.
Store = list[Document] | Documents


def taken(documents: Sequence[Document], order: Iterable[int]) -> Sequence[Document]:
    """Return the documents at the places ``order``, where they lie."""
    if isinstance(documents, Documents):
        return documents.taken(order)
    return [documents[place] for place in order]


def joined(parts: Iterable[Sequence[Document]]) -> Sequence[Document]:
    """Return the documents of all parts, where they lie: all in one spool, or all in memory."""
    parts = list(parts)
    stored = [part for part in parts if isinstance(part, Documents)]
    if len(stored) < len(parts) or not stored:
        return [document for part in parts for document in part]
    numbers = array("q")
    for part in stored:
        numbers.extend(part.numbers)
    return Documents(stored[0].spool, numbers)


def sizes_of(documents: Sequence[Document]) -> np.ndarray:
    """Return the bytes of the texts, int64."""
    if isinstance(documents, Documents):
        return documents.sizes()
    return np.array([len(document.text.encode()) for document in documents], dtype=np.int64)


def _between(file: int, ends: "array[int]", number: int) -> bytes:
    return os.pread(file, ends[number + 1] - ends[number], ends[number])


def disk_fault(place: Path, error: OSError) -> PhotonError:
    """Return the error that a place cannot be written."""
    mend = "free some space" if error.errno == errno.ENOSPC else "give another --output"
    return PhotonError(f"{printable(place)} cannot be written ({error.strerror or error}): {mend}")


_ADAPTERS = [TypeAdapter(kind) for kind in _KINDS]
