import threading
import time
from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.telemetry.events import (
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
)
from photon.telemetry.log import EventLog, current_history, elapsed_seconds, follow, read_events


def _notice(number: int) -> Notice:
    return Notice(time=float(number), level="info", message=f"{number} ünïcode \u2028 line")


def _started(at: float, resumed_from: int | None) -> RunStarted:
    return RunStarted(
        time=at,
        run_id="r",
        name="run",
        strategy="photon",
        model="tiny",
        parameters=1,
        silos=[],
        rounds=4,
        cohort=1,
        local_steps=1,
        batch_size=1,
        sequence_length=8,
        engine="inprocess",
        device="cpu",
        roofline_flops=None,
        resumed_from=resumed_from,
        flops_per_token=1.0,
    )


def _round(at: float, number: int) -> list[Event]:
    return [
        RoundStarted(time=at, round=number, cohort=["a"], global_step=number - 1),
        RoundFinished(
            time=at + 5,
            round=number,
            global_step=number,
            tokens=number * 8,
            train_loss=1.0,
            pseudo_gradient_norm=1.0,
            silo_cosine=None,
            consensus=1.0,
            parameter_norm=1.0,
            bytes_up=1,
            bytes_down=1,
            seconds={
                "round": 5.0,
                "training": 3.0,
                "fold": 0.0,
                "outer": 0.0,
                "evaluate": 0.0,
                "checkpoint": 0.0,
                "overhead": 2.0,
            },
        ),
    ]


def test_what_is_logged_is_read_back_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    with EventLog(path) as log:
        for number in range(3):
            log(_notice(number))
            assert read_events(path) == [_notice(done) for done in range(number + 1)]


def test_the_log_goes_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = _notice(0).to_json() + "\n"
    path.write_text(whole + _notice(1).to_json()[:25])
    assert read_events(path) == [_notice(0)]
    with EventLog(path) as log:
        assert path.read_text() == whole
        log(_notice(2))
    assert read_events(path) == [_notice(0), _notice(2)]


@pytest.mark.parametrize("length", [10, 65536, 200_000])
def test_a_half_line_of_any_length_is_cut(tmp_path: Path, length: int) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("x" * length)
    EventLog(path).close()
    assert path.read_bytes() == b""
    path.write_text(_notice(0).to_json() + "\n" + "x" * length)
    EventLog(path).close()
    assert read_events(path) == [_notice(0)]


def test_a_malformed_line_is_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{_notice(0).to_json()}\nnonsense\n{_notice(1).to_json()}\n")
    with pytest.raises(PhotonError, match=r"events\.jsonl, line 2: not an event"):
        read_events(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(PhotonError, match="line 1: not UTF-8"):
        read_events(path)
    with pytest.raises(PhotonError, match="cannot read the events"):
        read_events(tmp_path / "missing.jsonl")


def test_follow_sees_events_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ended = threading.Event()

    def write() -> None:
        time.sleep(0.05)
        with EventLog(path) as log:
            for number in range(20):
                log(_notice(number))
                time.sleep(0.002)
        # The last event is written after the reader was told to stop, yet before it looks again.
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = list(follow(path, ended.is_set, interval=0.003))
    writer.join()
    assert seen == [_notice(number) for number in range(20)]


def test_follow_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    line = _notice(0).to_json() + "\n"
    pieces = [line[:10], line[10:30], line[30:]]

    def stop() -> bool:
        if not pieces:
            return True
        with path.open("a") as file:
            file.write(pieces.pop(0))
        return False

    assert list(follow(path, stop, interval=0)) == [_notice(0)]


def test_follow_yields_what_came_with_the_stop(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def stop() -> bool:
        path.write_text(_notice(0).to_json() + "\n")
        return True

    assert list(follow(path, stop, interval=0)) == [_notice(0)]


def test_a_resumed_run_forgets_the_rounds_it_does_again() -> None:
    first = [_started(0, None), *_round(0, 1), *_round(10, 2), *_round(20, 3)[:1]]
    killed = RunInterrupted(time=24, round=2, reason="x")
    again = [_started(100, 1), *_round(100, 2), *_round(110, 3)]
    history = current_history([*first, killed, *again])
    assert history == [first[0], *first[1:3], *again]


def test_a_run_that_goes_on_after_its_end_is_not_finished() -> None:
    told = [_started(0, None), *_round(0, 1), RunFinished(time=6, summary={}), _started(50, 1)]
    assert current_history(told) == [told[0], *told[1:3], told[-1]]


def test_notices_and_past_interruptions_stay() -> None:
    kept = [_started(0, None), _notice(1), *_round(2, 1), RunInterrupted(time=8, round=1, reason="Ctrl-C")]
    assert current_history([*kept, _started(50, 1)]) == [*kept, _started(50, 1)]


def test_a_fresh_start_forgets_everything() -> None:
    told = [_started(0, None), *_round(0, 1), _started(50, None), _notice(51)]
    assert current_history(told) == told[-2:]


def test_pauses_and_lost_work_are_no_time_at_work() -> None:
    told = [_started(0, None), *_round(1, 1), *_round(10, 2), _started(1000, 1), *_round(1002, 2)]
    history = current_history(told)
    # 6 s until round 1 was done; the 9 s after that were lost; then 2 s to start and 5 s of round 2.
    assert elapsed_seconds(history) == [0, 1, 6, 6, 8, 13]
