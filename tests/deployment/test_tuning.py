"""An adapter tuned on preferences by real silos, and the tasks of the run, in which the server dies."""

import json
from pathlib import Path

import pytest

from photon.engine.inprocess import run_inprocess
from photon.evaluation.task_process import carry_out
from photon.federation import run_tasks
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.fixed import BASE
from photon.telemetry.events import Event, RoundFinished, RunStarted, SiloFinished, TasksEvaluated
from photon.telemetry.log import read_events
from tests.adapted import adapted, write_quiz
from tests.conftest import small_run
from tests.deployment.harness import Deployment, wait_until
from tests.objective.test_dpo import write_pairs

RUN = ["rounds=2", "cohort=2", "evaluation.tasks=[quiz]", "evaluation.tasks_every=1"]

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1500)]


def figures_of(events: list[Event]) -> list[tuple[int, object]]:
    return [
        (e.round, e.tasks["quiz"]["metrics"])
        for e in events
        if isinstance(e, TasksEvaluated) and not e.failure
    ]


def test_preferences_are_tuned_and_tasks_asked_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    tuning = adapted(tmp_path, "dpo", write_pairs)
    run_config = [*RUN, *tuning.overrides, f"evaluation.task_data={write_quiz(tmp_path / 'quizzes')}"]
    with monkeypatch.context() as patch:
        patch.setattr(run_tasks, "_carried_out", lambda job, _: carry_out(job))
        config = small_run(*run_config, data=tuning.data, run_dir=tmp_path / "reference")
        reference = run_inprocess(prepare_run(config), answer, resume=False)
    with Deployment(tmp_path / "fed", tuning.data, secure=False) as deployment:
        deployment.up()
        # The tokenizer, which an aggregator needs to ask a model anything; the silos have their own data.
        run = deployment.submit([*run_config, "federation.silos=3", f"data.path={tuning.data}"])
        wait_until((run.run_dir / ".tasks").exists, "the tasks of the first round")
        (server,) = deployment.children("superexec", "flwr-serverapp")
        server.kill()
        wait_until(lambda: run.status().startswith("finished"), "Flower noticing", pause=2.0)
        assert figures_of(run.events()) == []
        run.resume()
    events = run.events()
    assert [e.resumed_from for e in events if isinstance(e, RunStarted)] == [None, 1]
    assert [e.round for e in events if isinstance(e, RoundFinished)] == [1, 2]
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert (summary["weights_sha256"], summary["engine"]) == (reference["weights_sha256"], "deployment")
    assert [number for number, _ in figures_of(events)] == [1, 2]
    assert figures_of(events) == figures_of(read_events(tmp_path / "reference" / "events.jsonl"))
    # Who goes on with a run does not know what silos have, and brings it once more.
    first = [event for event in events if isinstance(event, SiloFinished) and event.round == 1]
    assert first
    assert not any(BASE in event.group_bytes_down for event in first), "the first evaluation has brought it"
