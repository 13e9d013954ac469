"""What the name of a file says that is in it."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

PLAIN_SUFFIXES = frozenset({".md", ".txt"})
ROW_SUFFIXES: dict[str, Literal["lines", "json", "parquet"]] = {
    ".json": "json",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
}

# What holds text in a form that is not read: as plain text, its syntax would be trained.
_TABLES = (".csv", ".psv", ".ssv", ".tab", ".tsv")
_COMPRESSED = (".7z", ".br", ".bz2", ".lz4", ".lzma", ".rar", ".snappy", ".sz", ".xz", ".z", ".zip", ".zst")
_ARCHIVES = (".tar", ".tbz2", ".tgz", ".txz", ".warc", ".wet")
_BINARY = (
    *(".arrow", ".avro", ".bin", ".db", ".duckdb", ".feather", ".h5", ".hdf5", ".ipc", ".mds", ".msgpack"),
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

_READ = ".txt, .md, .jsonl, .ndjson, .json (also with .gz) or .parquet"

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
class FileKind:
    """How a file is read.

    Attributes
    ----------
    form
        "plain" text, JSON "lines", "json" (one value, or lines), or "parquet".
    gzipped
        Whether it is compressed.
    certain
        Whether the name says so. A name that says nothing, such as ``code.py``, is read as plain text if the
        file is given by itself, and left alone in a folder.
    """

    form: Literal["plain", "lines", "json", "parquet"]
    gzipped: bool = False
    certain: bool = True


def kind_of(name: str) -> FileKind | str:
    """Return how a file of this name is read, or in words why it is not.

    Case does not count, nor do numbers behind a suffix: ``x.JSONL.GZ.1`` holds JSON lines.
    """
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    while suffixes and suffixes[-1][1:].isdecimal():
        suffixes.pop()
    gzipped = bool(suffixes) and suffixes[-1] in {".gz", ".gzip"}
    if gzipped:
        suffixes.pop()
    while suffixes and suffixes[-1][1:].isdecimal():
        suffixes.pop()
    if not suffixes:
        return f"its name has no suffix that says what is in it: name it {_READ}"
    last = suffixes[-1]
    if last in PLAIN_SUFFIXES:
        return FileKind("plain", gzipped)
    if last in ROW_SUFFIXES:
        form = ROW_SUFFIXES[last]
        if form == "parquet" and gzipped:
            return "a parquet file compressed again (.parquet.gz) is not read: unpack it with gunzip"
        return FileKind(form, gzipped)
    for suffix in reversed(suffixes):
        if suffix in NOT_READ or suffix in {".gz", ".gzip"}:
            return f"a {suffix} file is not read: convert it to {_READ}"
        if suffix in ROW_SUFFIXES:
            return f"its name says {suffix} and {last}: name it {_READ}"
    return FileKind("plain", gzipped, certain=False)


def other_kind(beginning: bytes) -> str | None:
    """Return what a file is by its first bytes where that is no text, or None."""
    for mark, kind in _BEGINNINGS.items():
        if beginning.startswith(mark):
            return kind
    return None
