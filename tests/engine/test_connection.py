"""Which SuperLink a deployed run is given to."""

from pathlib import Path

import pytest

from photon.engine.deployment import deployed_connection
from photon.errors import PhotonError

SETTINGS = """
[superlink]
default = "prod"
local = { address = ":local:" }
prod = { address = "aggregator.example.org:8000", root-certificates = "/ca.crt" }
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path


def test_the_named_or_the_default_connection_is_taken(home: Path) -> None:
    (home / "config.toml").write_text(SETTINGS)
    assert deployed_connection(None).name == "prod"
    assert deployed_connection("prod").name == "prod"


@pytest.mark.parametrize(
    ("settings", "name", "said"),
    [
        (None, None, "does not exist"),
        ("nonsense", None, "names no SuperLinks"),
        (SETTINGS, "local", "no SuperLink of that name"),
        (SETTINGS, "prd", "there are: local, prod"),
    ],
)
def test_anything_else_is_refused(home: Path, settings: str | None, name: str | None, said: str) -> None:
    if settings is not None:
        (home / "config.toml").write_text(settings)
    with pytest.raises(PhotonError, match=said):
        deployed_connection(name)
