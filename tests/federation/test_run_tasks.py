"""Tasks as a step of a run: asked when they are due, once, by the aggregator, and at no round's cost."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from photon.commands.app import app
from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation import task_process
from photon.evaluation.suites import asked_tasks
from photon.evaluation.task_process import TaskJob, carry_out
from photon.evaluation.tasks import evaluate_tasks
from photon.federation import run_tasks
from photon.federation.origin import sent_config
from photon.federation.run import go_back, prepare_run
from photon.node import answer
from photon.report.write import write_report
from photon.telemetry.events import RoundFinished, TasksEvaluated
from photon.telemetry.log import read_events

pytest.importorskip("lm_eval")

FIGURES = {"metrics": {"acc": 0.5}, "questions": 4, "shots": 0, "chance": 0.25}
EXPORTED = ["telemetry.export=true"]


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    folder = tmp_path / "task-data"
    folder.mkdir()
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(count))

    rows = [{"query": words(3), "choices": [words(1), words(2)], "gold": draw.randrange(2)} for _ in range(8)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letter.txt").write_text(words(20))
    return folder


def settings(task_data: Path, *more: str) -> list[str]:
    return ["evaluation.tasks=[quiz,letter]", f"evaluation.task_data={task_data}", *more]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TaskJob]:
    """Answer at once in the place of the process that asks, and take note of the jobs."""
    jobs: list[TaskJob] = []

    def carried_out(job: TaskJob, threads: int | None) -> None:
        jobs.append(job)
        results = {"tasks": {"quiz": FIGURES}, "suites": {}, "missing": []}
        job.output.write_text(json.dumps(results))

    monkeypatch.setattr(run_tasks, "_carried_out", carried_out)
    return jobs


def evaluations(run_dir: Path) -> list[TasksEvaluated]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, TasksEvaluated)]


def test_the_figures_are_those_of_the_export(
    run_small: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    task_data: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(run_tasks, "_carried_out", lambda job, _: carry_out(job))
    summary = run_small(*settings(task_data, "evaluation.task_limit=5"), *EXPORTED, "rounds=1")
    run_dir = tmp_path / "run"
    found = evaluate_tasks(
        run_dir / "export",
        asked_tasks("quiz,letter"),
        task_data=task_data,
        limit=5,
        batch_size=1,
        device=torch.device("cpu"),
    )
    wanted = {name: entry["metrics"] for name, entry in found["tasks"].items()}
    (event,) = evaluations(run_dir)
    assert {name: task["metrics"] for name, task in event.tasks.items()} == wanted
    assert (event.round, event.failure, event.tasks["quiz"]["questions"]) == (1, None, 5)
    assert {name: task["metrics"] for name, task in summary["tasks"]["tasks"].items()} == wanted
    written = json.loads((run_dir / "tasks.json").read_text())
    assert {name: entry["metrics"] for name, entry in written["tasks"].items()} == wanted
    assert not (run_dir / ".tasks").exists()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("more", "rounds"),
    [([], [5]), (["evaluation.tasks_every=2"], [2, 4, 5]), (["evaluation.tasks_every=9"], [5])],
    ids=["the last", "every 2", "every 9"],
)
def test_they_are_asked_when_they_are_due(
    more: list[str],
    rounds: list[int],
    run_small: Callable[..., dict[str, Any]],
    asked: list[TaskJob],
    task_data: Path,
    tmp_path: Path,
) -> None:
    run_small(*settings(task_data, *more), "rounds=5")
    assert [event.round for event in evaluations(tmp_path / "run")] == rounds
    assert [int(job.checkpoint.name[-6:]) for job in asked] == rounds


def test_a_run_that_goes_on_asks_what_was_missed_and_nothing_twice(
    small_config: Callable[..., RunConfig],
    asked: list[TaskJob],
    task_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = prepare_run(small_config(*settings(task_data, "evaluation.tasks_every=1"), "rounds=3"))
    answered = run_tasks._carried_out

    def killed(job: TaskJob, threads: int | None) -> None:
        if job.checkpoint.name.endswith("2"):
            raise KeyboardInterrupt
        answered(job, threads)

    monkeypatch.setattr(run_tasks, "_carried_out", killed)
    with pytest.raises(KeyboardInterrupt):
        run_inprocess(config, answer, resume=False)
    assert [event.round for event in evaluations(tmp_path / "run")] == [1]
    monkeypatch.setattr(run_tasks, "_carried_out", answered)
    run_inprocess(config, answer, resume=True)
    run_inprocess(config, answer, resume=True)
    assert [event.round for event in evaluations(tmp_path / "run")] == [1, 2, 3]
    trained = [
        e.round for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, RoundFinished)
    ]
    assert trained == [1, 2, 3], "the interruption cost no round"
    go_back(config, 2, lambda _: None)
    run_inprocess(config, answer, resume=True)
    assert [event.round for event in evaluations(tmp_path / "run")] == [1, 2, 3, 3]


def test_what_goes_wrong_is_one_line_and_the_run_goes_on(
    run_small: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    task_data: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(run_tasks, "command", lambda _: ["sh", "-c", "kill -9 $$"])
    summary = run_small(*settings(task_data, "evaluation.tasks_every=2"), "rounds=3")
    assert (summary["status"], summary["tasks"]) == ("finished", None)
    first, second = evaluations(tmp_path / "run")
    assert str(first.failure) == "the process that asks was ended by signal 9; memory may be short"
    assert second.tasks == {}
    monkeypatch.setattr(run_tasks, "command", lambda _: ["sh", "-c", "echo one >&2; echo two >&2; exit 1"])
    run_small(*settings(task_data), "rounds=1", name="other")
    assert [event.failure for event in evaluations(tmp_path / "other")] == ["two"]
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert "no figures of tasks" in (tmp_path / "report.html").read_text()


def test_who_was_ended_before_it_had_asked_is_asked_again(
    small_config: Callable[..., RunConfig], task_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops a run ends all of its processes, and this one is perhaps the first."""
    config = prepare_run(small_config(*settings(task_data), "rounds=1"))
    with monkeypatch.context() as patch:
        patch.setattr(run_tasks, "command", lambda _: ["sh", "-c", "kill -15 $$"])
        run_inprocess(config, answer, resume=False)
    (stopped,) = evaluations(tmp_path / "run")
    assert stopped.failure == "the process that asks was ended by signal 15"
    monkeypatch.setattr(run_tasks, "_carried_out", lambda job, _: carry_out(job))
    for _ in range(2):
        summary = run_inprocess(config, answer, resume=True)
    assert [(event.round, event.failure is None) for event in evaluations(tmp_path / "run")] == [
        (1, False),
        (1, True),
    ]
    assert summary["tasks"]["round"] == 1


