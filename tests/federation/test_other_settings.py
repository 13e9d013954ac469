"""Settings that are changed while rounds are repeated hold for all silos of the round that is repeated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.engine.start import start
from photon.errors import PhotonError
from photon.federation.run import go_back, prepare_run
from photon.node import answer
from photon.silo import service
from photon.state.checkpoint import CheckpointStore

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]
SGD = ("optimizer=sgd", "schedule=constant", "schedule.warmup_steps=0", "cohort=null")
TREE = "federation.tree={n: {children: [alpha, beta], outer: fedavg}, s: {children: [gamma], outer: fedavg}}"


def back(config: RunConfig, server_round: int) -> None:
    go_back(config, server_round, lambda _: None)


@pytest.mark.parametrize(
    ("ways", "before", "after"),
    [
        (SGD, "optimizer.lr=0.1", "optimizer.lr=0.5"),
        ((*SGD, "optimizer.lr=0.5"), "training.clip_norm=null", "training.clip_norm=0.01"),
        ((*SGD, "optimizer.lr=0.5", "strategy=fedprox"), "strategy.mu=0.1", "strategy.mu=10"),
        ((*SGD, "strategy=hierfavg", TREE), "optimizer.lr=0.1", "optimizer.lr=0.5"),
    ],
)
def test_a_round_that_is_done_again_is_done_with_the_settings_of_now(
    ways: tuple[str, ...], before: str, after: str, run_small: Run, small_config: Make
) -> None:
    run_small(*ways, before, "rounds=1", name="straight")
    straight = run_small(*ways, after, "rounds=2", name="straight", resume=True)
    run_small(*ways, before, "rounds=2", name="taken-back")
    back(prepare_run(small_config(*ways, after, "rounds=2", name="taken-back")), 1)
    again = run_small(*ways, after, "rounds=2", name="taken-back", resume=True)
    assert again["weights_sha256"] == straight["weights_sha256"]


def test_silos_below_train_from_the_model_that_came_when_the_run_is_taken_back(
    run_small: Run, small_config: Make
) -> None:
    """The outer step of the run alone changes: round 2 is answered from disk, round 3 starts elsewhere."""
    ways = (*SGD, "strategy=hierfavg", TREE, "optimizer.lr=0.1", "outer=diloco", "checkpoint.keep=9")
    run_small(*ways, "rounds=1", name="straight")
    straight = run_small(*ways, "outer.lr=0.3", "rounds=3", name="straight", resume=True)
    run_small(*ways, "rounds=3", name="taken-back")
    changed = (*ways, "outer.lr=0.3", "rounds=3")
    back(prepare_run(small_config(*changed, name="taken-back")), 1)
    again = run_small(*changed, name="taken-back", resume=True)
    assert again["weights_sha256"] == straight["weights_sha256"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ("evaluation.sequences=4", {"alpha": 1, "beta": 1, "gamma": 2}),
        ("link.transport=inline", {"alpha": 1, "beta": 1, "gamma": 2}),
        ("optimizer.lr=0.2", {"alpha": 2, "beta": 2, "gamma": 2}),
    ],
)
def test_who_was_done_trains_again_under_what_changes_its_reply_alone(
    change: str, asked: dict[str, int], run_small: Run, small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start is killed as gamma trains in round 2; the second one, with a change, within round 3."""
    train, seen = service.train, []
    mortal = [(2, "gamma"), (3, "alpha")]

    def watched(request: Any, *rest: Any) -> Any:
        from photon.silo.kept import silo_store

        store = silo_store(request.silo, *rest[-2:])
        if store.reply(request.run_id, request.model_id, request.round) is None:
            seen.append((request.round, request.silo))
        if mortal and (request.round, request.silo) == mortal[0]:
            mortal.pop(0)
            raise Killed
        return train(request, *rest)

    monkeypatch.setattr(service, "train", watched)
    ways = (*SGD, "optimizer.lr=0.1", "rounds=3")
    for overrides, resume in ((ways, False), ((*ways, change), True)):
        with pytest.raises(Killed):
            run_inprocess(prepare_run(small_config(*overrides)), answer, resume=resume)
    run_small(*ways, change, resume=True)
    assert {silo: seen.count((2, silo)) for silo in asked} == asked


def test_settings_are_compared_with_the_round_that_the_run_goes_back_to(
    run_small: Run, small_config: Make, tmp_path: Path
) -> None:
    """Round 3 has the state of another outer optimizer than the new one, and round 2 has none."""
    run_small("rounds=2", "checkpoint.keep=9")
    run_small("rounds=3", "checkpoint.keep=9", "outer=diloco", resume=True)
    changed = small_config("rounds=4", "checkpoint.keep=9", "outer=fedadam")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    with pytest.raises(PhotonError, match="outer: the state in the checkpoint"):
        start(changed, answer, resume=True, back_to=3)
    assert store.rounds()[-1] == 3, "nothing was moved"
    start(changed, answer, resume=True, back_to=2)
    assert store.rounds()[-1] == 4
