"""Make the folder that ``flwr run`` takes as Photon's app."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import photon
from photon.config.folders import conf_dir
from photon.errors import PhotonError

#: What a wheel has inside the package, and a checkout beside it.
_BESIDE = ("pyproject.toml", "LICENSE", "README.md")


@contextmanager
def app_folder(within: Path | None = None) -> Iterator[Path]:
    """Make a folder with what a bundle is made of and nothing else, and remove it at the end.

    Flower looks at every file of the folder that it is given. A checkout has an environment beside its
    package, and runs: a hundred thousand files of which a few hundred travel.

    Parameters
    ----------
    within
        Where it is made; None: where temporary files go.

    Raises
    ------
    PhotonError
        If the installation lacks the app's ``pyproject.toml``.
    """
    source = source_folder()
    package = Path(photon.__file__).parent
    with tempfile.TemporaryDirectory(prefix="photon-app-", dir=within) as name:
        app = Path(name)
        shutil.copytree(package, app / "photon", ignore=_left_out(package))
        shutil.copytree(conf_dir(), app / "conf")
        for beside in _BESIDE:
            shutil.copy(source / beside, app / beside)
        yield app


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
    """Return what `shutil.copytree` leaves out, so that a wheel's app is the one that a checkout is."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        beside = {*_BESIDE, "conf"} if Path(folder) == package else set()
        return {"__pycache__", *beside} & set(names)

    return ignore
