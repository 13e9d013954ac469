"""A run goes back to any round that it has kept, and on from there as if the later ones had not been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.cli import main
from photon.config.schema import RunConfig
from photon.engine.start import start
from photon.errors import PhotonError, RunError
from photon.federation import federation
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Evaluated, Notice, RoundFinished
from photon.telemetry.log import current_history, read_events
from photon.training.loop import LocalTrainer

FOUR = ["cohort=2", "rounds=4", "checkpoint.permanent_every=2", "checkpoint.keep_best=false"]
SIX = ["cohort=2", "rounds=6", "checkpoint.permanent_every=3", "checkpoint.keep_best=false"]


def back(config: RunConfig, server_round: int) -> dict[str, Any]:
    """Do what ``photon resume --round`` does."""
    return start(prepare_run(config), answer, resume=True, back_to=server_round)


def kept(run_dir: Path) -> list[int]:
    return CheckpointStore(run_dir / "checkpoints").rounds()


def aside(run_dir: Path) -> Path:
    (folder,) = (run_dir / "checkpoints").glob("after-*")
    return folder


def finished(run_dir: Path) -> list[int]:
    history = current_history(read_events(run_dir / "events.jsonl"))
    return [event.round for event in history if isinstance(event, RoundFinished)]


def test_back_and_on_again_is_a_run_that_went_straight(
    run_small: Callable[..., Any],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Error feedback, moments, momentum and positions are those of round 3; no reply is of a later one."""
    chosen, run_dir = [*SIX, "outer=diloco", "link=topk", "checkpoint.keep=4"], tmp_path / "run"
    straight = run_small(*chosen)
    assert kept(run_dir) == [3, 4, 5, 6]
    trained, train = [], LocalTrainer.train

    def noting(self: LocalTrainer, *args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["global_step"])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "train", noting)
    again = back(small_config(*chosen), 3)
    said = f"goes back to round 3; later checkpoints (round 4, 5, 6) are moved to {aside(run_dir)}\n"
    assert said in capsys.readouterr().err
    assert again["weights_sha256"] == straight["weights_sha256"]
    assert trained == [16, 16, 20, 20], "round 4 is answered from disk, and round 5 is of another model"
    for figure in ("rounds", "tokens", "status", "failures"):
        assert again[figure] == straight[figure], figure
    assert finished(run_dir) == [1, 2, 3, 4, 5, 6]
    assert json.loads((aside(run_dir) / "summary.json").read_text()) == straight


