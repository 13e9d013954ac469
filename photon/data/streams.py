"""The bytes of a file, unpacked, of which nothing is held that is larger than a bound."""

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from photon.data.file_kinds import HASHES, FileKind, other_kind
from photon.data.folders import UnreadableError, check_regular

#: Bytes of a row, and of a compressed file that is read as one piece: what is longer is a mistake, or was
#: made to fill the memory.
LONGEST_ROW = 64 << 20
LARGEST_UNPACKED = 1 << 30
TOO_LONG = f"a row of more than {LONGEST_ROW >> 20} MiB"

Stream = io.BufferedReader | gzip.GzipFile


@contextmanager
def opened(file: Path, kind: FileKind) -> Iterator[Stream]:
    """Open a file for reading, unpacked.

    Raises
    ------
    UnreadableError
        If it cannot be read, is damaged or cut short, or is something else than its name says.
    """
    check_regular(file)
    _check_hashes(file, kind)
    with _told(kind), file.open("rb") as raw, unpacked(raw, kind) as stream:
        beginning = other_kind(stream.peek(8)[:8]) if kind.text else None
        if beginning is not None:
            raise UnreadableError(f"it holds {beginning}, not text in UTF-8 as its name says")
        yield stream


def _check_hashes(file: Path, kind: FileKind) -> None:
    for name, told in kind.hashes:
        with _told(kind), file.open("rb") as raw:
            found = hashlib.file_digest(raw, HASHES[name]).hexdigest()
        if found != told.lower():
            raise UnreadableError(f"its {name} is not the one in index.json: it has changed; copy it again")


@contextmanager
def unpacked(raw: BinaryIO | io.BufferedReader, kind: FileKind) -> Iterator[Stream]:
    """Yield what an open file holds, by its packing."""
    if kind.packing is None:
        yield raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)  # type: ignore[arg-type]
    elif kind.packing == "gzip":
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    else:
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind.packing) as packed:
            yield io.BufferedReader(packed, buffer_size=1 << 16)


@contextmanager
def _told(kind: FileKind) -> Iterator[None]:
    """Say in a few words what is wrong with a file."""
    packed = f"the {kind.packing} file is"
    try:
        yield
    except EOFError:
        raise UnreadableError(f"{packed} truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableError(f"{packed} damaged ({error})") from None
    except OSError as error:
        # Those of pyarrow have no number.
        if error.errno is None and kind.packing is not None:
            cut = "truncated" in str(error).lower()
            raise UnreadableError(f"{packed} {'truncated' if cut else f'damaged ({error})'}") from None
        raise UnreadableError(error.strerror or str(error)) from None


def whole(stream: Stream, kind: FileKind, before: bytes = b"") -> bytes:
    """Return ``before`` and the rest of a stream.

    Raises
    ------
    UnreadableError
        If it is compressed, and more than `LARGEST_UNPACKED` comes out.
    """
    if kind.packing is None:
        return before + stream.read()
    pieces, size = [before], len(before)
    while piece := stream.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_UNPACKED:
            raise UnreadableError(
                f"more than {LARGEST_UNPACKED >> 30} GiB come out of it: unpack it, or give it in parts"
            )
    return b"".join(pieces)


def lines_of(stream: Stream) -> Iterator[bytes | None]:
    """Yield the lines of a stream, and None for each that is longer than `LONGEST_ROW`."""
    while line := stream.readline(LONGEST_ROW + 1):
        if len(line) <= LONGEST_ROW:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(1 << 20)
        yield None


def exactly(stream: Stream, size: int, what: str) -> bytes:
    """Return the next ``size`` bytes of a stream.

    Raises
    ------
    UnreadableError
        If there are fewer.
    """
    data = stream.read(size)
    if len(data) < size:
        raise UnreadableError(f"the {what} is truncated")
    return data


def skip(stream: Stream, size: int, what: str) -> None:
    """Pass over the next ``size`` bytes of a stream.

    Raises
    ------
    UnreadableError
        If there are fewer.
    """
    while size > 0:
        size -= len(exactly(stream, min(size, 1 << 20), what))
