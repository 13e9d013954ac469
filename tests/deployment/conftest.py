"""What tests of the two sides of a deployment share."""

import os

import pytest


@pytest.fixture
def environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set what their programs are to have; afterwards it is as it was."""
    for name in ("FLWR_HOME", "PHOTON_HOME", "NO_PROXY", "FLWR_TELEMETRY_ENABLED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
