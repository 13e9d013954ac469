"""The folder that an installed Photon gives to Flower."""

import shutil
from pathlib import Path

import pytest

import photon
from photon.engine.app_folder import app_folder
from photon.errors import PhotonError
from photon.flower_compat import build_bundle


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation as a wheel makes it: the package alone, with conf and metadata inside."""
    package = tmp_path / "site-packages" / "photon"
    (package / "conf").mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml", "LICENSE", "README.md", "conf/config.yaml"):
        (package / name).write_text(f"{name}, the first")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("machine code")
    monkeypatch.setattr(photon, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr("photon.engine.app_folder.conf_dir", lambda: package / "conf")
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    return package


def test_a_wheel_becomes_an_app(installed: Path) -> None:
    folder = app_folder()
    assert (folder / "pyproject.toml").read_text() == "pyproject.toml, the first"
    assert (folder / "photon" / "__init__.py").is_file()
    assert (folder / "conf" / "config.yaml").is_file()
    assert not list(folder.rglob("__pycache__"))


def test_the_app_is_made_once_and_anew_for_another_installation_of_the_same_version(installed: Path) -> None:
    first = app_folder()
    assert app_folder() == first
    (installed / "__pycache__" / "y.pyc").write_text("compiled since")
    assert app_folder() == first
    (installed / "__init__.py").write_text("the second")
    second = app_folder()
    assert second != first
    assert (second / "photon" / "__init__.py").read_text() == "the second"
    (installed / "more.py").touch()
    assert app_folder() not in {first, second}


def test_an_incomplete_installation_says_so(installed: Path) -> None:
    (installed / "pyproject.toml").unlink()
    with pytest.raises(PhotonError, match="incomplete"):
        app_folder()


def test_a_wheel_and_a_checkout_make_the_same_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silos know it by its hash, and organisations install in different ways."""
    checkout = app_folder()
    package = tmp_path / "site-packages" / "photon"
    shutil.copytree(checkout / "photon", package)
    shutil.copytree(checkout / "conf", package / "conf")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(checkout / name, package)
    monkeypatch.setattr(photon, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr("os.fsync", lambda _: None)
    made = app_folder(tmp_path / "home")
    assert made.is_relative_to(tmp_path / "home")
    assert build_bundle(made) == build_bundle(checkout)
