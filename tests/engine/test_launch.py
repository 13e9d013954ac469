"""Flower's engines, really executed: the same result, the true status, nothing left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from photon.engine.inprocess import run_inprocess
from photon.evaluation.task_process import carry_out
from photon.federation import run_tasks
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Event, RoundFinished, RunInterrupted, TasksEvaluated
from photon.telemetry.log import read_events
from tests.adapted import adapted, write_quiz
from tests.conftest import SMALL, small_run
from tests.objective.test_sft import write_chats

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RUN = [*SMALL, "cohort=2", "rounds=8"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment that a test can recognise its processes by, and the check that none of them is left."""
    mark = str(tmp_path / "home")
    # Whoever runs the tests in the background of a script ignores Ctrl-C, and hands that down to programs.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield os.environ | {"PHOTON_HOME": mark, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 10
    while (left := _processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == [], f"stray processes: {left}"


def _processes_with(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PHOTON_HOME") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def photon(*arguments: str, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "photon"), *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rounds_in(run_dir: Path) -> int:
    path = run_dir / "events.jsonl"
    return sum(isinstance(e, RoundFinished) for e in read_events(path)) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stopped_simulation_goes_on_with_plain_flwr_run(
    environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    """Ctrl-C leaves a resumable run and no stray process; the engines agree to the bit.

    ``flwr run .`` trains in the installed environment: Flower builds no second one for it.
    """
    whole = small_run("cohort=2", "rounds=8", data=corpus, run_dir=tmp_path / "reference")
    reference = run_inprocess(prepare_run(whole), answer, resume=False)
    run_dir = tmp_path / "run"
    training = photon(
        "train", *RUN, "federation=simulation", f"data.path={corpus}", f"run_dir={run_dir}", env=environment
    )
    while rounds_in(run_dir) < 1:
        assert training.poll() is None, training.stdout.read() if training.stdout else ""
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    said, _ = training.communicate(timeout=120)
    assert training.returncode == 1, said
    assert f"photon resume {run_dir}" in said.replace("\n", "")
    assert isinstance(read_events(run_dir / "events.jsonl")[-1], RunInterrupted)
    assert not (run_dir / "summary.json").exists(), "it was stopped before its end"
    assert _processes_with(environment["PHOTON_HOME"]) == []

    overrides = [o for o in RUN if not o.startswith(("federation=", "telemetry.display="))]
    done = flwr_run([*overrides, f"data.path={corpus}", f"run_dir={run_dir}"], tmp_path, environment)
    assert (run_dir / "summary.json").is_file(), done.stdout + done.stderr
    assert "round 8/8: validation perplexity" in done.stdout
    assert "tokens trained" in done.stdout, "the summary closes the run's log"
    assert not (tmp_path / "flower" / "runtime-envs").exists(), "Flower built a second environment"
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]
    assert summary["rounds"] == 8
    assert summary["engine"] == "simulation"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_simulation_leaves_nothing_and_goes_on(
    environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    """While it runs it has one owner; when that is killed outright, all it started ends by itself."""
    whole = small_run("cohort=2", "rounds=40", data=corpus, run_dir=tmp_path / "reference")
    reference = run_inprocess(prepare_run(whole), answer, resume=False)
    run_dir = tmp_path / "run"
    # So many that it is not over before it is killed, on a busy machine, too.
    command = [
        "train",
        *SMALL,
        "cohort=2",
        "rounds=40",
        "federation=simulation",
        f"data.path={corpus}",
        f"run_dir={run_dir}",
    ]
    training = photon(*command, env=environment)
    while rounds_in(run_dir) < 1:
        assert training.poll() is None, training.stdout.read() if training.stdout else ""
        time.sleep(0.05)
    others = (command, ["resume", str(run_dir)], ["resume", str(run_dir), "--round", "0"])
    started = [
        subprocess.Popen([str(BIN / "photon"), *other], env=environment, stderr=subprocess.PIPE, text=True)
        for other in others
    ]
    for other in started:
        _, told = other.communicate(timeout=60)
        assert other.returncode == 2
        assert told.count("\n") == 1
        assert f"still going on in another process (started by process {training.pid})" in told
    assert training.poll() is None
    training.kill()
    training.wait()
    end = time.monotonic() + 20
    while _processes_with(environment["PHOTON_HOME"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert _processes_with(environment["PHOTON_HOME"]) == []
    last = read_events(run_dir / "events.jsonl")[-1]
    assert isinstance(last, RunInterrupted)
    assert "killed" in last.reason
    resumed = photon("resume", str(run_dir), env=environment)
    said, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, said
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]


def figures_of(events: list[Event]) -> list[tuple[int, Any]]:
    return [
        (e.round, e.tasks["quiz"]["metrics"])
        for e in events
        if isinstance(e, TasksEvaluated) and not e.failure
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_simulation_that_is_killed_at_its_tasks_asks_them_once(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter tuned on conversations: weights, and figures of each round, are those of one process."""
    pytest.importorskip("lm_eval")
    tuning = adapted(tmp_path, "sft", write_chats)
    write_quiz(tmp_path / "quizzes")
    run = [*tuning.overrides, "cohort=2", "rounds=2", "evaluation.tasks=[quiz]", "evaluation.tasks_every=1"]
    monkeypatch.chdir(tmp_path)
    run += ["evaluation.task_data=quizzes"]
    with monkeypatch.context() as patch:
        patch.setattr(run_tasks, "_carried_out", lambda job, _: carry_out(job))
        whole = small_run(*run, data=tuning.data, run_dir=tmp_path / "reference")
        reference = run_inprocess(prepare_run(whole), answer, resume=False)
    run_dir = tmp_path / "run"
    where = ["federation=simulation", f"data.path={tuning.data}", f"run_dir={run_dir}"]
    training = photon("train", *SMALL, *run, *where, env=environment)
    while not (run_dir / ".tasks").exists():
        assert training.poll() is None, training.stdout.read() if training.stdout else ""
        time.sleep(0.05)
    training.kill()
    training.wait()
    end = time.monotonic() + 60
    while _processes_with(environment["PHOTON_HOME"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert _processes_with(environment["PHOTON_HOME"]) == [], "those who ask are ended, too"
    assert figures_of(read_events(run_dir / "events.jsonl")) == []
    resumed = photon("resume", str(run_dir), env=environment)
    said, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, said
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]
    events = read_events(run_dir / "events.jsonl")
    assert [e.round for e in events if isinstance(e, RoundFinished)] == [1, 2]
    figures = figures_of(events)
    assert [number for number, _ in figures] == [1, 2]
    assert figures == figures_of(read_events(tmp_path / "reference" / "events.jsonl"))
    assert not (run_dir / ".tasks").exists()


def flwr_run(
    overrides: list[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Go on with a run as ``flwr run .`` does, with a SuperLink of its own that ends with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    own = {"FLWR_HOME": str(folder / "flower"), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": port}
    environment = environment | own | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment.pop("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", None)
    try:
        return subprocess.run(
            [
                *("flwr", "run", str(ROOT), "--stream"),
                *("--run-config", f"overrides='{' '.join(overrides)}' resume=true"),
            ],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
    finally:
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("PHOTON_HOME") == environment["PHOTON_HOME"]
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if mine and "superlink" in " ".join(process.cmdline()):
                process.terminate()


@pytest.mark.timeout(300)
def test_a_failed_run_is_a_failure_and_loses_nothing(
    environment: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    """Flower's command line exits 0 when a run failed; photon says why, and exits with 2 for bad input."""
    run_dir = tmp_path / "run"
    run = prepare_run(small_run("rounds=1", data=corpus, run_dir=run_dir))
    run_inprocess(run, answer, resume=False)
    impossible = ["rounds=2", "federation=simulation", "federation.quorum=3", "training.device=cuda:7"]
    (run_dir / "config.yaml").write_text(small_run(*impossible, data=corpus, run_dir=run_dir).text)
    resuming = photon("resume", str(run_dir), env=environment)
    said, _ = resuming.communicate(timeout=200)
    assert resuming.returncode == 2, said
    assert "no CUDA device" in " ".join(said.split())
    assert CheckpointStore(run_dir / "checkpoints").rounds()[-1] == 1
