"""Folders with an index that says which of their files hold the data, and how."""

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon.data.file_kinds import HASHES, PACKINGS, Column, FileKind, Packing
from photon.errors import printable

#: Bytes of an index, which is held whole.
_LARGEST_INDEX = 64 << 20
_ENCODING, _SIZE = 100, 1 << 32


@dataclass
class Claims:
    """What indexes say of files, by their names.

    Attributes
    ----------
    kinds
        How a file is read that is part of the data.
    apart
        Files that are no data: the indexes themselves, and what they do not name.
    """

    kinds: dict[str, FileKind] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)


class _IndexError(Exception):
    """Why an index cannot be used."""


def claims_of(root: Path, names: Sequence[str], leave: Callable[[str, str], None]) -> Claims:
    """Read the indexes among the files below ``root``.

    Parameters
    ----------
    root, names
        The folder, and names relative to it.
    leave
        Called with the name of what is left alone, and why.
    """
    claims, there = Claims(), set(names)
    for name in names:
        folder, base = posixpath.split(name)
        reader = _INDEXES.get(base)
        if reader is None:
            continue
        try:
            found = reader(root / name, folder, there)
        except _IndexError as error:
            leave(printable(name), str(error))
            claims.apart.add(name)
            continue
        if found is not None:
            claims.kinds |= found.kinds
            claims.apart |= found.apart
            for missing in sorted(set(found.kinds) - there):
                leave(printable(missing), f"it is not there, though {base} names it")
    return claims


def _saved(file: Path, folder: str, there: set[str]) -> Claims | None:
    """Return what the ``state.json`` of a folder says that ``save_to_disk`` of datasets has written."""
    info = posixpath.join(folder, "dataset_info.json")
    if info not in there:
        return None
    state = _object(file)
    files = state.get("_data_files")
    if not isinstance(files, list):
        raise _IndexError("it names no data files (_data_files); save the data set again")
    kinds = {}
    for entry in files:
        base = entry.get("filename") if isinstance(entry, dict) else None
        kinds[_inside(folder, base)] = FileKind("arrow")
    # What datasets keeps beside them are results of its own, of the same rows.
    caches = {name for name in there if posixpath.dirname(name) == folder and name.endswith(".arrow")}
    return Claims(kinds, {posixpath.join(folder, "state.json"), info, *(caches - set(kinds))})


def _splits(file: Path, folder: str, _there: set[str]) -> Claims | None:
    """Leave out the file that names the splits of such a folder: each has an index of its own."""
    name = posixpath.join(folder, "dataset_dict.json")
    return Claims(apart={name}) if isinstance(_object(file).get("splits"), list) else None


def _shards(file: Path, folder: str, there: set[str]) -> Claims | None:
    """Return what the ``index.json`` of shards of MDS says."""
    try:
        shards = _object(file).get("shards")
    except _IndexError:
        # Many a file has this name.
        return None
    if not isinstance(shards, list):
        return None
    claims = Claims(apart={posixpath.join(folder, "index.json")})
    for shard in shards:
        if not isinstance(shard, dict) or shard.get("format") != "mds":
            raise _IndexError("it names shards of another format than mds; convert them to .jsonl")
        raw, packed = (_basename(shard, key) for key in ("raw_data", "zip_data"))
        name = _inside(folder, raw)
        columns = _columns(shard)
        if name in there or packed is None:
            claims.kinds[name] = FileKind("mds", columns=columns, hashes=_hashes(shard, "raw_data"))
            if packed is not None:
                claims.apart.add(_inside(folder, packed))
        else:
            hashes = _hashes(shard, "zip_data")
            claims.kinds[_inside(folder, packed)] = FileKind(
                "mds", _packing(shard), columns=columns, hashes=hashes
            )
    return claims


_INDEXES = {"state.json": _saved, "dataset_dict.json": _splits, "index.json": _shards}


def _object(file: Path) -> dict[str, Any]:
    if not os.path.isfile(file):
        # To open a pipe would wait for ever.
        raise _IndexError("no regular file, as an index of a data set is")
    try:
        with file.open("rb") as stream:
            data = stream.read(_LARGEST_INDEX + 1)
        if len(data) > _LARGEST_INDEX:
            raise _IndexError(f"an index of more than {_LARGEST_INDEX >> 20} MiB")
        found = json.loads(data)
    except OSError as error:
        raise _IndexError(error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise _IndexError("not JSON, as an index of a data set is") from None
    if not isinstance(found, dict):
        raise _IndexError("not an object, as an index of a data set is")
    return found


def _inside(folder: str, base: Any) -> str:
    """Return the name of a file that an index names, which lies beside or below it."""
    if not isinstance(base, str) or not base or "\0" in base:
        raise _IndexError("it names a file by something else than a name")
    name = posixpath.normpath(base)
    if posixpath.isabs(name) or name.split("/")[0] in ("..", "."):
        raise _IndexError(f"it names a file outside its folder ({printable(base):.80})")
    return posixpath.join(folder, name)


def _basename(shard: dict[str, Any], key: str) -> Any:
    about = shard.get(key)
    return about.get("basename") if isinstance(about, dict) else None


def _hashes(shard: dict[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    told = shard[key].get("hashes") or {}
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise _IndexError("the hashes of its shards are no texts by names")
    for name in told:
        if name not in HASHES:
            raise _IndexError(
                f"its shards have hashes called {printable(name):.40}, which are not known; known are "
                f"{', '.join(sorted(HASHES))}"
            )
    return tuple(told.items())


def _packing(shard: dict[str, Any]) -> Packing:
    named = str(shard.get("compression"))
    packing = {**_BY_NAME, "bz2": "bz2", "br": "brotli"}.get(named.partition(":")[0])
    if packing is None:
        raise _IndexError(f"its shards are compressed with {printable(named):.40}, which is not read")
    return packing


_BY_NAME = {suffix[1:]: packing for suffix, packing in PACKINGS.items()}


def _columns(shard: dict[str, Any]) -> tuple[Column, ...]:
    lists = [shard.get(f"column_{what}") for what in ("names", "encodings", "sizes")]
    if not all(isinstance(one, list) and len(one) == len(lists[0] or ()) for one in lists) or not lists[0]:
        raise _IndexError("it does not say what the columns of its shards are")
    columns = []
    for name, encoding, size in zip(*lists, strict=True):
        if not isinstance(name, str) or not isinstance(encoding, str) or len(encoding) > _ENCODING:
            raise _IndexError("a column of its shards has no name or no encoding")
        if size is not None and not (type(size) is int and 0 <= size < _SIZE):
            raise _IndexError(f"column {printable(name):.40} of its shards has no size that can be")
        columns.append(Column(name, encoding, size))
    return tuple(columns)
