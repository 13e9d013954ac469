"""A tree of two SuperLinks: what the gateway of a sub-federation promises, shown on real processes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from photon.engine.deployment import COMPLETED
from photon.engine.inprocess import run_inprocess
from photon.evaluation.task_process import carry_out
from photon.federation import run_tasks
from photon.federation.run import prepare_run
from photon.node import answer
from photon.telemetry.events import RoundFinished, RoundStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.adapted import adapted, write_quiz
from tests.conftest import small_run
from tests.deployment.harness import Deployment
from tests.objective.test_sft import write_chats

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1800)]

RUN = ["strategy=worldlm", "cohort=null", "rounds=2", "evaluation.every=2", "federation.silos=2"]
TREE = "federation.tree={north: [alpha, beta], gamma: null}"


@contextmanager
def superlinks(data: Path, tmp_path: Path) -> Iterator[tuple[Deployment, Deployment]]:
    """Bring up the federation north, and the one above it, which sees north and gamma."""
    with Deployment(tmp_path / "north", data, silos=["alpha", "beta"]) as north:
        file = tmp_path / "north.yaml"
        file.write_text(
            f"name: north\nconnection: federation\nflower_home: {north.federation.home}\nsilos: 2\n"
        )
        with Deployment(tmp_path / "world", data, silos=["gamma"], gateways={"north": file}) as world:
            north.up()
            world.up()
            yield north, world


@pytest.fixture
def two_superlinks(corpus: Path, tmp_path: Path) -> Iterator[tuple[Deployment, Deployment]]:
    with superlinks(corpus, tmp_path) as both:
        yield both


def test_two_superlinks_train_as_one_process_does(
    two_superlinks: tuple[Deployment, Deployment], corpus: Path, tmp_path: Path
) -> None:
    _, world = two_superlinks
    run = world.submit(RUN)
    assert run.wait() == COMPLETED, run.log()
    deployed = json.loads((run.run_dir / "summary.json").read_text())
    tree = small_run(*RUN, TREE, data=corpus, run_dir=tmp_path / "inprocess")
    inprocess = run_inprocess(prepare_run(tree), answer, resume=False)
    assert deployed["weights_sha256"] == inprocess["weights_sha256"]
    known = {name: inprocess["perplexity"]["per_node"][name] for name in ("north", "gamma")}
    assert deployed["perplexity"]["per_node"] == pytest.approx(known)
    # The federation above knows north, and none of its members.
    assert {e.silo for e in run.events() if isinstance(e, SiloFinished)} == {"north", "gamma"}
    members = world.state_folder("north") / "north" / "events.jsonl"
    assert {e.silo for e in read_events(members) if isinstance(e, SiloFinished)} == {"alpha", "beta"}


def test_a_gateway_that_is_killed_costs_a_round_and_no_more(
    two_superlinks: tuple[Deployment, Deployment],
) -> None:
    _, world = two_superlinks
    run = world.submit([*RUN, "rounds=6", "federation.deadline=240", "evaluation.every=1000"])
    run.wait_for(lambda events: any(isinstance(e, RoundStarted) and e.round == 2 for e in events))
    world.kill("north")
    # The SuperLink takes the node back when it has missed its heartbeats, and until then turns it away.
    world.start("north", supervised=True)
    assert run.wait() == COMPLETED, run.log()
    events = run.events()
    assert [e.round for e in events if isinstance(e, RoundFinished)] == [1, 2, 3, 4, 5, 6]
    failed = {e.silo: e.reason for e in events if isinstance(e, SiloFailed)}
    assert set(failed) <= {"north"}
    # Until its SuperNode is online again, the rounds go on without it.
    last = [e.silo for e in events if isinstance(e, SiloFinished) and e.round == 6]
    assert sorted(last) == ["gamma", "north"], failed


def test_an_adapter_is_tuned_through_a_gateway_and_tasks_are_asked_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model and the questions lie with those who started the run, and nowhere else."""
    pytest.importorskip("lm_eval")
    tuning = adapted(tmp_path, "sft", write_chats)
    tasks = ["evaluation.tasks=[quiz]", f"evaluation.task_data={write_quiz(tmp_path / 'quizzes')}"]
    run_config = ["cohort=null", "rounds=2", *tuning.overrides, *tasks]
    monkeypatch.setattr(run_tasks, "_carried_out", lambda job, _: carry_out(job))
    tree = small_run(*run_config, TREE, data=tuning.data, run_dir=tmp_path / "inprocess")
    inprocess = run_inprocess(prepare_run(tree), answer, resume=False)
    with superlinks(tuning.data, tmp_path) as (_, world):
        run = world.submit([*run_config, "federation.silos=2", f"data.path={tuning.data}"])
        assert run.wait() == COMPLETED, run.log()
    deployed = json.loads((run.run_dir / "summary.json").read_text())
    assert deployed["weights_sha256"] == inprocess["weights_sha256"]
    assert deployed["tasks"]["tasks"] == inprocess["tasks"]["tasks"]
