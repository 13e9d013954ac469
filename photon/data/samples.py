"""Rows of archives whose files are samples: tar as webdataset has it, and shards of MDS."""

import itertools
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from photon.data.file_kinds import Column, FileKind
from photon.data.folders import UnreadableError
from photon.data.rows import BOM, BadRow, parsed
from photon.data.streams import LONGEST_ROW, TOO_LONG, Stream, exactly, skip

#: Members of a sample that are read: its texts, by the fields that they become, and an object with fields.
_TEXTS = {"txt": "text", "cls": "cls"}
_FIELDS = "json"
_BLOCK = tarfile.BLOCKSIZE
#: What says something of the member that follows it.
_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
#: Bytes of the headers that say a long name or size, and samples of a shard, at most.
_LONGEST_HEADER = 1 << 20
_MOST_SAMPLES = 1 << 22


def tar_rows(stream: Stream, _kind: FileKind) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of the samples of an archive; nothing of it is unpacked to the disk.

    Files that follow each other and have one name, up to the first dot, are a sample. Its row has the fields
    of its ``.json``, its ``.txt`` as ``text`` and its ``.cls`` as ``cls``; other files are passed over.

    Raises
    ------
    UnreadableError
        If it is no archive, or damaged or cut short.
    """
    number = itertools.count(1)
    for _, members in itertools.groupby(_members(stream), key=lambda member: member[0]):
        yield next(number), _row_of((suffix, data) for _, suffix, data in members)


def _row_of(members: Iterable[tuple[str, bytes | BadRow]]) -> Any:
    texts: dict[str, str] = {}
    fields: dict[str, Any] | None = None
    fault: BadRow | None = None
    for suffix, data in members:
        if isinstance(data, BadRow):
            fault = fault or data
        elif suffix in texts or (suffix == _FIELDS and fields is not None):
            fault = fault or BadRow(f"a sample with two .{suffix}")
        elif suffix == _FIELDS:
            found = parsed(data)
            if isinstance(found, dict):
                fields = found
            else:
                fault = fault or (found if isinstance(found, BadRow) else BadRow("its .json is no object"))
        elif suffix in _TEXTS:
            texts[suffix] = _text(data)
    if fault is not None:
        return fault
    if fields is None and not texts:
        return BadRow("a sample without .txt or .json")
    own = {_TEXTS[suffix]: text for suffix, text in texts.items()}
    fields = fields or {}
    for name in own.keys() & fields.keys():
        if str(fields[name]).strip() != own[name].strip():
            fields[name] = BadRow("two values, one of them in its .json")
            del own[name]
    return {**fields, **own}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _members(stream: Stream) -> Iterator[tuple[str, str, bytes | BadRow]]:
    """Yield the sample, the suffix and the bytes of each file; of others, of folders alone nothing."""
    longer: dict[str, str] = {}
    while True:
        block = exactly(stream, _BLOCK, "archive")
        if not block.strip(b"\0"):
            # What is compressed is checked at its end.
            while stream.read(1 << 20):
                pass
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise UnreadableError(f"not a readable tar archive ({error})") from None
        if info.type in (
            tarfile.XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.XGLTYPE,
            tarfile.GNUTYPE_LONGLINK,
        ):
            if not 0 <= info.size <= _LONGEST_HEADER:
                raise UnreadableError("not a readable tar archive (a header of absurd length)")
            data = _padded(stream, info.size)
            if info.type == tarfile.XHDTYPE:
                longer |= _pax(data)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                longer["path"] = _text(data.rstrip(b"\0"))
            continue
        name, size = longer.get("path", info.name), longer.get("size", str(info.size))
        longer = {}
        if not size.isdecimal() or not int(size) < 1 << 63:
            raise UnreadableError("not a readable tar archive (a size that is no number)")
        yield from _member(stream, info, name, int(size))


def _member(
    stream: Stream, info: tarfile.TarInfo, name: str, size: int
) -> Iterator[tuple[str, str, bytes | BadRow]]:
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    sample, suffix = str(path.parent / stem), suffix.lower()
    if info.isdir():
        return
    if not info.isreg() or info.type == tarfile.GNUTYPE_SPARSE:
        kind = "a link" if info.issym() or info.islnk() else "no plain file"
        if not (info.issym() or info.islnk()):
            skip(stream, _rounded(size), "archive")
        yield sample, suffix, BadRow(f"{kind} in the archive, not followed")
    elif suffix != _FIELDS and suffix not in _TEXTS:
        skip(stream, _rounded(size), "archive")
        yield sample, suffix, b""
    elif ".." in path.parts or path.is_absolute():
        skip(stream, _rounded(size), "archive")
        yield sample, suffix, BadRow("its name leads out of the archive")
    elif size > LONGEST_ROW:
        skip(stream, _rounded(size), "archive")
        yield sample, suffix, BadRow(TOO_LONG)
    else:
        yield sample, suffix, _padded(stream, size).removeprefix(BOM)


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _padded(stream: Stream, size: int) -> bytes:
    return exactly(stream, _rounded(size), "archive")[:size]


def _pax(data: bytes) -> dict[str, str]:
    """Return the fields of an extended header: lines of ``LENGTH NAME=VALUE``, with their own length."""
    fields: dict[str, str] = {}
    while data.strip(b"\0"):
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(data):
            raise UnreadableError("not a readable tar archive (a damaged extended header)")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[_text(name)] = _text(value)
        data = data[int(length) :]
    return fields


def mds_rows(stream: Stream, kind: FileKind) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, row) of the samples of a shard of MDS.

    A shard is the number n of its samples, n + 1 places at which they begin and the last one ends, and the
    samples; all numbers have 32 bits. A sample has the sizes of those of its values that have no fixed one,
    then the values in the order of the columns.

    Raises
    ------
    UnreadableError
        If it is damaged or cut short.
    """
    samples = int.from_bytes(exactly(stream, 4, "shard"), "little")
    if samples > _MOST_SAMPLES:
        raise UnreadableError(f"the shard is damaged: it tells of {samples:,} samples")
    places = np.frombuffer(exactly(stream, 4 * (samples + 1), "shard"), dtype="<u4").astype(np.int64)
    sizes = np.diff(places)
    before = int(places[0]) - 4 * (samples + 2)
    if before < 0 or (sizes < 0).any():
        raise UnreadableError("the shard is damaged: its samples do not follow each other")
    skip(stream, before, "shard")
    for number, size in enumerate(map(int, sizes), 1):
        if size > LONGEST_ROW:
            skip(stream, size, "shard")
            yield number, BadRow(TOO_LONG)
        else:
            yield number, _sample(exactly(stream, size, "shard"), kind.columns)
    if stream.read(1):
        raise UnreadableError("the shard is damaged: it goes on behind its last sample")


