"""The list of runs: states, order, width, and folders that are broken."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.telemetry.listing import Listed, list_runs


def event(name: str, time: float, **fields: Any) -> str:
    return json.dumps({"event": name, "time": time, **fields}) + "\n"


def write(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


START = event("run_started", 1e9, strategy="Photon", model="tiny", rounds=4, resumed_from=None)


def rounds(last: int, time: float) -> str:
    told = [event("round_finished", time + number, round=number) for number in range(1, last + 1)]
    return "".join([*told, event("evaluated", time + last, round=last, loss=2.5, perplexity=12.18)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    write(root / "old", START, rounds(4, 1e9), event("run_finished", 1e9 + 9, summary={}))
    stopped = event("run_interrupted", 1e9 + 99, round=2, reason="stopped by the user")
    write(root / "stopped", START, rounds(2, 1e9 + 10), stopped)
    error = event("run_interrupted", 1e9 + 199, round=1, reason="RunError: too few silos\nand more")
    write(root / "sweep" / "0-seed=0", START, rounds(1, 1e9 + 100), error)
    write(root / "killed", START, rounds(3, 1e9 + 300), event("run_star", 1e9 + 310)[:-8])
    write(root / "damaged", START, '{"event": "round_finished", "round": \n')
    write(root / "lies", START, event("round_finished", "noon", round=1))  # type: ignore[arg-type]
    (root / "empty").mkdir()
    (root / "begun").mkdir()
    (root / "begun" / "config.yaml").write_text("")
    os.utime(root / "begun", (1e9 + 500, 1e9 + 500))
    return root


def test_each_run_is_told_with_its_state_newest_first_and_a_broken_one_is_a_line(folder: Path) -> None:
    found = list_runs(folder)
    assert {run.name: (run.state, run.done, run.reason) for run in found} == {
        "begun": ("broken", 0, "no events"),
        "killed": ("failed", 3, "it was killed"),
        "sweep/0-seed=0": ("failed", 1, "RunError: too few silos"),
        "stopped": ("interrupted", 2, "stopped by the user"),
        "old": ("finished", 4, None),
        "damaged": ("broken", 0, "events.jsonl is damaged"),
        "lies": ("broken", 0, "events.jsonl is damaged"),
    }
    known = [run.name for run in found if run.state != "broken"]
    assert known == ["killed", "sweep/0-seed=0", "stopped", "old"]
    (old,) = list_runs(folder / "old")
    assert old == Listed("old", "finished", "Photon", "tiny", 4, 4, 2.5, 12.18, 1e9 + 9)


def test_a_run_that_went_on_counts_from_where_it_did(tmp_path: Path) -> None:
    again = event("run_started", 1e9 + 50, strategy="Photon", model="tiny", rounds=8, resumed_from=2)
    write(tmp_path / "run", START, rounds(3, 1e9), again)
    (run,) = list_runs(tmp_path)
    assert (run.done, run.rounds) == (2, 8)


def test_a_run_at_work_is_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.telemetry.listing.is_going_on", lambda run: run.name == "killed")
    assert [run.name for run in list_runs(folder) if run.state == "running"] == ["killed"]


@pytest.mark.parametrize("width", [60, 120])
def test_the_list_fits_a_narrow_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(app, ["runs", str(folder)])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= width
    for told in ("finished", "3/4", "2.500", "12.2"):
        assert told in result.output


def test_the_list_for_programs(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["runs", str(folder), "--json"])
    told = {run["name"]: run for run in json.loads(result.output)}
    assert (told["old"]["state"], told["old"]["loss"], told["old"]["rounds"]) == ("finished", 2.5, 4)
    assert "no runs in it" in CliRunner().invoke(app, ["runs", str(folder / "empty")]).output
    gone = CliRunner().invoke(app, ["runs", str(tmp_path / "nowhere")])
    assert gone.exit_code != 0
    assert "no such folder" in str(gone.exception)
