import pytest

from photon.telemetry.events import Event
from tests.telemetry.synthetic import synthetic_events


@pytest.fixture
def events() -> list[Event]:
    return list(synthetic_events())
