"""Documents from local files: plain text, JSON, JSON lines and parquet, the first three also gzipped."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from photon.data.documents import Document, TextKind
from photon.data.file_kinds import READ, FileKind
from photon.data.folders import UnreadableError, files_of
from photon.data.row_files import rows_of
from photon.data.row_kinds import FIELDS_OF, RowReader
from photon.data.rows import BOM, Faults, fields_shown, looks_like_json, text_fault
from photon.data.spool import Store
from photon.data.streams import opened, whole
from photon.errors import PhotonError, printable

# A plain text file above LONG_TEXT bytes is read as several documents of about PART_OF_LONG_TEXT bytes, cut
# at blank lines: the split into train and validation is by document, and a book would lie on one side.
LONG_TEXT = 64 * 1024
PART_OF_LONG_TEXT = 16 * 1024


_TEXTS = RowReader()


@dataclass(frozen=True)
class SkippedFile:
    """A file, or rows of it, that could not be read, and why."""

    file: str
    reason: str


def row_reader(
    kind: TextKind, text_field: str | None, source_field: str | None, label_field: str | None
) -> RowReader:
    """Return what makes documents of rows.

    Parameters
    ----------
    text_field
        None: "text", or "messages".

    The others are those of `photon.data.row_kinds.RowReader`.

    Raises
    ------
    PhotonError
        If a field is named that the kind has not, or one is missing.
    """
    own = FIELDS_OF.get(kind)
    if own is not None and text_field is not None:
        raise PhotonError(f"--text-field: {kind} have the fields {', '.join(own)}; leave it out")
    if (kind == "labelled") != (label_field is not None):
        raise PhotonError("--labelled: names the field with the labels of kind labelled, and of no other")
    return RowReader(
        text_field or ("messages" if kind == "chat" else "text"), source_field, kind, label_field
    )


def read_documents(path: Path, documents: Store, reader: RowReader = _TEXTS) -> list[SkippedFile]:
    """Add to ``documents`` those of a file, or of a folder and all below it in the order of their names.

    A file's name says how it is read (`photon.data.file_kinds.kind_of`), or the index of the data set that it
    is part of (`photon.data.indexed.claims_of`): ``.txt .md`` as plain text, the others by rows. In a folder
    the rest is left alone, and so are hidden files. A file given by itself is read as plain text if its
    suffix is unknown, and left alone if it is of a kind that is not read, or has none. A plain text file of
    more than 64 KiB becomes documents of about 16 KiB, cut at blank lines.

    Parameters
    ----------
    path
        File or folder.
    documents
        Where they go, in a fixed order.
    reader
        What rows become. Plain text has no rows: it gives texts, which have no label, and nothing else.

    Returns
    -------
    list of SkippedFile
        What was left out: files that are truncated, empty, of another kind or without a
        row that can be used, and of the others the rows that cannot, counted by reason.

    Raises
    ------
    PhotonError
        If ``path`` does not exist, or nothing in it can be read.
    """
    found_before, had_rows = len(documents), False
    skipped: list[SkippedFile] = []

    def leave(file: str, reason: str) -> None:
        skipped.append(SkippedFile(file, reason))

    for file, name, form in files_of(path, leave):
        before, left = len(documents), len(skipped)
        try:
            if form.form != "plain":
                found = _rows(file, name, form, reader)
            elif reader.kind not in ("text", "labelled"):
                raise UnreadableError("plain text holds no messages: give .jsonl, .json or .parquet")
            else:
                found = _parts(file, name, form, reader.source_field)
            for told in _take(found, "parts" if form.form == "plain" else "rows", documents):
                leave(name, told)
        except UnreadableError as error:
            had_rows = had_rows or isinstance(error, _UnusableRowsError)
            del documents[before:], skipped[left:]
            leave(name, str(error))
    if len(documents) == found_before:
        reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in skipped[:3])
        if had_rows:
            raise PhotonError(
                f"{printable(path)} holds no row that can be used ({reasons}): mend its rows, or give others"
            )
        raise PhotonError(
            f"{printable(path)} holds no text that can be read ({reasons or 'the folder is empty'}): "
            f"give {READ}, or a folder of them"
        )
    return skipped


class _UnusableRowsError(UnreadableError):
    """A file was read, and none of its rows is what was asked for."""


@dataclass(frozen=True)
class _Fault:
    """Why a part of a file is left out, where that is, and which fields are there."""

    reason: str
    place: str
    fields: str = ""


def _take(found: Iterable[Document | _Fault], what: str, documents: Store) -> list[str]:
    """Take the documents; return why others were left out."""
    faults = Faults()
    used, fields = 0, ""
    for document in found:
        if isinstance(document, _Fault):
            faults.add(document.reason, document.place)
            fields = fields or document.fields
        else:
            used += 1
            documents.append(document)
    if not used:
        there = f"; its fields: {fields}" if fields else ""
        if (worst := faults.worst()) is None:
            raise UnreadableError(f"holds no {what}")
        raise (_UnusableRowsError if what == "rows" else UnreadableError)(f"{worst}{there}")
    return list(faults.told(used, what))


def _rows(file: Path, name: str, form: FileKind, reader: RowReader) -> Iterator[Document | _Fault]:
    for number, row in rows_of(file, form, reader.fields):
        found = reader.read(row, f"{name}:{number}")
        if isinstance(found, Document):
            yield found
        else:
            yield _Fault(found, f"row {number:,}", fields_shown(row) if isinstance(row, dict) else "")


def _parts(file: Path, name: str, kind: FileKind, source_field: str | None) -> Iterator[Document | _Fault]:
    if source_field is not None:
        raise UnreadableError(f"plain text has no field {source_field!r}")
    with opened(file, kind) as stream:
        data = whole(stream, kind).removeprefix(BOM)
    if not data.strip():
        raise UnreadableError("empty")
    text = data.decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    if (called := looks_like_json(text)) is not None:
        raise UnreadableError(f"holds {called} to have its fields read")
    parts = split_long_text(text)
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        fault = text_fault(part)
        if fault is None:
            yield Document(name if len(parts) == 1 else f"{name}#{number}", part)
        elif part.strip():
            if fault not in places:
                places[fault] = _bad_byte(data)
            yield _Fault(fault, places[fault])


def _bad_byte(data: bytes) -> str:
    """Say which byte is the first that is no text, or a NUL."""
    try:
        place = data.index(b"\0")
    except ValueError:
        place = len(data)
    try:
        data[:place].decode()
    except UnicodeDecodeError as error:
        place = error.start
    return f"byte {data[place]:#04x} at offset {place:,}"


def split_long_text(text: str) -> list[str]:
    """Cut a text of more than 64 KiB at blank lines into parts of about 16 KiB.

    Where no blank line comes for 64 KiB the cut is at the end of a line; a single line is never cut. The
    parts joined are the text.
    """
    if _size(text) <= LONG_TEXT:
        return [text]
    ends = [match.end() for match in re.finditer(r"\n[ \t]*\n\s*", text)]
    paragraphs = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    parts = []
    for part in _packed(paragraphs):
        if _size(part) <= LONG_TEXT:
            parts.append(part)
        else:
            parts.extend(_packed(part.splitlines(keepends=True)))
    return parts


def _packed(pieces: Iterable[str]) -> list[str]:
    """Join consecutive pieces up to the size of a part; a remainder too small for one joins the last."""
    parts: list[list[str]] = []
    size = PART_OF_LONG_TEXT
    for piece in pieces:
        if size >= PART_OF_LONG_TEXT:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += _size(piece)
    if len(parts) > 1 and size < PART_OF_LONG_TEXT // 2:
        parts[-2].extend(parts.pop())
    return ["".join(part) for part in parts]


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
