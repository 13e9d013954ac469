"""Paths that the system refuses, and runs of which a file is damaged: one line from every command."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from photon.cli import main
from photon.commands.jobs import Job
from photon.config.compose import compose, load
from photon.errors import PhotonError
from photon.evaluation.export import _read_summary
from photon.federation.results import show
from photon.report.run import _weights_sha256
from photon.telemetry.listing import list_runs

LONG = "x" * 300
COMMANDS = [
    ["data", "prepare", "--output", "d", "--silo", f"a={LONG}.jsonl"],
    ["data", "prepare", "--output", LONG, "--silo", "a=b.txt"],
    ["data", "prepare", "--output", "d", "--silo", "a=b.txt", "--tokenizer", LONG],
    ["data", "inspect", LONG],
    ["evaluate", LONG, "--data", "d"],
    ["generate", LONG, "--prompt", "a"],
    ["export", LONG, "out"],
    ["summary", LONG],
    ["report", LONG, "--output", "r.html"],
    ["runs", LONG],
    ["resume", LONG],
    ["ranking", LONG],
    ["watch", LONG],
    ["tune", LONG, "--silo", "a"],
    ["train", f"data.path={LONG}", "data.source=prepared", "run_dir=run"],
    ["train", f"run_dir={LONG}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command).replace(LONG, "LONG"))
def test_a_name_that_is_too_long_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("text")
    monkeypatch.setattr(sys, "argv", ["photon", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("photon: ")
    assert LONG in said[0]


SUMMARIES = [b'{"perplexity": ', b"[]", b"null", b"\xff\x00", b"[" * 100_000]


def readers(run_dir: Path) -> list[Callable[[], object]]:
    """Return what reads the summary of a run."""
    return [
        lambda: _read_summary(run_dir),
        lambda: _weights_sha256(run_dir, []),
        lambda: Job(run_dir, []).value("seconds.all"),
    ]


@pytest.mark.parametrize("data", SUMMARIES)
def test_a_damaged_summary_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "summary.json").write_bytes(data)
    for reader in readers(tmp_path):
        with pytest.raises(PhotonError, match=r"summary\.json: .*; remove "):
            reader()


def test_what_is_not_the_summary_of_a_run_is_not_shown_as_one(
    run_small: Callable[..., object], tmp_path: Path
) -> None:
    run_small("telemetry.export=false", "telemetry.display=plain", "rounds=1")
    config = load(tmp_path / "run" / "config.yaml").model_copy(update={"run_dir": str(tmp_path / "run")})
    file = tmp_path / "run" / "summary.json"
    whole = json.loads(file.read_text())
    for damaged in ("[]", "{", "{}", json.dumps({**whole, "perplexity": 5})):
        file.write_text(damaged)
        with pytest.raises(PhotonError, match=r"summary\.json: .*; remove it, and `photon resume` writes it"):
            show(config)


def test_a_pipe_in_the_place_of_events_is_listed_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "events.jsonl")
    (found,) = list_runs(tmp_path)
    assert (found.state, found.reason) == ("broken", "events.jsonl is damaged")


@pytest.mark.parametrize("override", ["hydra=1", "hydra=true", "hydra/launcher=1"])
def test_a_group_of_hydra_that_is_no_name_is_one_line(override: str) -> None:
    with pytest.raises(PhotonError, match=r"^[^\n]*hydra[^\n]*$|^config: [^\n]*$"):
        compose([override])
