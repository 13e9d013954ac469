"""Rows of JSON, and what a row of any file gives: a document, or the reason why not.

One rule for all that is read, from files and from the hub: what is wrong in a row costs that row.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from photon.data.documents import Document
from photon.data.file_kinds import FileKind
from photon.data.streams import LONGEST_ROW, TOO_LONG, Stream, lines_of, whole
from photon.errors import printable

BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
#: Where a row of a list follows another on the same line.
_NEXT_ROW = re.compile(r",\s*(?=\{)")
_BETWEEN_ROWS = re.compile(r"[\s,\]]*")
#: What opens and closes objects, and texts, in which neither counts.
_BRACES = re.compile(r'"(?:[^"\\]|\\.)*"|["{}]', re.DOTALL)
#: Rows of a line of which the end is looked for in vain: each time all that follows is read.
_LOOKS = 16
#: What may stand behind a row.
_BEHIND_ROW = re.compile(r"\s*(?:,\s*(?=\{)|\]?\s*\Z)")
#: In place of the value of a field that is not there.
MISSING = object()


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read at all, and why."""

    reason: str


@dataclass
class Faults:
    """Why rows were left out: how often, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count a row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, place)

    def worst(self) -> str | None:
        """Return the most frequent reason, with its first place."""
        for reason, _ in self.counts.most_common(1):
            return f"{reason} (first: {self.first[reason]})"
        return None

    def told(self, used: int, what: str = "rows") -> Iterator[str]:
        """Yield a line for each reason; ``used`` rows were not left out."""
        total = used + self.counts.total()
        for reason, count in sorted(self.counts.items()):
            yield f"{count:,} of {total:,} {what}: {reason} (first: {self.first[reason]})"


def json_lines(lines: Iterable[bytes | None]) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line that is not blank, from 1, and its value or a `BadRow`."""
    for number, line in enumerate(lines, 1):
        if line is None:
            yield number, BadRow(TOO_LONG)
        elif line.strip(_BLANK):
            yield number, parsed(line.removeprefix(BOM) if number == 1 else line)


def json_rows(stream: Stream, kind: FileKind) -> Iterator[tuple[int, Any]]:
    """Yield the rows of a ``.json`` file: of its list, its one value, or its lines.

    JSON lines under this name are common, and read line by line. Of a list with a mistake in it, what stands
    on a line by itself is read; and on a line, what begins with ``, {``.
    """
    head: list[bytes] = []
    while line := stream.readline(LONGEST_ROW):
        head.append(line)
        if line.strip(_BLANK):
            break
    if not head:
        return
    if isinstance(parsed(head[-1].removeprefix(BOM)), dict):
        yield from json_lines(_chained(head, lines_of(stream)))
        return
    data = whole(stream, kind, b"".join(head))
    value = parsed(data.removeprefix(BOM))
    if not isinstance(value, BadRow):
        yield from enumerate(value if isinstance(value, list) else [value], 1)
        return
    lines = data.removeprefix(BOM).strip(_BLANK).split(b"\n")
    if len(lines) == 1:
        yield from enumerate(_rows_of_line(lines[0]), 1)
        return
    for number, line in enumerate(lines, 1 + data.count(b"\n", 0, data.find(lines[0]))):
        # The brackets and commas of a list that has a row on each line.
        if line.strip(_BLANK) not in {b"", b"[", b"]"}:
            row = parsed(line.strip(_BLANK).removesuffix(b","))
            rows = _rows_of_line(line) if isinstance(row, BadRow) else (row,)
            yield from ((number, row) for row in rows)


