"""The seal of a folder: what its files are, and the hash of each, so that a changed bit is noticed."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from photon.files.hashing import hash_of_file

#: The file with the hashes of the others.
SEAL = "blake3.json"


def seal(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write down which files a folder has, and their hashes.

    Parameters
    ----------
    known
        Hashes that were taken already.
    """
    sums = {
        file.name: (known or {}).get(file.name) or hash_of_file(file)
        for file in sorted(folder.iterdir())
        if file.name != SEAL
    }
    (folder / SEAL).write_text(json.dumps(sums, indent=1))


def is_sealed(folder: Path) -> bool:
    """Tell whether a folder has a seal; those of earlier versions may have none."""
    return (folder / SEAL).is_file()


def broken(folder: Path, needed: Collection[str], only: Collection[str] | None = None) -> list[str]:
    """Return the files of a folder that are not what was written.

    Parameters
    ----------
    needed
        Files that it must have.
    only
        Files to look at; None: all, and no file of tensors may have come to them.

    Raises
    ------
    OSError, ValueError
        If the seal, or a file that it names, cannot be read.
    """
    sums = json.loads((folder / SEAL).read_text())
    if not isinstance(sums, dict):
        raise ValueError(f"{SEAL} has no hashes")
    looked_at = sums.keys() if only is None else sums.keys() & set(only)
    wrong = [name for name in sorted(looked_at) if hash_of_file(folder / name) != sums[name]]
    strangers = {file.name for file in folder.glob("*.safetensors")} - sums.keys() if only is None else set()
    return [*wrong, *sorted((set(needed) - sums.keys()) | strangers)]
