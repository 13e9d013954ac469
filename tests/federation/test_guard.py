"""A federation that looks back: a round that makes the model worse is undone, and a liar is kept out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array

from photon.config.admission import GuardSection
from photon.config.schema import RunConfig
from photon.errors import RunError
from photon.federation.guard import suspects
from photon.federation.run import prepare_run, run_federation
from photon.link.records import RAW
from photon.state.checkpoint import CheckpointStore
from photon.state.progress import Progress
from photon.telemetry.events import Evaluated, Notice, RoundFinished, RoundStarted, SiloFinished
from photon.telemetry.log import read_events
from tests.adversary.harness import LyingGrid
from tests.adversary.lies import Lie, says, scaled, tensors

Make = Callable[..., RunConfig]
ROUNDS = 9
LONG = [
    "cohort=3",
    f"rounds={ROUNDS}",
    "local_steps=8",
    "checkpoint.keep=20",
    "federation.guard.tolerance=0.05",
    "federation.admission.norm_factor=null",
]


#: The whole model upside down, as the gate would not let it pass.
FLIPPED = tensors("flipped", "", scaled(-20.0))


def _run(config: RunConfig, kind: str, lies: dict[int, Lie]) -> list[Any]:
    run_federation(prepare_run(config), LyingGrid(kind, lies), resume=False, live=False)
    return list(read_events(Path(str(config.run_dir)) / "events.jsonl"))


def test_a_round_that_does_harm_is_undone_and_its_liar_is_kept_out(
    small_config: Make, tmp_path: Path
) -> None:
    config = small_config(*LONG, name="guarded")
    events = _run(config, "train", dict.fromkeys(range(3, ROUNDS + 1), FLIPPED))
    told = [event.message for event in events if isinstance(event, Notice) and "is undone" in event.message]
    assert len(told) == 3  # and then it is not drawn
    assert all("suspects, by the size of their updates: alpha" in line for line in told)
    finished = [event.round for event in events if isinstance(event, RoundFinished)]
    assert finished == [each for each in range(1, ROUNDS + 1) if f"round {each} is undone" not in str(told)]
    store = CheckpointStore(tmp_path / "guarded" / "checkpoints")
    undone = next(each for each in range(1, ROUNDS + 1) if each not in finished)
    before, after = store.load(undone - 1), store.load(undone)
    assert after.state.ledger["beta"] == before.state.ledger["beta"]
    assert after.state.tokens == before.state.tokens
    for name, tensor in before.load_params().items():
        assert torch.equal(tensor, after.load_params()[name])
    told_losses = {event.round: event.loss for event in events if isinstance(event, Evaluated)}
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    # Three of nine rounds are lost, and then a silo; the others go on.
    assert last.loss < told_losses[2] - 0.1
    assert "alpha" not in [event for event in events if isinstance(event, RoundStarted)][-1].cohort

    unguarded = small_config(*LONG, "rounds=3", "federation.guard.action=off", name="unguarded")
    ruined = _run(unguarded, "train", {3: FLIPPED})
    assert [e for e in ruined if isinstance(e, Evaluated)][-1].perplexity > 2 * last.perplexity


@pytest.mark.slow
def test_silos_go_on_from_what_they_had_before_the_round_that_is_undone(
    small_config: Make, tmp_path: Path
) -> None:
    events = _run(small_config(*LONG), "train", {4: FLIPPED})
    assert [event.round for event in events if isinstance(event, RoundFinished)] == [1, 2, 3, 5, 6, 7, 8, 9]
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").load(ROUNDS)
    rounds = ROUNDS - 1
    assert checkpoint.state.ledger["beta"].position == rounds * 8 * 4
    assert checkpoint.state.ledger["beta"].tokens == rounds * 8 * 4 * 16
    assert checkpoint.state.global_step == ROUNDS * 8
    replies = [event for event in events if isinstance(event, SiloFinished) and event.silo == "beta"]
    # Its reply of the round that does not count is in the log, as what it sent.
    assert len(replies) == ROUNDS


@pytest.mark.slow
def test_a_silo_that_lies_in_its_evaluation_alone_undoes_nothing(small_config: Make) -> None:
    events = _run(small_config(*LONG), "evaluate", dict.fromkeys(range(3, ROUNDS + 1), says("", loss=500.0)))
    assert [event.round for event in events if isinstance(event, RoundFinished)] == list(range(1, ROUNDS + 1))


def test_a_run_may_stop_where_its_model_becomes_worse(small_config: Make, tmp_path: Path) -> None:
    config = small_config(*LONG, "federation.guard.action=stop")
    with pytest.raises(RunError, match=r"round 4 does not count: the validation loss rose by"):
        _run(config, "train", {4: FLIPPED})
    assert CheckpointStore(tmp_path / "run" / "checkpoints").rounds()[-1] == 3
    run_federation(prepare_run(config), LyingGrid("train", {}), resume=True, live=False)


def test_between_evaluations_a_run_goes_back_to_the_last_good_one(small_config: Make, tmp_path: Path) -> None:
    few = [each for each in LONG if not each.startswith("checkpoint")]
    config = small_config(*few, "evaluation.every=3", "checkpoint.keep=1", "checkpoint.keep_best=false")
    events = _run(config, "train", {5: FLIPPED, 6: FLIPPED})
    told = [event.message for event in events if isinstance(event, Notice) and "is undone" in event.message]
    assert len(told) == 1
    assert "the model is that of round 3 again" in told[0]
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").load(ROUNDS)
    assert checkpoint.state.ledger["beta"].position == (3 + 3) * 8 * 4


GUARD = GuardSection(action="undo", tolerance=0.5)


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        ({"a": 5.0, "b": 5.0, "c": 5.0}, False),
        ({"a": 5.6, "b": 5.6, "c": 5.0}, True),
        ({"a": 99.0, "b": 5.0, "c": 5.0}, False),  # one alone says so
        ({"a": 0.0, "b": 6.0, "c": 6.0}, True),  # one alone says otherwise
        ({"a": 99.0, "b": 5.0}, False),  # of two, both must say so
        ({"d": 99.0}, False),  # nobody can compare
    ],
)
def test_the_median_of_the_silos_decides(now: dict[str, float], worse: bool) -> None:
    progress = Progress().after({"a": 5.0, "b": 5.0, "c": 5.0})
    assert (progress.problem(now, GUARD) is not None) is worse


def test_where_the_loss_has_moved_by_more_it_may_rise_by_more() -> None:
    progress = Progress().after({"a": 9.0}).after({"a": 6.0}).after({"a": 4.0})
    assert progress.most(GUARD) == pytest.approx(3 * 2.5)
    assert Progress().most(GUARD) == 0.5


def test_a_run_that_becomes_worse_again_and_again_goes_on_after_three_rounds() -> None:
    progress = Progress().after({"a": 5.0})
    assert progress.model_copy(update={"undone": 2}).problem({"a": 9.0}, GUARD) is not None
    given_in = progress.model_copy(update={"undone": 3})
    assert given_in.problem({"a": 9.0}, GUARD) is None
    assert given_in.after({"a": 9.0}).undone == 0


def test_noise_that_makes_a_model_worse_is_nobodys_fault(run_small: Any) -> None:
    noisy = run_small("privacy=gaussian", "rounds=1")
    assert noisy["status"] == "finished"
    assert noisy["perplexity"]["final"] > 3 * noisy["perplexity"]["initial"]


def test_suspects_are_those_with_far_larger_updates_than_most() -> None:
    assert suspects({"a": 1.0, "b": 2.5, "c": 1.1, "d": 9.0}) == ["d", "b"]
    assert suspects({"a": 1.0, "b": 100.0}) == []


def test_a_lie_under_masks_undoes_its_round_and_does_not_end_the_run(
    small_config: Make, tmp_path: Path
) -> None:
    def shifted(_: str, array: Array) -> Array:
        # Of 30 bits a coordinate, more than any update has.
        masked = torch.frombuffer(bytearray(array.data), dtype=torch.int32) + 2**28
        return Array(array.dtype, tuple(array.shape), RAW, masked.numpy().tobytes())

    secure = ("privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update")
    config = small_config("cohort=3", "rounds=4", "local_steps=1", *secure)
    events = _run(config, "train", {2: tensors("shifted", "", shifted)})
    told = [event.message for event in events if isinstance(event, Notice) and "is undone" in event.message]
    assert len(told) == 1
    assert "masks hide which" in told[0]
    assert [event.round for event in events if isinstance(event, RoundFinished)] == [1, 3, 4]
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.load(4).state.validation_loss is not None
