"""Killed at any moment, a run goes on where it was and ends with the very same weights."""

import errno
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError, RunError
from photon.federation.admission import Admission
from photon.federation.exchange import Failure
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import Checkpoint, CheckpointStore
from photon.strategy.base import Aggregate, Reply
from photon.strategy.photon import Photon
from photon.telemetry.events import Notice, RoundFinished, SiloFinished
from photon.telemetry.log import current_history, read_events
from tests.conftest import small_run
from tests.federation.crash import POINTS, forking, train_until

RUN = ["cohort=2", "rounds=4", "outer=diloco"]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_inprocess(prepare_run(small_run(*RUN, data=corpus, run_dir=run_dir)), answer, resume=False)


@pytest.mark.few(2)
@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_equals_uninterrupted(
    point: str,
    uninterrupted: dict[str, Any],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    config, run_dir = small_config(*RUN), tmp_path / "run"
    killed = forking().Process(target=train_until, args=(point, config))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (run_dir / "summary.json").exists()
    summary = run_inprocess(prepare_run(config), answer, resume=True)
    assert summary["weights_sha256"] == uninterrupted["weights_sha256"]
    for figure in ("rounds", "tokens", "status", "failures"):
        assert summary[figure] == uninterrupted[figure], figure
    assert summary["perplexity"]["final"] == uninterrupted["perplexity"]["final"]
    history = current_history(read_events(run_dir / "events.jsonl"))
    assert [e.round for e in history if isinstance(e, RoundFinished)] == [1, 2, 3, 4]
    assert len([e for e in history if isinstance(e, SiloFinished)]) == 8
    assert not list(run_dir.rglob("*.tmp")), "a crash's leftovers are removed"


def test_a_round_asked_for_twice_is_answered_without_training(
    small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server dies after the silos have trained: their replies come from their own disks."""
    from photon.federation import federation
    from photon.training.loop import LocalTrainer

    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 2:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    config = prepare_run(small_config(*RUN))
    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            run_inprocess(config, answer, resume=False)

    trained: list[int] = []
    train = LocalTrainer.train

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["global_step"])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "train", counting)
    run_inprocess(config, answer, resume=True)
    assert 4 not in trained, "round 2 starts at step 4 and was trained before the server died"
    assert sorted(trained) == [8, 8, 12, 12]


def test_a_damaged_newest_checkpoint_is_passed_over(
    small_config: Callable[..., RunConfig], uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    run_inprocess(prepare_run(small_config(*RUN)), answer, resume=False)
    run_dir = tmp_path / "run"
    newest = run_dir / "checkpoints" / "round-000004" / "params.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    summary = run_inprocess(prepare_run(small_config(*RUN)), answer, resume=True)
    assert summary["weights_sha256"] == uninterrupted["weights_sha256"]
    assert "passed over" in (run_dir / "events.jsonl").read_text()


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "checkpoint.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "not a checkpoint"),
        (lambda folder: (folder / "params.safetensors").write_bytes(b"\xff" * 64), "params.safetensors"),
        (lambda folder: (folder / "params.safetensors").unlink(), r"damaged \(.*No such file"),
        (
            lambda folder: flip_last_bit(folder / "params.safetensors"),
            "damaged .params.safetensors is not what was written",
        ),
        (lambda folder: (folder / "blake3.json").write_text("["), "damaged"),
        (lambda folder: (folder / "blake3.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "blake3.json").unlink(), r"damaged \(.*blake3.json"),
        (
            lambda folder: (folder / "checkpoint.json").write_text(
                json.dumps(json.loads((folder / "checkpoint.json").read_text()) | {"format": "other/9"})
            ),
            "format other/9",
        ),
        (
            lambda folder: (folder / "checkpoint.json").write_text(
                json.dumps(json.loads((folder / "checkpoint.json").read_text()) | {"round": -3})
            ),
            "damaged",
        ),
    ],
)
def test_damaged_checkpoints_end_in_one_clear_error(
    run_small: Callable[..., Any], tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    run_small("cohort=1", "rounds=1", "checkpoint.keep=1")
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    damage(store.folder / "round-000001")
    with pytest.raises(PhotonError, match=message):
        store.latest()


def test_a_full_disk_stops_a_run_that_can_go_on(
    run_small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("photon.federation.federation.CheckpointStore.writing", full)
        with pytest.raises(RunError, match="No space left on device"):
            run_small("cohort=1", "rounds=1")
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError, match=r"file: cannot be written \(.*\); choose another run_dir"):
        run_small("cohort=1", f"run_dir={tmp_path / 'file'}")


def test_two_processes_never_write_one_run(run_small: Callable[..., Any], tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(PhotonError, match="still going on"):
        run_small("cohort=1")


def test_a_run_is_never_overwritten_nor_resumed_from_nothing(run_small: Callable[..., Any]) -> None:
    with pytest.raises(PhotonError, match="no checkpoint to resume from"):
        run_small("cohort=1", resume=True)
    run_small("cohort=1", "rounds=1")
    with pytest.raises(PhotonError, match="already holds a run"):
        run_small("cohort=1", "rounds=1")


def test_a_silo_that_is_rejected_for_long_goes_on_from_its_last_accepted_round(
    run_small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Admission.trained

    def rejecting(self: Admission, message: Any, asked: Any) -> Any:
        if asked.request.silo == "alpha" and 2 <= asked.request.round <= 6:
            return Failure("rejected", "it is of no use")
        return trained(self, message, asked)

    monkeypatch.setattr(Admission, "trained", rejecting)
    run_small("rounds=7", "cohort=3", "federation.admission.quarantine_after=99")
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e.round for e in events if isinstance(e, SiloFinished) and e.silo == "alpha"] == [1, 7]
    assert "lost its local state" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_damaged_event_does_not_keep_a_run_from_going_on(
    run_small: Callable[..., Any], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run_small("rounds=2")
    file = tmp_path / "run" / "events.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    number = next(at for at, line in enumerate(lines) if b'"silo_finished"' in line)
    lines[number] = b"\x00" + lines[number][1:]
    file.write_bytes(b"".join(lines))
    summary = run_small("rounds=3", resume=True)
    assert summary["rounds"] == 3
    told = [event.message for event in read_events(file) if isinstance(event, Notice)]
    cut = f"line {number + 1} of events.jsonl was damaged and is cut out; it is kept in events-damaged.txt"
    assert cut in told
    assert b"".join(json.dumps(json.loads(line)).encode() for line in file.read_bytes().splitlines())
    assert (file.with_name("events-damaged.txt")).read_bytes() == lines[number]


def test_a_flipped_bit_of_a_silos_state_costs_that_state_and_is_told(
    run_small: Callable[..., Any], tmp_path: Path
) -> None:
    run_small("rounds=2", "cohort=3")
    flip_last_bit(tmp_path / "run" / "silos" / "alpha" / "round-000002" / "optimizer.safetensors")
    run_small("rounds=3", "cohort=3", resume=True)
    told = [e.message for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, Notice)]
    assert [line.partition(" had")[0] for line in told if "lost its local state" in line] == [
        "round 3: alpha"
    ]


class Faulty(Photon):
    """Somebody's own strategy, with a fault that shows in the second round."""

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        if server_round == 2:
            raise KeyError("mistyped")
        return super().aggregate_train(server_round, checkpoint, replies)


def test_a_fault_of_a_strategy_says_below_its_traceback_how_to_go_on(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(KeyError) as fault:
        run_small("strategy._target_=tests.federation.test_resume.Faulty")
    told = f"The rounds that were done are kept. Go on with: photon resume {tmp_path / 'run'}"
    assert fault.value.__notes__ == [told]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").rounds()[-1] == 1