@pytest.mark.slow
def test_the_process_that_asks_says_what_it_met(
    run_small: Callable[..., dict[str, Any]], task_data: Path, tmp_path: Path
) -> None:
    """Real processes: pytest -m slow tests/federation/test_run_tasks.py."""
    run_small(*settings(task_data, "evaluation.tasks_every=1"), "rounds=1")
    assert [event.failure for event in evaluations(tmp_path / "run")] == [None]
    run_small(*settings(task_data, "evaluation.task_chat=true"), "rounds=1", name="chat")
    (event,) = evaluations(tmp_path / "chat")
    assert "its tokenizer has no chat template; leave out evaluation.task_chat" in str(event.failure)


@pytest.mark.parametrize(
    ("break_it", "overrides", "told"),
    [
        (lambda d: (d / "quiz.jsonl").write_text('{"query": "x"}\n'), [], r"quiz\.jsonl: a task file needs"),
        (
            lambda d: (d / "quiz.jsonl").write_text('{"query": "x", "choices": ["a", "b"], "gold": 7}\n'),
            [],
            r"quiz\.jsonl: row 1: column 'gold'",
        ),
        (
            lambda d: (d / "quiz.jsonl").unlink(),
            [],
            r"^evaluation\.tasks quiz: no such task in evaluation\.t",
        ),
        (
            lambda d: None,
            ["evaluation.task_shots=8"],
            r"8 examples before each question.*evaluation\.task_sh",
        ),
        (
            lambda d: None,
            ["evaluation.task_data=nowhere"],
            r"^evaluation\.task_data .*nowhere: no such folder",
        ),
        pytest.param(
            lambda d: None,
            ["evaluation.task_data=null", "evaluation.tasks=[arc_eazy]"],
            r"^evaluation\.tasks arc_eazy: lm-eval has no such task",
            # lm-eval reads thousands of files to know its tasks.
            marks=pytest.mark.slow,
        ),
    ],
    ids=["columns", "gold", "missing", "shots", "folder", "unknown to lm-eval"],
)
def test_what_is_wrong_with_a_task_is_found_before_the_run(
    break_it: Callable[[Path], object],
    overrides: list[str],
    told: str,
    small_config: Callable[..., RunConfig],
    task_data: Path,
    tmp_path: Path,
) -> None:
    break_it(task_data)
    config = small_config(*settings(task_data), *overrides)
    with pytest.raises(PhotonError, match=told):
        prepare_run(config)
    assert not (tmp_path / "run").exists()


