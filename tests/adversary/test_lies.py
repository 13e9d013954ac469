"""One bad reply costs a reply, never the run: whatever a silo says, the others train on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from photon.client_app import answer
from photon.engine.inprocess import InProcessGrid
from photon.federation.run import prepare_run, run_federation
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Evaluated, Event, Notice, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.adversary.harness import LIAR, run_with
from tests.adversary.lies import DESCRIBE, EVALUATE, TRAIN, Lie, read_body, write_body
from tests.conftest import small_run

#: Rounds as short as they can be, in which nobody is kept out for what it said before.
SHORT = [
    "cohort=3",
    "local_steps=1",
    "model.recipe.warmup_steps=1",
    "training.batch_size=2",
    "evaluation.sequences=2",
    "federation.admission.quarantine_after=null",
]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Event]], Path]:
    """What happened in each round of a run in which alpha lies in its replies."""
    run_dir = tmp_path_factory.mktemp("lies") / "run"
    every = ("evaluation.every=1000", f"rounds={len(TRAIN) + 1}")
    config = small_run(*SHORT, *every, data=corpus, run_dir=run_dir)
    return run_with("train", TRAIN, config), run_dir


@pytest.fixture(scope="module")
def evaluated(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Event]]:
    """What happened in each round of a run in which alpha lies in its evaluations."""
    run_dir = tmp_path_factory.mktemp("lies") / "run"
    config = small_run(*SHORT, f"rounds={len(EVALUATE) + 1}", data=corpus, run_dir=run_dir)
    return run_with("evaluate", EVALUATE, config)


def test_there_are_enough_of_them_and_each_has_its_name() -> None:
    for lies in (TRAIN, EVALUATE):
        assert len({lie.name for lie in lies}) == len(lies)
    assert len(TRAIN) + len(EVALUATE) + len(DESCRIBE) >= 130


@pytest.mark.parametrize("lie", TRAIN, ids=lambda lie: lie.name[:40])
def test_a_lie_in_a_reply_costs_the_reply(lie: Lie, trained: tuple[dict[str, list[Event]], Path]) -> None:
    events = trained[0][lie.name]
    failed = [event for event in events if isinstance(event, SiloFailed)]
    assert [event.silo for event in failed] == [LIAR]
    assert re.search(lie.because, failed[0].reason), failed[0].reason
    assert len(failed[0].reason) <= 1000
    assert failed[0].reason.isprintable()
    assert [event.silo for event in events if isinstance(event, SiloFinished)] == ["beta", "gamma"]


def test_after_all_lies_the_model_is_that_of_the_others(
    trained: tuple[dict[str, list[Event]], Path],
) -> None:
    run_dir = trained[1]
    checkpoint, passed_over = CheckpointStore(run_dir / "checkpoints").latest()
    assert not passed_over
    assert checkpoint.state.round == len(TRAIN) + 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.load_params().values())
    ledger = checkpoint.state.ledger
    assert (ledger[LIAR].last_round, ledger["beta"].last_round) == (1, len(TRAIN) + 1)
    assert (run_dir / "events.jsonl").stat().st_size < 5000 * len(TRAIN)


@pytest.mark.parametrize("lie", EVALUATE, ids=lambda lie: lie.name[:40])
def test_a_lie_in_an_evaluation_costs_the_evaluation(lie: Lie, evaluated: dict[str, list[Event]]) -> None:
    events = evaluated[lie.name]
    failed = [event for event in events if isinstance(event, SiloFailed)]
    assert [event.silo for event in failed] == [LIAR]
    assert re.search(lie.because, failed[0].reason), failed[0].reason
    (found,) = [event for event in events if isinstance(event, Evaluated)]
    assert sorted(found.per_silo) == ["beta", "gamma"]
    assert 0 < found.loss < 10


class _Described(InProcessGrid):
    """Lets alpha describe itself in other words."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(answer, {1: {}})
        self._fields = fields

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        if message.metadata.message_type == "query":
            body = read_body(reply.content)
            for silo in body["silos"]:
                if silo["name"] == LIAR:
                    silo.update(self._fields)
            write_body(reply.content, json.dumps(body))
        return reply


@pytest.mark.parametrize(
    ("because", "fields"), DESCRIBE, ids=lambda value: str(value)[:40] if isinstance(value, dict) else None
)
def test_one_that_describes_itself_in_odd_words_is_turned_away(
    because: str, fields: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    config = small_run(
        *SHORT, "rounds=1", "cohort=null", "evaluation.every=9", data=corpus, run_dir=tmp_path / "run"
    )
    run_federation(prepare_run(config), _Described(fields), resume=False, live=False)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert [event.silo for event in events if isinstance(event, SiloFinished)] == ["beta", "gamma"]
    told = [event.message for event in events if isinstance(event, Notice)]
    assert any("is turned away" in line and because in line for line in told), told
    assert all(line.isprintable() and len(line) < 1000 for line in told)
