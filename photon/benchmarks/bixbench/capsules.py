"""Capsules: the data of a question, unpacked without what would give the answer away.

An archive holds a folder with the data and one with the solution's notebook. The data is what is left when
every notebook, and every folder of notebooks, is gone.
"""

import json
import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from photon.errors import PhotonError, printable
from photon.files.atomic import atomic_directory
from photon.files.hashing import hash_of, hash_of_file

#: Files of a capsule, and bytes of all of them.
_MOST_FILES, _MOST_BYTES = 20_000, 64 << 30
_CHUNK = 1 << 20
#: What packed bytes raise that are damaged, or packed in another way.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError)


def capsule_files(folder: Path) -> dict[str, Path]:
    """Return what a capsule's notebook sees in its work folder: name to file or folder."""
    return {entry.name: entry for entry in sorted(folder.iterdir())}


def unpacked(archive: Path, home: Path) -> Path:
    """Return the folder of a capsule's data, unpacked now where it is not there.

    Parameters
    ----------
    archive
        A zip file, or a folder of the same form.
    home
        Folder of unpacked capsules; one whose archive has changed is unpacked anew.

    Raises
    ------
    PhotonError
        If it cannot be read, has a path that leads out of it, or is too large.
    """
    shown = printable(archive)
    try:
        is_folder = archive.is_dir()
        key = _folder_key(archive) if is_folder else hash_of_file(archive)[:16]
        place = home / f"{archive.stem}-{key}"
        if place.is_dir():
            return place
        with atomic_directory(place, flush=False) as made:
            if is_folder:
                shutil.copytree(archive, made, dirs_exist_ok=True, symlinks=True)
            else:
                _extract(archive, made)
            _clean(made)
        return place
    except FileNotFoundError:
        raise PhotonError(f"{shown}: the capsule's archive is not there") from None
    except (*_UNREADABLE, OSError, RuntimeError, ValueError, EOFError) as error:
        raise PhotonError(f"{shown}: the capsule cannot be unpacked ({printable(error)[:200]})") from None


def _folder_key(folder: Path) -> str:
    """Return what tells the files of a folder from earlier ones: a file may have become an older one."""
    seen = [
        (entry.relative_to(folder).as_posix(), status.st_mode, status.st_size, status.st_mtime_ns)
        for entry in sorted(folder.rglob("*"))
        for status in [entry.lstat()]
    ]
    return hash_of(json.dumps(seen).encode())[:16]


def _extract(archive: Path, folder: Path) -> None:
    size = 0
    with zipfile.ZipFile(archive) as packed:
        entries = packed.infolist()
        if len(entries) > _MOST_FILES:
            raise ValueError(f"more than {_MOST_FILES} files")
        for entry in entries:
            path = _inside(entry)
            if path is None or _is_solution(path):
                continue
            target = folder.joinpath(*path.parts)
            if entry.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(entry) as source, target.open("xb") as file:
                # What the archive says of its sizes is not believed.
                while piece := source.read(_CHUNK):
                    size += len(piece)
                    if size > _MOST_BYTES:
                        raise ValueError(f"more than {_MOST_BYTES} bytes")
                    file.write(piece)


def _inside(entry: zipfile.ZipInfo) -> PurePosixPath | None:
    """Return the path of an entry within the archive; None for what a Mac puts beside its files.

    Raises
    ------
    ValueError
        If it leads out, is no plain file or folder, or no terminal could show it.
    """
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise ValueError(f"{entry.filename!r} leads out of the archive")
    if not entry.filename.isprintable():
        raise ValueError(f"{entry.filename!r} has characters that no name has")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{entry.filename!r} is neither a file nor a folder")
    return None if not path.parts or path.parts[0] == "__MACOSX" else path


def _is_solution(path: PurePosixPath) -> bool:
    return path.suffix.lower() == ".ipynb" or any("notebook" in part.lower() for part in path.parts[:-1])


def _clean(folder: Path) -> None:
    """Take solutions away, and bring the data to the top."""
    for entry in list(_walk(folder)):
        path = PurePosixPath(entry.relative_to(folder).as_posix())
        if entry.is_symlink():
            raise ValueError(f"{str(path)!r} is a link")
        if entry.is_dir() and "notebook" in entry.name.lower():
            shutil.rmtree(entry)
        elif entry.is_file() and _is_solution(path):
            entry.unlink()
    data = next(
        (
            one
            for one in sorted(_walk(folder), key=lambda one: len(one.parts))
            if one.is_dir() and "data" in one.name.lower()
        ),
        None,
    )
    if data is None:
        return
    # Aside first: the data may hold a name that its own folder has.
    aside = folder / ".photon-data"
    data.rename(aside)
    for entry in aside.iterdir():
        target = folder / entry.name
        if target.exists():
            raise ValueError(f"{entry.name!r} is there twice")
        entry.rename(target)
    aside.rmdir()
    for entry in sorted(_walk(folder), key=lambda one: -len(one.parts)):
        if entry.is_dir() and not any(entry.iterdir()):
            entry.rmdir()


def _walk(folder: Path) -> Iterator[Path]:
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(folders)
        for name in (*folders, *sorted(files)):
            path = Path(above, name)
            if path.exists() or path.is_symlink():
                yield path
