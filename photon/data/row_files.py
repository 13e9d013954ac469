"""Files of rows: which reader each kind of file has."""

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from photon.data.file_kinds import FileKind, Form
from photon.data.rows import json_lines, json_rows
from photon.data.samples import mds_rows, tar_rows
from photon.data.streams import Stream, lines_of, opened
from photon.data.tables import arrow_file_rows, parquet_rows, separated_rows

#: Readers of kinds that are read from the beginning to the end, also compressed or from elsewhere.
STREAMED: dict[Form, Callable[[Stream, FileKind], Iterator[tuple[int, Any]]]] = {
    "lines": lambda stream, _: json_lines(lines_of(stream)),
    "json": json_rows,
    "csv": partial(separated_rows, delimiter=","),
    "tsv": partial(separated_rows, delimiter="\t"),
    "tar": tar_rows,
    "mds": mds_rows,
}
#: Readers of kinds that are read at many places: of the file, what has the wanted fields.
PLACED: dict[Form, Callable[[Path, Collection[str]], Iterator[tuple[int, Any]]]] = {
    "parquet": parquet_rows,
    "arrow": arrow_file_rows,
}


def rows_of(file: Path, kind: FileKind, fields: Collection[str]) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of a file of rows; a row that cannot be read is a `BadRow`.

    Parameters
    ----------
    file, kind
        The file and how it is read.
    fields
        Names of the fields that are wanted.

    Raises
    ------
    UnreadableError
        If it cannot be opened, is damaged or cut short, or is something else than its name says.
    """
    if kind.form in PLACED:
        yield from PLACED[kind.form](file, fields)
        return
    with opened(file, kind) as stream:
        yield from STREAMED[kind.form](stream, kind)
