"""Writes that are either there as a whole or not there at all.

Everything is written beside its place, flushed to the disk and renamed, so a crash at any moment leaves
the old content or the new one.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_bytes(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write ``data`` to ``path`` atomically, making parent folders as needed.

    Not even for a moment does the file have permissions that ``mode``, less the process's umask, lacks.
    """
    with atomic_file(path, mode=mode) as file:
        file.write(data)


@contextmanager
def atomic_file(path: Path, *, mode: int = 0o666, flush: bool = True) -> Iterator[BinaryIO]:
    """Yield a file beside ``path`` that becomes ``path`` when the block ends well.

    Parent folders are made as needed. When the block raises, the file is removed and ``path`` is left as it
    was. Without ``flush`` the content survives the death of any process, but a power cut may take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = name_beside(path)
    try:
        with open(beside, "wb", opener=lambda file, flags: os.open(file, flags, mode)) as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    if flush:
        _sync_folder(path.parent)


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically; for ``flush`` see `atomic_file`."""
    with atomic_file(path, flush=flush) as file:
        file.write(text.encode())


@contextmanager
def atomic_directory(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that becomes ``path`` when the block ends well.

    An existing ``path`` is replaced. When the block raises, the folder is removed and ``path`` is left
    as it was. Without ``flush`` the content survives the death of any process, but a power cut may take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = name_beside(path)
    beside.mkdir()
    try:
        yield beside
        if flush:
            sync_files(beside)
        if path.exists():
            old = name_beside(path)
            os.rename(path, old)
            os.rename(beside, path)
            shutil.rmtree(old)
        else:
            os.rename(beside, path)
        if flush:
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Flush every file below ``folder`` to the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync_file(file)


def remove_directory(path: Path) -> None:
    """Remove a folder so that at no moment a part of it can be taken for the whole.

    What a crash leaves of it is for `remove_leftovers`.
    """
    beside = name_beside(path)
    try:
        os.rename(path, beside)
    except FileNotFoundError:
        return
    shutil.rmtree(beside, ignore_errors=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what a crash left in ``folder`` beside its place.

    Parameters
    ----------
    name
        Of what others write nothing at the same time; by default everything there.
    """
    for path in folder.glob(f".{name}.*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """Return a new name beside ``path``, one of those that `remove_leftovers` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    # The rename itself is durable only once the folder's own entry is on the disk.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