def _rows_of_line(line: bytes) -> Iterator[Any]:
    """Yield the rows of a line that is not JSON as a whole, from each ``{`` that follows a comma."""
    text = line.decode("utf-8", "surrogateescape").strip(" \t\r\n").removeprefix("[")
    start, looks = 0, _LOOKS
    while start < len(text):
        try:
            row, end = _DECODER.raw_decode(text, start)
            follows = _BETWEEN_ROWS.match(text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            row = _bad(error)
            # Objects inside of it are no rows. Where its own end does not show, the next row may be any.
            closed = _end_of_row(text, start) if looks > 0 else None
            looks -= closed is None
            behind = None if closed is None else _BEHIND_ROW.match(text, closed)
            follows = behind or _NEXT_ROW.search(text, start)
        yield row
        start = len(text) if follows is None else follows.end()


def _end_of_row(text: str, start: int) -> int | None:
    """Return where the brace at ``start`` is closed; None: nowhere, or there is none."""
    depth = 0
    for found in _BRACES.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth <= 0 or found[0] == '"':
            return found.end() if found[0] == "}" and text[start] == "{" else None
    return None


def looks_like_json(text: str) -> str | None:
    """Tell what a text is that is a JSON object, or begins with two, as rows do, perhaps those of a list."""
    rest = text.lstrip().removeprefix("[").lstrip()
    place, found = 0, 0
    while place < len(rest) and found < 2:
        try:
            row, end = _DECODER.raw_decode(rest, place)
        except (json.JSONDecodeError, RecursionError):
            return None
        if not (isinstance(row, dict) and row):
            return None
        found += 1
        place = len(rest) - len(rest[end:].lstrip(" \t\r\n,]"))
    first = parsed(text.lstrip().partition("\n")[0].encode("utf-8", "surrogateescape"))
    by_line = found == 2 and isinstance(first, dict)
    said = "JSON, a row on each line: name it .jsonl" if by_line else "JSON: name it .json"
    return said if found else None


def row_fault(row: Any) -> str | None:
    """Return why a row has no fields; None: it has."""
    if isinstance(row, BadRow):
        return row.reason
    return None if isinstance(row, dict) else "not an object with fields"


def document_of(row: Any, place: str, text_field: str, source_field: str | None = None) -> Document | str:
    """Return the row's document, or the reason why it has none.

    Parameters
    ----------
    row
        What was read.
    place
        The document's ``source`` without a ``source_field``.
    text_field, source_field
        Names of fields; a dot reaches into an inner object.
    """
    if (fault := row_fault(row)) is not None:
        return fault
    text = value_of(row, text_field)
    if text is MISSING:
        return f"no text field {text_field!r}; name another with --text-field"
    if not isinstance(text, str):
        return f"text field {text_field!r} holds {called(text)}, no text"
    fault = text_fault(text)
    if fault is not None:
        return fault
    if source_field is None:
        return Document(place, text)
    source = named_source(row, source_field)
    return Document(source.name, text) if isinstance(source, NamedSource) else source


@dataclass(frozen=True)
class NamedSource:
    """The source that a field of a row names."""

    name: str


def named_source(row: dict[str, Any], source_field: str) -> NamedSource | str:
    """Return the source that a row's field names, or the reason why it names none."""
    source = value_of(row, source_field)
    if source is MISSING:
        return f"no field {source_field!r}"
    if source is None or isinstance(source, dict | list | bytes | BadRow):
        return f"field {source_field!r} holds {called(source)}"
    if isinstance(source, float) and not math.isfinite(source):
        return f"field {source_field!r} holds no finite number"
    name = str(source)
    if not name.strip() or text_fault(name) is not None:
        return f"field {source_field!r} is empty, or no valid text"
    return NamedSource(name)


def text_fault(text: str) -> str | None:
    """Return why a text cannot be used, or None: it is empty, has a NUL, or was not valid UTF-8."""
    if not text.strip():
        return "empty text"
    if "\0" in text:
        return "text holds a NUL byte"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Where a byte was no UTF-8, decoding has left a surrogate of this range.
        escaped = "\udc80" <= text[error.start] <= "\udcff"
        return "text is not UTF-8" if escaped else "text is not valid Unicode (a lone surrogate)"
    return None


def _chained(head: list[bytes], rest: Iterable[bytes | None]) -> Iterator[bytes | None]:
    yield from head
    yield from rest


def parsed(data: bytes) -> Any:
    """Return the value of some JSON, or a `BadRow`."""
    try:
        return _DECODER.decode(data.decode("utf-8", "surrogateescape"))
    except (json.JSONDecodeError, RecursionError) as error:
        return _bad(error)


def _bad(error: Exception) -> BadRow:
    return BadRow("JSON that is nested too deeply" if isinstance(error, RecursionError) else "not JSON")


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        # Which of them was meant nobody knows; where the field is not wanted it does not matter.
        for name, value in pairs:
            if fields[name] is not value and fields[name] != value:
                fields[name] = BadRow("two values")
    return fields


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python reads no integer of more than 4,300 digits
        return math.inf


# Control characters in a string are let through: what they cost is the text's matter.
_DECODER = json.JSONDecoder(strict=False, parse_int=_integer, object_pairs_hook=_fields)


def value_of(row: Any, name: str) -> Any:
    """Return the field ``name`` of a row, or MISSING; a dot reaches into an inner object."""
    if not isinstance(row, dict):
        return MISSING
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    return value_of(row.get(outer), inner) if inner else MISSING


def fields_shown(row: Any) -> str:
    """Return the names of a row's fields, for a message."""
    names = [f"{printable(str(name)):.40}" for name in row][:12] if isinstance(row, dict) else []
    return ", ".join(names) or "none"


def called(value: Any) -> str:
    """Return what a value is, in words."""
    match value:
        case None:
            return "null"
        case str():
            return "a text"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case dict():
            return "an object"
        case list():
            return "a list"
        case bytes():
            return "bytes"
        case BadRow():
            return value.reason
    return f"a value of another type ({type(value).__name__})"
