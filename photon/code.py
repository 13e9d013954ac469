"""Which code runs here, so that a process that this one starts runs the very same."""

import hashlib
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

CODE_ROOT = Path(__file__).resolve().parents[1]


def command(module: str) -> list[str]:
    """Return the command that runs one of Photon's modules with this interpreter."""
    # -P: a package of the same name in the current folder is not what is meant.
    return [sys.executable, "-P", "-m", module]


def environment(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment with the folder that Photon was imported from first on the path.

    Flower runs a bundle of the code that it unpacks to a folder of its own, whatever else is installed.
    """
    path = [str(CODE_ROOT), base.get("PYTHONPATH", "")]
    return {**base, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def fingerprint() -> str:
    """Return a hash of Photon's source, of where it lies, and of the interpreter that runs it."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return _hash_of(tuple((file, (at := file.stat()).st_mtime_ns, at.st_size) for file in files))


@lru_cache(maxsize=2)
def _hash_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Return it for these files, read again when one has another time of change or size."""
    digest = hashlib.sha256(f"{sys.executable}\0{sys.version}\0{CODE_ROOT}".encode())
    package = Path(__file__).parent
    for file, _, _ in files:
        content = file.read_bytes()
        digest.update(f"\0{file.relative_to(package)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