def test_who_went_back_by_mistake_puts_the_checkpoints_back(
    run_small: Callable[..., Any],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One new round costs neither server nor silos what goes with the rounds that were undone."""
    chosen, run_dir = [*FOUR, "outer=diloco", "checkpoint.keep=4"], tmp_path / "run"
    straight = run_small(*chosen)
    with monkeypatch.context() as patch:
        draw, drawn = federation.draw_cohort, list[int]()

        def stops(config: Any, strategy: Any, silos: Any, server_round: int, ledger: Any) -> Any:
            drawn.append(server_round)
            # The first time it is drawn to measure the model that it is to train from.
            if drawn.count(3) == 2:
                raise RunError("stopped")
            return draw(config, strategy, silos, server_round, ledger)

        patch.setattr(federation, "draw_cohort", stops)
        with pytest.raises(RunError, match="stopped"):
            back(small_config(*chosen), 1)
    assert kept(run_dir) == [1, 2]
    assert finished(run_dir) == [1, 2]
    (aside(run_dir) / "round-000003").rename(run_dir / "checkpoints" / "round-000003")
    assert back(small_config(*chosen), 3)["weights_sha256"] == straight["weights_sha256"]
    assert finished(run_dir) == [1, 2, 3, 4]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "method",
    [
        ["strategy=lordo", "optimizer.rank=3"],
        ["strategy=streaming-diloco", "strategy.fragments=2"],
        pytest.param(
            ["link=int8", "link.uplink_payload=update", "link.downlink_payload=update"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["strategy=scaffold"], marks=pytest.mark.slow),
        pytest.param(["strategy=fedper"], marks=pytest.mark.slow),
    ],
    ids=["lordo", "streaming", "change", "scaffold", "fedper"],
)
def test_silos_without_the_round_start_afresh_and_are_sent_all_that_they_need(
    run_small: Callable[..., Any], small_config: Callable[..., RunConfig], tmp_path: Path, method: list[str]
) -> None:
    """With one checkpoint silos keep two rounds; what the permanent one lacks, nobody has."""
    chosen = [*FOUR, *method, "checkpoint.keep=1", "cohort=3", "rounds=5", "local_steps=2"]
    straight = run_small(*chosen)
    assert kept(tmp_path / "run") == [2, 4, 5]
    again = back(small_config(*chosen), 2)
    assert (again["rounds"], again["failures"]) == (5, 0)
    events = read_events(tmp_path / "run" / "events.jsonl")
    lost = [
        event for event in events if isinstance(event, Notice) and "lost its local state" in event.message
    ]
    assert len(lost) == 3
    if method[0] == "strategy=lordo":
        assert again["weights_sha256"] == straight["weights_sha256"], "all of a silo's state was averaged"
    else:
        assert again["weights_sha256"] != straight["weights_sha256"]


@pytest.mark.slow
def test_federations_within_go_back_with_the_one_above(
    run_small: Callable[..., Any], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    tree = "federation.tree={north: [alpha, beta], gamma: null}"
    chosen = [
        *FOUR,
        "cohort=null",
        "strategy=fedper",
        tree,
        "federation.inner_rounds=2",
        "checkpoint.keep=3",
        "local_steps=1",
    ]
    straight = run_small(*chosen)
    again = back(small_config(*chosen), 2)
    assert again["weights_sha256"] == straight["weights_sha256"]
    north = tmp_path / "run" / "silos" / "north"
    assert finished(north) == list(range(1, 9))
    assert not list((north / "checkpoints").glob("after-*")), "its rounds are asked for again"


def test_the_best_stays_until_there_is_a_better_one(
    run_small: Callable[..., Any],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 7.0, 7: 8.0}
    from photon.federation.evaluation import Evaluation

    def told(self: Evaluation, checkpoint: Any, *_: Any, **__: Any) -> Any:
        number = checkpoint.state.round
        event = Evaluated(
            round=number, per_silo={}, loss=losses[number], perplexity=1.0, tokens_trained=0, bytes_up=0,
            bytes_down=0, seconds=0.0,
        )  # fmt: skip
        self._events.stream.emit(event)
        return event

    monkeypatch.setattr(Evaluation, "of", told)
    chosen, seen = ["cohort=1", "checkpoint.keep=1", "local_steps=1"], []
    remove = CheckpointStore._remove_old

    def noting(self: CheckpointStore) -> None:
        remove(self)
        seen.append(self.rounds())

    monkeypatch.setattr(CheckpointStore, "_remove_old", noting)
    run_small(*chosen, "rounds=4")
    assert seen == [[0], [1], [2], [2, 3], [2, 4]], "of two alike the earlier one"
    run_small(*chosen, "rounds=7", resume=True)
    assert seen[5:] == [[5], [5, 6], [5, 7]], "what the disk holds is known after a restart"
    run_small(*chosen, "rounds=3", "checkpoint.keep_best=false", name="none")
    assert kept(tmp_path / "none") == [3]


def test_a_round_that_is_not_kept_is_one_line_with_those_that_are(
    run_small: Callable[..., Any],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_small("cohort=1", "checkpoint.keep_best=false", "local_steps=1")
    run_dir = tmp_path / "run"
    for wrong in ("1", "-2", "7"):
        monkeypatch.setattr("sys.argv", ["photon", "resume", str(run_dir), "--round", wrong])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        line = f"photon: {run_dir}: round {wrong} is not kept; --round may be one of 2, 3\n"
        assert capsys.readouterr().err == line
    (run_dir / "checkpoints" / "round-000002" / "params.safetensors").write_bytes(b"")
    with pytest.raises(PhotonError, match=r"round-000002: damaged \(params.safetensors is not"):
        back(small_config("cohort=1", "local_steps=1"), 2)
    assert kept(run_dir) == [2, 3], "nothing is moved before all is checked"
