"""The folder that Photon gives to Flower, from a checkout as from a wheel."""

import shutil
from pathlib import Path

import pytest

import photon
from photon.engine.app_folder import app_folder
from photon.errors import PhotonError
from photon.flower_compat import build_bundle

BESIDE = ("pyproject.toml", "LICENSE", "README.md")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation as a wheel makes it: the package alone, with conf and metadata inside."""
    package = tmp_path / "site-packages" / "photon"
    (package / "conf").mkdir(parents=True)
    for name in ("__init__.py", *BESIDE, "conf/config.yaml"):
        (package / name).write_text(f"{name}, the first")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_text("machine code")
    monkeypatch.setattr(photon, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr("photon.engine.app_folder.conf_dir", lambda: package / "conf")
    return package


def test_a_wheel_becomes_an_app_that_goes_again(installed: Path, tmp_path: Path) -> None:
    with app_folder(tmp_path) as app:
        files = {str(file.relative_to(app)) for file in app.rglob("*") if file.is_file()}
        assert files == {*BESIDE, "photon/__init__.py", "conf/config.yaml"}
        assert (app / "pyproject.toml").read_text() == "pyproject.toml, the first"
    assert not app.exists()


def test_an_incomplete_installation_says_so(installed: Path) -> None:
    (installed / "pyproject.toml").unlink()
    with pytest.raises(PhotonError, match="incomplete"), app_folder():
        pass


def test_a_checkout_and_a_wheel_make_the_same_bundle_in_all_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silos know it by its hash, and organisations install in different ways.

    ``flwr run .`` takes the checkout with all that lies in it, `photon train` what is made of it here.
    """
    package = Path(photon.__file__).parent
    checkout = tmp_path / "checkout"
    shutil.copytree(package, checkout / "photon")
    shutil.copytree(package.parent / "conf", checkout / "conf")
    for name in (*BESIDE, ".gitignore"):
        shutil.copy(package.parent / name, checkout)
    for other in ("docs/page.md", "tests/test_x.py", "runs/a/config.yaml", ".venv/lib/x.py", "photon/x.txt"):
        (checkout / other).parent.mkdir(parents=True, exist_ok=True)
        (checkout / other).write_text("x")
    sent = build_bundle(checkout)
    monkeypatch.setattr(photon, "__file__", str(checkout / "photon" / "__init__.py"))
    with app_folder() as made:
        assert build_bundle(made) == sent
    installed = tmp_path / "site-packages" / "photon"
    shutil.copytree(package, installed)
    shutil.copytree(package.parent / "conf", installed / "conf")
    for name in BESIDE:
        shutil.copy(package.parent / name, installed)
    monkeypatch.setattr(photon, "__file__", str(installed / "__init__.py"))
    monkeypatch.setattr("photon.engine.app_folder.conf_dir", lambda: installed / "conf")
    with app_folder() as made:
        assert build_bundle(made) == sent