def _sample(data: bytes, columns: tuple[Column, ...]) -> Any:
    sizes, position = [], 0
    for column in columns:
        if column.size is None:
            if position + 4 > len(data):
                return BadRow("a sample that is too short for its columns")
            sizes.append(int.from_bytes(data[position : position + 4], "little"))
            position += 4
        else:
            sizes.append(column.size)
    if position + sum(sizes) != len(data):
        return BadRow("a sample that is not as long as its columns say")
    row = {}
    for column, size in zip(columns, sizes, strict=True):
        row[column.name] = _value(column.encoding, data[position : position + size])
        position += size
    return row


#: Numbers of a fixed size, as `struct` calls them.
_NUMBERS = {
    **{"int8": "b", "int16": "h", "int32": "i", "int64": "q", "int": "q"},
    **{"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q"},
    **{"float16": "e", "float32": "f", "float64": "d"},
}


def _value(encoding: str, data: bytes) -> Any:
    """Return a value; its bytes where they are of a kind that no text or number is in, such as pictures."""
    if encoding in ("str", "str_decimal"):
        return _text(data)
    if encoding in ("json", "str_int", "str_float"):
        value = parsed(data)
        return None if isinstance(value, BadRow) else value
    number = _NUMBERS.get(encoding)
    if number is not None and struct.calcsize(f"<{number}") == len(data):
        return struct.unpack(f"<{number}", data)[0]
    return data
