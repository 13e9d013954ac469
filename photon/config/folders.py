"""Two folders: what runs share, and the configuration's defaults."""

import os
from pathlib import Path

import photon
from photon.errors import PhotonError


def photon_home() -> Path:
    """Return the folder of what runs share: ``$PHOTON_HOME``, or ``~/.photon``."""
    return Path(os.environ.get("PHOTON_HOME") or Path.home() / ".photon").absolute()


def conf_dir() -> Path:
    """Return ``conf/``: beside the package in a checkout or app bundle, inside it in a wheel."""
    package = Path(photon.__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise PhotonError(f"conf/config.yaml is missing beside {package}; reinstall photon")
