"""The files of a folder of text, and what in it is left alone."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from photon.data.file_kinds import READ, FileKind, kind_of
from photon.data.indexed import claims_of
from photon.errors import PhotonError, printable

_ODD = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class UnreadableError(Exception):
    """Why one file cannot be used."""


def check_regular(file: Path) -> None:
    """Refuse what is no regular file, before it is opened: opening a pipe waits for ever.

    Raises
    ------
    UnreadableError
        With the reason.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from None
    if not stat.S_ISREG(mode):
        raise UnreadableError(f"{_ODD.get(stat.S_IFMT(mode), 'something else')}, not a regular file")


def files_of(path: Path, leave: Callable[[str, str], None]) -> list[tuple[Path, str, FileKind]]:
    """List the files to read, the names they go by in messages and in the manifest, and how to read them.

    Parameters
    ----------
    path
        A file, which may be of any kind that is read, or a folder, of which the files are listed whose names
        or an index say what is in them.
    leave
        Called with the name of what is left alone, and why.

    Raises
    ------
    PhotonError
        If ``path`` is not there, or is neither a file nor a folder.
    """
    if os.path.isdir(path):
        return _listed(path, leave)
    try:
        check_regular(path)
    except UnreadableError as error:
        said = f"cannot be read ({error})" if os.path.lexists(path) else "does not exist"
        raise PhotonError(f"{printable(path)} {said}: give a file or a folder with text") from None
    kind = kind_of(path.name)
    if isinstance(kind, str):
        leave(printable(path.name), kind)
        return []
    return [(path, printable(path.name), kind)]


def _listed(root: Path, leave: Callable[[str, str], None]) -> list[tuple[Path, str, FileKind]]:
    files, unknown, refused = [], Counter[str](), Counter[str]()
    names = list(_walk(root, leave))
    claims = claims_of(root, names, leave)
    for name in names:
        if name in claims.apart:
            continue
        suffix = Path(name).suffix.lower() or "no suffix"
        kind = claims.kinds.get(name) or kind_of(Path(name).name)
        if isinstance(kind, str):
            refused[printable(suffix)] += 1
        elif not kind.certain:
            unknown[printable(suffix)] += 1
        else:
            files.append((name, kind))
    if refused:
        verb = "is" if refused.total() == 1 else "are"
        leave(".", f"{_count(refused)} that {verb} not read: convert or name them {READ}")
    if unknown:
        leave(".", f"{_count(unknown)} left alone; give one by its own name to read it as plain text")
    return [(root / name, printable(name), kind) for name, kind in sorted(files, key=lambda file: file[0])]


def _count(suffixes: Counter[str]) -> str:
    total = suffixes.total()
    kinds = ", ".join(sorted(suffixes)[:8])
    return f"{total} file{'' if total == 1 else 's'} of other kinds ({kinds})"


def _walk(root: Path, leave: Callable[[str, str], None]) -> Iterator[str]:
    """Walk the files below ``root``, as names relative to it; hidden ones are counted alone."""
    hidden = 0
    folders = [""]
    while folders:
        below = folders.pop()
        try:
            with os.scandir(root / below) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            leave(printable(below or "."), error.strerror or str(error))
            continue
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_symlink() and os.path.isdir(entry):
                leave(printable(name), "a link to a folder, not followed; give the folder itself to read it")
            else:
                yield name
    if hidden:
        leave(
            ".",
            f"{hidden} hidden {'file or folder' if hidden == 1 else 'files or folders'} (.name) left alone",
        )
