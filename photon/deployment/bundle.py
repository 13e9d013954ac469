"""What is in an application that Flower has bundled (a FAB), read without a file of it touching the disk.

A bundle comes from a stranger. It is read within bounds, and a name in it that could mean anything but a file
below one folder makes it no bundle at all.
"""

import difflib
import hashlib
import re
import stat
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from photon.errors import PhotonError

#: Bytes of a bundle, packed and unpacked. Flower takes none of more than 10 MB, and stores files as they are.
LARGEST = 16 * 2**20
MOST_FILES = 5000

#: What Flower calls an application, its version and the object in it; nothing of them can leave a folder.
APP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}/[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
VERSION = re.compile(r"(?=.{1,64}\Z)[A-Za-z0-9]+([.+-][A-Za-z0-9]+)*")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_.+ -]{1,255}")


@dataclass(frozen=True)
class Bundle:
    """An application as it is sent.

    Attributes
    ----------
    sha256
        Of the whole file.
    app, version, clientapp
        What its ``pyproject.toml`` says: ``publisher/name``, the version, ``module:object``.
    files
        Path to content, without what Flower adds.
    """

    sha256: str
    app: str
    version: str
    clientapp: str
    files: Mapping[str, bytes]

    @classmethod
    def read(cls, content: bytes) -> "Bundle":
        """Read a bundle.

        Raises
        ------
        PhotonError
            If it is none, is too large, or holds a name or a kind of file that it must not.
        """
        if len(content) > LARGEST:
            raise PhotonError(f"bundle: it has {len(content):,} bytes, more than {LARGEST:,}")
        try:
            with zipfile.ZipFile(BytesIO(content)) as archive:
                files = _contents(archive)
        except PhotonError:
            raise
        except Exception as error:
            # Whatever a broken archive makes of Python's reader.
            raise PhotonError(f"bundle: it is not a Flower app bundle ({type(error).__name__})") from error
        return cls(digest(content), *_names_in(files.get("pyproject.toml", b"")), files)

    def is_at(self, folder: Path) -> bool:
        """Tell whether a folder holds the files of this bundle, to the byte, and nothing else."""
        if folder.is_symlink() or not folder.is_dir():
            return False
        found = {}
        for path in folder.rglob("*"):
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                return False
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path
        return found.keys() == self.files.keys() and all(
            path.stat().st_size == len(self.files[name]) and path.read_bytes() == self.files[name]
            for name, path in found.items()
        )

    def write(self, folder: Path) -> None:
        """Write all files below an empty folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(frozen=True)
class Change:
    """What has become of one file: ``added``, ``removed`` or ``changed``, by how many lines."""

    path: str
    kind: str
    more: int
    less: int


def digest(content: bytes) -> str:
    """Return the SHA-256 by which a bundle is known."""
    return hashlib.sha256(content).hexdigest()


def changes(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> list[Change]:
    """Return in which files two bundles differ. A line that only moved is not counted."""
    found = []
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path), after.get(path)
        if old == new:
            continue
        kind = "added" if old is None else "removed" if new is None else "changed"
        lines = Counter((old or b"").splitlines()), Counter((new or b"").splitlines())
        found.append(Change(path, kind, (lines[1] - lines[0]).total(), (lines[0] - lines[1]).total()))
    return found


def difference(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the lines of a unified diff; what a terminal would obey is shown as an escape."""
    for change in changes(before, after):
        old, new = (
            side.get(change.path, b"").decode("utf-8", "backslashreplace").split("\n")
            for side in (before, after)
        )
        for line in difflib.unified_diff(old, new, f"a/{change.path}", f"b/{change.path}", lineterm=""):
            yield "".join(sign if sign.isprintable() or sign == "\t" else ascii(sign)[1:-1] for sign in line)


def _contents(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Return the files of an archive; what a header says of a size is not believed."""
    entries = archive.infolist()
    if len(entries) > MOST_FILES:
        raise PhotonError(f"bundle: it has {len(entries):,} files, more than {MOST_FILES:,}")
    files: dict[str, bytes] = {}
    left = LARGEST
    for entry in entries:
        name = entry.filename
        # Of systems without file types there are none; else a plain file, no link and no device.
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise PhotonError(f"bundle: {name!a:.200} is packed in a way that Flower does not use")
        if kind not in (0, stat.S_IFREG) or not all(
            _PART.fullmatch(part) and part.strip(". ") for part in name.split("/")
        ):
            raise PhotonError(f"bundle: {name!a:.200} is not the name of a plain file below a folder")
        with archive.open(entry) as file:
            content = file.read(left + 1)
        left -= len(content)
        if left < 0:
            raise PhotonError(f"bundle: unpacked it has more than {LARGEST:,} bytes")
        if name in files:
            raise PhotonError(f"bundle: it has {name} twice")
        files[name] = content
    for name in files:
        if any(str(folder) in files for folder in Path(name).parents):
            raise PhotonError(f"bundle: {name} lies in a folder that is a file")
    return {name: content for name, content in files.items() if not name.startswith(".info/")}


def _names_in(pyproject: bytes) -> tuple[str, str, str]:
    try:
        settings: dict[str, Any] = tomllib.loads(pyproject.decode())
        flower = settings["tool"]["flwr"]["app"]
        app = f"{flower['publisher']}/{settings['project']['name']}"
        version, clientapp = settings["project"]["version"], flower["components"]["clientapp"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PhotonError(f"bundle: its pyproject.toml names no Flower app ({error!a:.200})") from error
    for pattern, name in ((APP, app), (VERSION, version), (_REFERENCE, clientapp)):
        if not isinstance(name, str) or not pattern.fullmatch(name):
            raise PhotonError(f"bundle: its pyproject.toml says {name!a:.200}, which is no name of an app")
    return app, version, clientapp
