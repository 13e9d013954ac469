"""Documents from local files: plain text, JSON, JSON lines and parquet, the first three also gzipped."""

import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from photon.data.documents import Document
from photon.errors import PhotonError

PLAIN_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = (".jsonl", ".json", ".parquet")

# A plain text file above LONG_TEXT bytes is read as several documents of about PART_OF_LONG_TEXT bytes, cut
# at blank lines: the split into train and validation is by document, and a book would lie on one side.
LONG_TEXT = 64 * 1024
PART_OF_LONG_TEXT = 16 * 1024


@dataclass(frozen=True)
class SkippedFile:
    """A file, or rows of it, that could not be read, and why."""

    file: str
    reason: str


@dataclass
class Reading:
    """What reading gave: the documents in a fixed order, and what was skipped."""

    documents: list[Document] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)


def read_documents(path: Path, *, text_field: str = "text", source_field: str | None = None) -> Reading:
    """Read the documents of a file, or of a folder and all below it in the order of their names.

    In a folder, files named ``*.txt *.md *.jsonl *.json *.parquet`` (and ``.gz`` of all but the last) are
    read, hidden ones are not. A file given by its own name is read as plain text if its suffix is another. A
    plain text file of more than 64 KiB becomes documents of about 16 KiB, cut at blank lines.

    Parameters
    ----------
    path
        File or folder.
    text_field
        Field or column that holds the text; a dot reaches into an inner object (``meta.text``).
    source_field
        Field or column whose value becomes the documents' ``source``; needs files with fields.

    Returns
    -------
    Reading
        Files that are truncated, empty, binary, wrongly encoded or without the field are in its ``skipped``.

    Raises
    ------
    PhotonError
        If ``path`` does not exist, or nothing in it can be read.
    """
    reading = Reading()
    files = _files(path, reading)
    for file, name in files:
        before = len(reading.documents)
        try:
            for document in _read_file(file, name, text_field, source_field, reading):
                reading.documents.append(document)
        except _UnreadableError as error:
            del reading.documents[before:]
            reading.skipped.append(SkippedFile(name, str(error)))
    if not reading.documents:
        reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in reading.skipped[:3])
        raise PhotonError(
            f"{path} holds no text that can be read ({reasons or 'the folder is empty'}): "
            "give a .txt, .md, .jsonl, .json or .parquet file, or a folder of them"
        )
    return reading


class _UnreadableError(Exception):
    """Why one file cannot be used; becomes a SkippedFile."""


def _files(path: Path, reading: Reading) -> list[tuple[Path, str]]:
    """List the files to read with the names they go by in messages and in the manifest."""
    if path.is_file():
        return [(path, path.name)]
    if not path.is_dir():
        raise PhotonError(f"{path} does not exist: give a file or a folder with text")
    files, others = [], Counter[str]()
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            if (link := Path(folder, name)).is_symlink():
                reason = "a link to a folder, not followed; give the folder itself to read it"
                reading.skipped.append(SkippedFile(link.relative_to(path).as_posix(), reason))
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if _kind(file) is None:
                others[file.suffix or "no suffix"] += 1
            else:
                files.append((file, file.relative_to(path).as_posix()))
    if others:
        kinds = ", ".join(sorted(others)[:8])
        count = f"{others.total()} file{'' if others.total() == 1 else 's'}"
        reason = f"{count} of other kinds ({kinds}) left alone; give one by its own name to read it"
        reading.skipped.append(SkippedFile(".", reason))
    return sorted(files, key=lambda item: item[1])


