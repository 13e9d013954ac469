"""What the name of a file says that is in it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any, Literal

import xxhash

#: How a file is read: as "plain" text or by rows; `photon.data.row_files` has a reader for each of these.
Form = Literal["plain", "lines", "json", "csv", "tsv", "tar", "parquet", "arrow", "mds"]
#: How it is compressed, as pyarrow calls that.
Packing = Literal["gzip", "zstd", "bz2", "brotli"]

#: What a suffix says. A new kind of file is a line here and one among the readers.
SUFFIXES: dict[str, Form] = {
    ".md": "plain",
    ".txt": "plain",
    ".json": "json",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tar": "tar",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKINGS: dict[str, Packing] = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_SHORT = {".tgz": (".tar", ".gz")}
#: Forms that are read at many places of a file, or pack what they hold themselves.
_NEVER_PACKED = ("parquet", "arrow")
#: Forms whose bytes are text.
TEXT_FORMS = ("plain", "lines", "json", "csv", "tsv")

# What holds text in a form that is not read: as plain text, its syntax would be trained.
_TABLES = (".psv", ".ssv", ".tab")
_COMPRESSED = (".7z", ".br", ".bz2", ".lz4", ".lzma", ".rar", ".snappy", ".sz", ".xz", ".z", ".zip")
_ARCHIVES = (".tbz2", ".txz", ".warc", ".wet")
_BINARY = (
    *(".avro", ".bin", ".db", ".duckdb", ".feather", ".h5", ".hdf5", ".ipc", ".mds", ".msgpack"),
    *(".npy", ".npz", ".orc", ".pb", ".pickle", ".pkl", ".pt", ".safetensors", ".sqlite", ".sqlite3"),
    *(".tfrecord", ".tfrecords"),
)
_DOCUMENTS = (
    ".doc",
    ".docx",
    ".epub",
    ".odp",
    ".ods",
    ".odt",
    ".pdf",
    ".ppt",
    ".pptx",
    ".rtf",
    ".xls",
    ".xlsx",
)
_SYNTAX = (".geojson", ".har", ".ipynb", ".json5", ".jsonc", ".plist", ".rss")
NOT_READ = frozenset({*_TABLES, *_COMPRESSED, *_ARCHIVES, *_BINARY, *_DOCUMENTS, *_SYNTAX})

#: What is read, for messages.
READ = (
    ", ".join(suffix for suffix, form in SUFFIXES.items() if form not in _NEVER_PACKED)
    + " (also with .gz or .zst), "
    + " or ".join(suffix for suffix, form in SUFFIXES.items() if form in _NEVER_PACKED)
)

#: Hashes of files that are known, by the names that indexes call them.
HASHES: dict[str, Callable[[], Any]] = {
    name: partial(hashlib.new, name) for name in hashlib.algorithms_guaranteed if "shake" not in name
} | {name: getattr(xxhash, name) for name in ("xxh32", "xxh64", "xxh128", "xxh3_64", "xxh3_128")}

# How files begin that are of these kinds, whatever their names say.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip",
    **{b"BZh%d1AY" % level: "bzip2" for level in range(1, 10)},
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1\x15": "parquet",
    b"ARROW1\x00\x00": "Arrow",
    b"%PDF-": "PDF",
    b"\xff\xfe": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
    b"\xfe\xff": "UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)",
}


@dataclass(frozen=True)
class Column:
    """A column of a shard of MDS: its name, how values are encoded, and their bytes if all have as many."""

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True)
class FileKind:
    """How a file is read.

    Attributes
    ----------
    form
        "plain" text, JSON "lines", "json" (one value, or lines), a table ("csv", "tsv", "parquet", "arrow"),
        a "tar" of samples, or a shard of "mds".
    packing
        How it is compressed, if it is.
    certain
        Whether the name says so. A name that says nothing, such as ``code.py``, is read as plain text if the
        file is given by itself, and left alone in a folder.
    columns
        Of a shard of MDS, from the index of its folder.
    hashes
        Names of `HASHES`, and what the file's are by that index.
    """

    form: Form
    packing: Packing | None = None
    certain: bool = True
    columns: tuple[Column, ...] = ()
    hashes: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> bool:
        """Whether its bytes, unpacked, are text."""
        return self.form in TEXT_FORMS


def kind_of(name: str) -> FileKind | str:
    """Return how a file of this name is read, or in words why it is not.

    Case does not count, nor do numbers behind a suffix: ``x.JSONL.GZ.1`` holds JSON lines.
    """
    suffixes = [part for suffix in PurePath(name).suffixes for part in _spelt_out(suffix.lower())]
    _drop_numbers(suffixes)
    packing = PACKINGS.get(suffixes[-1]) if suffixes else None
    if packing is not None:
        suffixes.pop()
    _drop_numbers(suffixes)
    if not suffixes:
        return f"its name has no suffix that says what is in it: name it {READ}"
    last = suffixes[-1]
    form = SUFFIXES.get(last)
    if form is not None:
        if packing is not None and form in _NEVER_PACKED:
            return f"a {last} file compressed again is not read: unpack it"
        return FileKind(form, packing)
    if last == ".mds":
        return "a shard of MDS is read with the index.json of its folder: give the folder"
    for suffix in reversed(suffixes):
        if suffix in NOT_READ or suffix in PACKINGS:
            return f"a {suffix} file is not read: convert it to {READ}"
        if SUFFIXES.get(suffix, "plain") != "plain":
            return f"its name says {suffix} and {last}: name it {READ}"
    return FileKind("plain", packing, certain=False)


def _spelt_out(suffix: str) -> tuple[str, ...]:
    return _SHORT.get(suffix, (suffix,))


def _drop_numbers(suffixes: list[str]) -> None:
    while suffixes and suffixes[-1][1:].isdecimal():
        suffixes.pop()


def other_kind(beginning: bytes) -> str | None:
    """Return what a file is by its first bytes where that is no text, or None."""
    for mark, kind in _BEGINNINGS.items():
        if beginning.startswith(mark):
            return kind
    return None
