"""Find the folder that ``flwr run`` takes as Photon's app."""

import hashlib
import shutil
from pathlib import Path

import photon
from photon.config.folders import conf_dir, photon_home
from photon.errors import PhotonError
from photon.files.atomic import atomic_directory


def app_folder() -> Path:
    """Return the checkout, or, for an installed wheel, a copy of the package as a Flower app.

    Raises
    ------
    PhotonError
        If the installation lacks the app's ``pyproject.toml``.
    """
    package = Path(photon.__file__).parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "conf").is_dir():
        return checkout
    if not (package / "pyproject.toml").is_file():
        raise PhotonError(f"{package}: the installation is incomplete (no pyproject.toml); reinstall photon")
    # Two installations may bear one version, and what is there may be of another one.
    folder = photon_home() / "app" / f"{photon.__version__}-{_digest(package)}"
    if not folder.is_dir():
        with atomic_directory(folder) as app:
            shutil.copytree(package, app / "photon", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(conf_dir(), app / "conf", dirs_exist_ok=True)
            for name in ("pyproject.toml", "LICENSE", "README.md"):
                shutil.copy(package / name, app / name)
    return folder


def _digest(package: Path) -> str:
    """Return a short digest of the names and contents of a package's files."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
