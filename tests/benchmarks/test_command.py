"""``photon bench bixbench`` as it is typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.errors import PhotonError, RunError
from tests.endpoints.server import completion, say, serving


def photon(*arguments: object) -> str:
    """Run a command; return what it prints."""
    done = CliRunner().invoke(app, ["bench", "bixbench", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


ZERO_SHOT = ("--set", "mode=zero-shot", "--set", "replicas=2")


def test_run_grade_and_report(toy: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "random", tmp_path / "model"
    assert f"{out}: 12 answers made, 0 were there" in photon(
        "run", toy, "--output", out, "--solver", "random", *ZERO_SHOT
    )
    assert "0 answers made, 12 were there" in photon(
        "run", toy, "--output", out, "--solver", "random", *ZERO_SHOT
    )
    with serving(say(completion("<answer>A</answer>"))) as server:
        agents = tmp_path / "agents.yaml"
        agents.write_text(f"agents: {{small: {{endpoint: '{server.url}', model: x}}}}\n")
        photon("run", toy, "--output", other, "--agents", agents, "--cache", tmp_path / "cache", *ZERO_SHOT)
        assert len(server.requests) == 12
        # What was answered is a recording, with which the same run needs no endpoint.
        lines = sorted(file.read_text() for file in (tmp_path / "cache").rglob("*.json"))
        (tmp_path / "recording.jsonl").write_text("".join(lines))
        agents.write_text("agents: {small: {endpoint: 'recorded:recording.jsonl', model: x}}\n")
        again = tmp_path / "again"
        photon("run", toy, "--output", again, "--agents", agents, *ZERO_SHOT)
        assert len(server.requests) == 12
        told = photon("grade", out, other, "--agents", agents, "--judge", "small")
    assert "random" in told
    assert "small" in told
    photon("grade", other, again)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (other, again))
    assert first["regimes"] == second["regimes"]
    assert "3 pages" in photon("report", out, other, "--output", tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


def test_recorded_predictions(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("uuid,question,predicted,target,unsure\n1,Q,B,B,C\n2,Q,C,A,C\n")
    assert "0.500" in photon("grade", file)


def test_answers_that_are_missing_are_told(toy: Path, tmp_path: Path) -> None:
    agents = tmp_path / "agents.yaml"
    agents.write_text("agents: {gone: {endpoint: 'http://127.0.0.1:9/v1', model: x, retries: 0}}\n")
    with pytest.raises(RunError, match="12 answers are missing; the same command makes them alone"):
        photon("run", toy, "--output", tmp_path / "out", "--agents", agents, *ZERO_SHOT)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "{toy}", "--output", "{out}"), "--agent needs --agents FILE"),
        (("run", "{toy}", "--output", "{out}", "--solver", "randm"), "did you mean 'random'"),
        (("run", "{toy}", "--output", "{out}", "--solver", "reference"), "--code has the cells"),
        (
            ("run", "{toy}", "--output", "{out}", "--solver", "random", "--agents", "x"),
            "is of --solver model",
        ),
        (
            ("run", "{toy}", "--output", "{out}", "--solver", "reference", "--code", "x.json"),
            "cannot be read",
        ),
        (("run", "{toy}", "--output", "{out}", "--solver", "random", "--set", "step=1"), "step: unknown key"),
        (("run", "hub:x", "--output", "{out}", "--solver", "random"), "expected hub:OWNER/NAME"),
        (("run", "{toy}/none", "--output", "{out}", "--solver", "random"), "cannot read the questions"),
        (("grade", "{out}"), "no run of this benchmark"),
        (("grade", "{out}", "--judge", "x"), "--judge needs --agents FILE"),
        (("report", "{out}"), "no results"),
        (("report", "{out}", "--output", "x.pdf"), "ends in .html"),
    ],
)
def test_mistakes_are_named(toy: Path, tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(PhotonError, match=told):
        photon(*(text.format(toy=toy, out=tmp_path / "out") for text in arguments))


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PhotonError, match=r"pip install 'photon-fl\[bench\]'"):
        photon("grade", "x")
