"""Folders of runs as they might have been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.telemetry.events import Event, RoundFinished, RunFinished, RunInterrupted
from photon.telemetry.log import EventLog, read_events
from photon.telemetry.summary import build_summary
from tests.telemetry.synthetic import synthetic_events

CONFIG = """\
run_dir: runs/quickstart
seed: {seed}
rounds: {rounds}
local_steps: 32
cohort: 3
model:
  name: tiny
  sequence_length: 128
  recipe:
    learning_rate: 0.003
    batch_size: 8
outer:
  _target_: torch.optim.SGD
  lr: {outer_lr}
strategy:
  _target_: photon.strategy.{strategy}
federation:
  engine: simulation
"""


def write_run(
    folder: Path, events: list[Event], *, config: str | None = None, finished: bool = True
) -> dict[str, Any]:
    """Lay out a run folder and return its summary."""
    folder.mkdir(parents=True)
    text = CONFIG.format(seed=0, rounds=10, outer_lr=1.0, strategy="Photon") if config is None else config
    (folder / "config.yaml").write_text(text)
    summary = build_summary(events, weights_sha256="ab" * 32 if finished else None)
    if finished:
        end: Event = RunFinished(time=events[-1].time + 0.5, summary=summary)
        (folder / "summary.json").write_text(json.dumps(summary))
    else:
        end = RunInterrupted(time=events[-1].time + 0.5, round=summary["rounds"], reason="Ctrl-C")
    with EventLog(folder / "events.jsonl") as log:
        for event in [*events, end]:
            log(event)
    return summary


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that tests share: only to be read."""
    folder = tmp_path_factory.mktemp("finished") / "quickstart"
    write_run(folder, list(synthetic_events()))
    return folder


@pytest.fixture
def unfinished_run(tmp_path: Path) -> Path:
    folder = tmp_path / "unfinished"
    told: list[Event] = []
    for event in synthetic_events():
        told.append(event)
        if isinstance(event, RoundFinished) and event.round == 3:
            break
    write_run(folder, told, finished=False)
    return folder


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return another run that tests share: only to be read."""
    folder = tmp_path_factory.mktemp("other") / "diloco"
    config = CONFIG.format(seed=0, rounds=12, outer_lr=0.7, strategy="Diloco")
    write_run(folder, list(synthetic_events(rounds=12, seed=3, strategy="diloco", speed=1.3)), config=config)
    return folder


@pytest.fixture
def events() -> list[Event]:
    return list(synthetic_events())


@pytest.fixture
def reread() -> Callable[[Path], list[Event]]:
    return lambda folder: read_events(folder / "events.jsonl")