def test_the_command_ends_with_2_and_one_line(
    small_config: Callable[..., RunConfig], task_data: Path, tmp_path: Path
) -> None:
    (task_data / "quiz.jsonl").write_text("{}\n")
    file = tmp_path / "config.yaml"
    file.write_text(small_config(*settings(task_data)).text)
    with pytest.raises(PhotonError):
        CliRunner().invoke(app, ["train", "--config", str(file)], catch_exceptions=False)
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_without_the_extra_one_line_names_it(
    small_config: Callable[..., RunConfig], task_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("photon.evaluation.tasks.find_spec", lambda _: None)
    with pytest.raises(
        PhotonError, match=r"^evaluation\.tasks needs lm-eval; run: pip install '.*\[eval\]'$"
    ):
        prepare_run(small_config(*settings(task_data)))


def test_an_aggregator_without_the_tokenizer_is_told_before_the_run(
    small_config: Callable[..., RunConfig], task_data: Path
) -> None:
    config = small_config(*settings(task_data), "federation=deployment")
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": None})})
    with pytest.raises(PhotonError, match=r"set data\.path to prepared data here"):
        prepare_run(config)


def test_silos_are_not_told_of_tasks(small_config: Callable[..., RunConfig], task_data: Path) -> None:
    sent = sent_config(small_config(*settings(task_data)), 300)
    assert (sent.evaluation.tasks, sent.evaluation.task_data) == ([], None)
    assert str(task_data) not in sent.text


def test_within_a_tree_the_root_asks(
    run_small: Callable[..., dict[str, Any]], asked: list[TaskJob], task_data: Path, tmp_path: Path
) -> None:
    run_small(
        *settings(task_data),
        "federation.tree={north: [alpha, beta], south: [gamma]}",
        "rounds=1",
        "cohort=null",
    )
    assert len(asked) == 1
    assert len(evaluations(tmp_path / "run")) == 1


def test_the_report_has_a_curve_and_the_export_s_figures(
    run_small: Callable[..., dict[str, Any]], asked: list[TaskJob], task_data: Path, tmp_path: Path
) -> None:
    run_small(*settings(task_data, "evaluation.tasks_every=1"), "rounds=2", *EXPORTED)
    run_dir, page = tmp_path / "run", tmp_path / "report.html"
    found = {"tasks": {"pages": {"metrics": {"bits_per_byte": 3.25}, "questions": 1, "shots": 0}}}
    (run_dir / "export" / "tasks.json").write_text(json.dumps(found))
    write_report([run_dir], page)
    text = page.read_text()
    assert "Tasks: accuracy" in text
    assert "3.2500" in text
    (run_dir / "export" / "tasks.json").write_text('{"tasks": [')
    write_report([run_dir], page)
    assert "cannot be read; photon evaluate writes it anew" in page.read_text()


def test_a_list_may_be_a_text() -> None:
    assert task_process.FurtherEvaluation(tasks="quiz, letter").tasks == ["quiz", "letter"]  # type: ignore[arg-type]
