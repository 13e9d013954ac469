"""Seals, by which a changed bit is noticed: of a folder, with the hash of each file, and of one JSON file."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from photon.files.hashing import hash_of, hash_of_file

#: The file with the hashes of the others.
SEAL = "blake3.json"
#: The key of the hash in a file that holds its own.
SEAL_KEY = "blake3"


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


def sealed_text(content: Any) -> str:
    """Return JSON text of ``content`` and its hash, for a file of its own."""
    return json.dumps({SEAL_KEY: _hash_of_json(content), "content": content})


def unsealed(text: str) -> Any:
    """Return the content of a sealed text; one of an earlier Photon has no seal, and is the content.

    Raises
    ------
    ValueError
        If it is no JSON, or not what was sealed.
    """
    read = json.loads(text)
    if not (isinstance(read, dict) and SEAL_KEY in read):
        return read
    if read.keys() != {SEAL_KEY, "content"} or _hash_of_json(read["content"]) != read[SEAL_KEY]:
        raise ValueError("it is not what was written")
    return read["content"]


def _hash_of_json(content: Any) -> str:
    return hash_of(json.dumps(content).encode())