def _kind(file: Path) -> str | None:
    """Return "plain", ".jsonl", ".json", ".parquet", or None for a suffix that says nothing."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".gz":
        suffix = suffixes[0] if len(suffixes) == 2 else ""
        if suffix == ".parquet":
            return None
    if suffix in PLAIN_SUFFIXES:
        return "plain"
    return suffix if suffix in ROW_SUFFIXES else None


def _read_file(
    file: Path, name: str, text_field: str, source_field: str | None, reading: Reading
) -> Iterator[Document]:
    kind = _kind(file) or "plain"
    if kind == "plain":
        if source_field is not None:
            raise _UnreadableError(f"plain text has no field {source_field!r}")
        parts = split_long_text(_decode(_read_bytes(file)).replace("\r\n", "\n"))
        for number, part in enumerate(parts, 1):
            yield Document(name if len(parts) == 1 else f"{name}#{number}", part)
        return
    problems = Counter[str]()
    used = 0
    rows = _parquet_rows(file, text_field, source_field) if kind == ".parquet" else _json_rows(file, kind)
    for number, row in rows:
        document = _document(row, f"{name}:{number}", text_field, source_field)
        if isinstance(document, Document):
            used += 1
            yield document
        else:
            problems[document] += 1
    if not used:
        raise _UnreadableError(problems.most_common(1)[0][0] if problems else "holds no rows")
    for problem, count in sorted(problems.items()):
        reading.skipped.append(SkippedFile(name, f"{count} of {used + problems.total()} rows: {problem}"))


def _read_bytes(file: Path) -> bytes:
    try:
        if file.suffix.lower() == ".gz":
            with gzip.open(file, "rb") as stream:
                data = stream.read()
        else:
            data = file.read_bytes()
    except EOFError:
        raise _UnreadableError("the gzip file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _UnreadableError(f"the gzip file is damaged ({error})") from None
    except OSError as error:
        raise _UnreadableError(error.strerror or str(error)) from None
    if not data.strip():
        raise _UnreadableError("empty")
    return data


def _decode(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _UnreadableError("UTF-16, not UTF-8: convert it with iconv -f UTF-16 -t UTF-8")
    if b"\0" in data:
        raise _UnreadableError("binary (it holds NUL bytes)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnreadableError(f"not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})") from None


def split_long_text(text: str) -> list[str]:
    """Cut a text of more than 64 KiB at blank lines into parts of about 16 KiB.

    Where no blank line comes for 64 KiB the cut is at the end of a line; a single line is never cut. The
    parts joined are the text.
    """
    if len(text.encode()) <= LONG_TEXT:
        return [text]
    ends = [match.end() for match in re.finditer(r"\n[ \t]*\n\s*", text)]
    paragraphs = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    parts = []
    for part in _packed(paragraphs):
        if len(part.encode()) <= LONG_TEXT:
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
        size += len(piece.encode())
    if len(parts) > 1 and size < PART_OF_LONG_TEXT // 2:
        parts[-2].extend(parts.pop())
    return ["".join(part) for part in parts]


def _json_rows(file: Path, kind: str) -> Iterator[tuple[int, Any]]:
    """Yield (number, row); a line that is no JSON is yielded as a _Problem."""
    text = _decode(_read_bytes(file))
    if kind == ".json":
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            pass  # JSON lines under the name .json are common.
        else:
            yield from enumerate(value if isinstance(value, list) else [value], 1)
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = _Problem("not JSON")
            yield number, row


def _parquet_rows(file: Path, text_field: str, source_field: str | None) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        wanted = {
            name if name in columns else name.split(".")[0] for name in (text_field, source_field) if name
        }
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=sorted(wanted & set(columns))):
            rows = batch.to_pylist() if batch.num_columns else [dict[str, Any]()] * batch.num_rows
            for row in rows:
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise _UnreadableError(f"not a readable parquet file ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class _Problem:
    reason: str


def _document(row: Any, place: str, text_field: str, source_field: str | None) -> Document | str:
    """Return the row's document, or the reason why it has none."""
    if isinstance(row, _Problem):
        return row.reason
    text = field_value(row, text_field)
    if not isinstance(text, str):
        return f"no text field {text_field!r}; name another with --text-field"
    if not text.strip():
        return "empty text"
    if not _is_unicode(text):
        return "text is not valid Unicode (a lone surrogate)"
    if source_field is None:
        return Document(place, text)
    source = field_value(row, source_field)
    if source is None or isinstance(source, (dict, list)):
        return f"no field {source_field!r}"
    return Document(str(source), text)


def field_value(row: Any, name: str) -> Any:
    """Return the field ``name`` of a row, or None; a dot reaches into an inner object."""
    if not isinstance(row, dict):
        return None
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    return field_value(row.get(outer), inner) if inner else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
