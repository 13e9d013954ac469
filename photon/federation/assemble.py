"""Find the folder that ``flwr run`` takes as Photon's app."""

import shutil
from pathlib import Path

import photon
from photon.config import conf_dir, photon_home
from photon.errors import PhotonError
from photon.state.atomic import atomic_directory


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
    folder = photon_home() / "app" / photon.__version__
    if not folder.is_dir():
        with atomic_directory(folder) as app:
            shutil.copytree(package, app / "photon", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copytree(conf_dir(), app / "conf", dirs_exist_ok=True)
            for name in ("pyproject.toml", "LICENSE", "README.md"):
                shutil.copy(package / name, app / name)
    return folder
