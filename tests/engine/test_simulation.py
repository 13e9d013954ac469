"""A simulation whose Ray did not come up in time is started again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.deployment import COMPLETED
from photon.engine.simulation import RAY_WAS_LATE, Simulation
from photon.errors import RunError
from photon.telemetry.events import Notice
from photon.telemetry.log import EventLog

FAILED = "Flower reports finished:failed"


class Scripted:
    """A connection whose runs end as they are told to."""

    def __init__(self, ends: list[tuple[str, str]], begun: Callable[[], None]) -> None:
        self.ends = iter(ends)
        self.begun = begun
        self.submitted: list[bool] = []
        self.logged = ""

    def submit(self, config: RunConfig, *, resume: bool, settings: Path, resources: str) -> str:
        self.submitted.append(resume)
        return str(len(self.submitted))

    def follow(self, *_: Any) -> str:
        end, self.logged = next(self.ends)
        self.begun()
        return end

    def log(self, run_id: str) -> str:
        return self.logged


@pytest.fixture
def simulated(
    small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Scripted]:
    """Return a function that runs a simulation over a scripted connection, and returns the connection."""

    @contextmanager
    def superlink(_: Simulation) -> Iterator[Any]:
        (tmp_path / "flower").mkdir(exist_ok=True)
        yield SimpleNamespace(poll=lambda: None)

    def work(*ends: tuple[str, str], begun: Callable[[], None] = lambda: None) -> Scripted:
        monkeypatch.setattr(Simulation, "superlink", superlink)
        simulation = Simulation(small_config(f"run_dir={tmp_path}"), resume=False)
        connection = Scripted(list(ends), begun)
        simulation.connection = connection  # type: ignore[assignment]
        simulation.run()
        return connection

    return work


def test_it_is_started_again_when_ray_was_late(
    simulated: Callable[..., Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    connection = simulated((FAILED, f"Exception: {RAY_WAS_LATE}. This"), (COMPLETED, ""))
    assert connection.submitted == [False, False]
    assert capsys.readouterr().err.count("starting again") == 1


def test_at_the_third_time_it_says_what_was_wrong(simulated: Callable[..., Scripted]) -> None:
    late = (FAILED, f"Exception: {RAY_WAS_LATE}. This")
    with pytest.raises(RunError, match=r"Ray did not start within 30 s: other work .* busy; see .*app\.log"):
        simulated(late, late, late)


def test_what_failed_otherwise_is_not_started_again(simulated: Callable[..., Scripted]) -> None:
    with pytest.raises(RunError, match=FAILED):
        simulated((FAILED, "Exception: something else"))


def test_a_run_that_has_begun_is_not_started_again(
    simulated: Callable[..., Scripted], tmp_path: Path
) -> None:
    """Its folder holds its first events, and maybe rounds; `photon resume` goes on with them."""

    def begun() -> None:
        with EventLog(tmp_path / "events.jsonl") as log:
            log(Notice(level="info", message="it has begun"))

    with pytest.raises(RunError, match=FAILED):
        simulated((FAILED, RAY_WAS_LATE), begun=begun)
