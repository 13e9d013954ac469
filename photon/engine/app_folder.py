"""Find the folder that ``flwr run`` takes as Photon's app."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import photon
from photon.config.folders import conf_dir, photon_home
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory

#: What a wheel has inside the package, and a checkout beside it.
_BESIDE = ("pyproject.toml", "LICENSE", "README.md")


def app_folder(home: Path | None = None) -> Path:
    """Return the checkout, or, for an installed wheel, a copy of the package as a Flower app.

    Parameters
    ----------
    home
        Where copies lie; None: in the folder of what runs share.

    Raises
    ------
    PhotonError
        If the installation lacks the app's ``pyproject.toml``.
    """
    source = source_folder()
    package = Path(photon.__file__).parent
    if source != package:
        return source
    # Two installations may bear one version, and what is there may be of another one.
    folder = (home or photon_home()) / "app" / f"{photon.__version__}-{_digest(package)}"
    if not folder.is_dir():
        with atomic_directory(folder) as app:
            shutil.copytree(package, app / "photon", ignore=_left_out(package))
            shutil.copytree(conf_dir(), app / "conf", dirs_exist_ok=True)
            for name in _BESIDE:
                shutil.copy(package / name, app / name)
    return folder


def source_folder() -> Path:
    """Return the folder with ``pyproject.toml``: the checkout, or the package that a wheel has installed.

    Raises
    ------
    PhotonError
        If there is none.
    """
    package = Path(photon.__file__).parent
    if (package.parent / "pyproject.toml").is_file() and (package.parent / "conf").is_dir():
        return package.parent
    if not (package / "pyproject.toml").is_file():
        raise PhotonError(
            f"{package}: the installation is incomplete (no pyproject.toml); "
            f"install {photon.DISTRIBUTION} again"
        )
    return package


def _left_out(package: Path) -> Callable[[str, list[str]], set[str]]:
    """Return what `shutil.copytree` leaves out, so that the app is the one that a checkout is."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        beside = {*_BESIDE, "conf"} if Path(folder) == package else set()
        return {"__pycache__", *beside} & set(names)

    return ignore


def _digest(package: Path) -> str:
    """Return a short digest of the names and contents of a package's files."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
