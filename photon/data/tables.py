"""Rows of tables: parquet, Arrow, and text with a delimiter."""

import csv
import itertools
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.data.arrow_messages import batches_unpacked
from photon.data.file_kinds import FileKind
from photon.data.folders import UnreadableError, check_regular
from photon.data.rows import BOM, BadRow, fields_shown
from photon.data.streams import LARGEST_UNPACKED, LONGEST_ROW, TOO_LONG, Stream, lines_of

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_ONCE = 4096
#: What pyarrow raises where a file is damaged; names of columns that are no UTF-8 are a ValueError.
_DAMAGED = (OSError, ValueError, LookupError, ArithmeticError, MemoryError, struct.error)
#: How many times smaller than itself compressed text may be.
_SHRINKS = 100


def parquet_rows(file: Path, fields: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of a parquet file; only what holds the fields is read.

    Raises
    ------
    UnreadableError
        If it is no parquet file, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_regular(file)
    try:
        table = pq.ParquetFile(file)
        columns = _wanted(table.schema_arrow.names, fields)
        _check_groups(table.metadata, columns)
        number = itertools.count(1)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            for row in arrow_rows(batch):
                yield next(number), row
    except (pa.ArrowException, *_DAMAGED) as error:
        raise UnreadableError(f"not a readable parquet file ({_first_line(error)})") from None


def arrow_file_rows(file: Path, fields: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of an Arrow file, of the stream's format or the file's.

    Raises
    ------
    UnreadableError
        If it is no Arrow file, or damaged or cut short.
    """
    import pyarrow as pa

    check_regular(file)
    try:
        number = itertools.count(1)
        with pa.memory_map(str(file)) as source, pa.memory_map(str(file)) as ahead:
            for batch in _batches(source, ahead, fields):
                for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                    for row in _checked_rows(batch.slice(start, _ROWS_AT_ONCE)):
                        yield next(number), row
    except (pa.ArrowException, *_DAMAGED) as error:
        raise UnreadableError(f"not a readable Arrow file ({_first_line(error)})") from None


def _batches(source: Any, ahead: Any, fields: Collection[str]) -> "Iterator[pa.RecordBatch]":
    """Yield the batches of a file that is open twice: one is looked at before the other unpacks."""
    import pyarrow as pa

    by_place = source.read(6) == b"ARROW1"
    source.seek(0)
    # The format of a file is a stream behind a mark, with the places of its batches at the end.
    start, told = (8, pa.ipc.open_file(source).num_record_batches) if by_place else (0, None)
    source.seek(start)
    ahead.seek(start)
    names = pa.ipc.open_stream(source).schema.names
    source.seek(start)
    wanted = _wanted(names, fields)
    included = [index for index, name in enumerate(names) if name in wanted]
    reader = pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(included_fields=included))
    count = 0
    for size in batches_unpacked(ahead):
        if size > LARGEST_UNPACKED:
            raise UnreadableError(_too_much("a batch"))
        yield reader.read_next_batch()
        count += 1
    if told not in (None, count) or next(iter(reader), None) is not None:
        raise UnreadableError("the Arrow file is damaged: its end tells of other batches than it has")
    end = source.tell()
    source.seek(end - 8)
    if source.read(8) != b"\xff\xff\xff\xff\x00\x00\x00\x00":
        raise UnreadableError("the Arrow file is truncated: it has no end")


def _too_much(part: str) -> str:
    return f"more than {LARGEST_UNPACKED >> 30} GiB come out of {part} of it: write it in smaller ones"


def _check_groups(about: Any, columns: Collection[str]) -> None:
    """Check what is unpacked of a group of rows, as the file tells; text shrinks, but never so far."""
    for index in range(about.num_row_groups):
        group = about.row_group(index)
        parts = [group.column(place) for place in range(group.num_columns)]
        wanted = [part for part in parts if part.path_in_schema.split(".")[0] in columns]
        size = sum(part.total_uncompressed_size for part in wanted)
        if size > max(LARGEST_UNPACKED, _SHRINKS * sum(part.total_compressed_size for part in wanted)):
            raise UnreadableError(_too_much("a row group"))


def _checked_rows(batch: "pa.RecordBatch") -> Iterator[Any]:
    """Yield rows of a batch that may say of itself what is not so, such as where a text ends."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            try:
                row.validate(full=True)
            except pa.ArrowInvalid as error:
                yield BadRow("not UTF-8" if "utf8" in str(error).lower() else "damaged")
            else:
                yield from arrow_rows(row)
    else:
        yield from arrow_rows(batch)


def arrow_rows(batch: "pa.RecordBatch | pa.Table") -> Iterator[Any]:
    """Yield the rows of a batch as dictionaries; one that Python cannot hold as a `BadRow`."""
    if not batch.num_columns:
        yield from ({} for _ in range(batch.num_rows))
        return
    try:
        rows = batch.to_pylist()
    except (ValueError, ArithmeticError):  # a text that is no UTF-8, a date that is none
        rows = [_arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    yield from rows


def _arrow_row(batch: "pa.RecordBatch | pa.Table") -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, ArithmeticError):
        return BadRow("a value that Python cannot hold")


def _wanted(columns: list[str], fields: Collection[str]) -> list[str]:
    wanted = {name if name in columns else name.split(".")[0] for name in fields} & set(columns)
    if not wanted:
        named = " or ".join(map(repr, fields))
        raise UnreadableError(f"no field {named}; its fields: {fields_shown(dict.fromkeys(columns))}")
    if twice := [name for name in sorted(wanted) if columns.count(name) > 1]:
        raise UnreadableError(f"it has the column {twice[0]!r} twice; it must have each once")
    return sorted(wanted)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def separated_rows(stream: Stream, _kind: FileKind, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of text with a delimiter, whose first row names the columns.

    A cell may be quoted, and has lines then. An empty cell is null. A row that has more or fewer cells than
    there are columns, or a quote in the wrong place, is a `BadRow`.

    Raises
    ------
    UnreadableError
        If the first row names no columns, or one twice.
    """
    csv.field_size_limit(LONGEST_ROW)
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        columns = next(reader, [])
    except csv.Error as error:
        raise UnreadableError(f"its first row names no columns ({error})") from None
    if len(set(columns)) < len(columns):
        raise UnreadableError("its first row names a column twice; it must name each once")
    number = itertools.count(1)
    while True:
        lines.begin()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            lines.again()
            yield next(number), BadRow(str(error) if lines.full else f"not a row of a table ({error})")
            continue
        if cells is None:
            return
        if len(cells) == len(columns):
            yield next(number), {name: cell or None for name, cell in zip(columns, cells, strict=True)}
        elif cells:
            yield next(number), BadRow(f"{len(cells)} cells where the first row names {len(columns)}")


class _Lines:
    """Lines as text. Those behind the first of a bad row are read again: a quote was never closed."""

    def __init__(self, stream: Stream) -> None:
        self._lines = lines_of(stream)
        self._row: list[str] = []
        self._next: list[str] = []
        self._first = True
        self._size = 0
        self.full = False

    def begin(self) -> None:
        """Begin a row."""
        self._row, self._size, self.full = [], 0, False

    def again(self) -> None:
        """Have the lines of this row again, but for the first."""
        self._next += reversed(self._row[1:])

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._next.pop() if self._next else self._read()
        self._row.append(line)
        self._size += len(line)
        if self._size > LONGEST_ROW:
            self.full = True
            raise csv.Error(TOO_LONG)
        return line

    def _read(self) -> str:
        line = next(self._lines)
        if line is None:
            self.full = True
            raise csv.Error(TOO_LONG)
        if self._first:
            line, self._first = line.removeprefix(BOM), False
        return line.decode("utf-8", "surrogateescape")
