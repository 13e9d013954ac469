import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.telemetry.events import (
    Event,
    EventStream,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    from_json,
)
from photon.telemetry.log import (
    EventLog,
    current_history,
    elapsed_seconds,
    follow,
    mend,
    read_events,
)


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


def test_a_damaged_line_is_a_warning_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [_notice(number).to_json().encode() for number in range(4)]
    damaged = bytes([lines[1][0] ^ 1]) + lines[1][1:]
    path.write_bytes(b"\n".join([lines[0], damaged, b"\xff\xfe", lines[3], b""]))
    content = path.read_bytes()
    events = read_events(path)
    assert [events[0], events[3]] == [_notice(0), _notice(3)]
    for number in (2, 3):
        warning = events[number - 1]
        assert isinstance(warning, Notice)
        assert (warning.level, warning.time) == ("warning", 0.0)
        assert warning.message == f"line {number} of events.jsonl was damaged, and is left out"
    assert path.read_bytes() == content, "who reads does not write"
    assert list(follow(path, lambda: True)) == events

    assert mend(path) == [2, 3]
    assert read_events(path) == events
    assert [from_json(line) for line in path.read_text().splitlines()] == events
    assert (tmp_path / "events-damaged.txt").read_bytes() == damaged + b"\n\xff\xfe\n"
    content = path.read_bytes()
    assert mend(path) == []
    assert path.read_bytes() == content
    assert mend(tmp_path / "missing.jsonl") == []


def test_who_follows_a_file_does_not_lose_its_place_when_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [_notice(0).to_json(), "x", _notice(2).to_json()]
    path.write_text("".join(f"{line}\n" for line in lines))
    looks = [0]

    def stop() -> bool:
        looks[0] += 1
        if looks[0] == 1:
            mend(path)
            with EventLog(path) as log:
                log(_notice(3))
        return looks[0] > 2

    seen = list(follow(path, stop, interval=0))
    assert [seen[0], *seen[2:]] == [_notice(0), _notice(2), _notice(3)]


def test_a_file_without_any_event_is_none_of_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("nonsense\nmore\n")
    with pytest.raises(PhotonError, match=r"events\.jsonl, line 1: not an event"):
        read_events(path)
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(PhotonError, match="line 1: not UTF-8"):
        read_events(path)
    assert mend(path) == [1]
    with pytest.raises(PhotonError, match="cannot read the events"):
        read_events(tmp_path / "missing.jsonl")


def test_durations_come_from_a_clock_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's time is set back within the first attempt, and the second runs after the next boot."""
    times = iter([1000.0, 400.0, 410.0, 2000.0, 9000.0])
    clocks = iter([50.0, 53.0, 57.0, 3.0, 5.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clocks))
    path = tmp_path / "events.jsonl"
    stream = EventStream(log=EventLog(path))
    first, second = _started(next(times), None), _started(0, 1)
    for event in [first, *_round(next(times), 1), replace(second, time=next(times)), _notice(0)]:
        stream.emit(event)
    stream.close()
    history = read_events(path)
    assert [event.clock for event in history] == [50.0, 53.0, 57.0, 3.0, 5.0]
    assert elapsed_seconds(history) == [0, 3, 7, 7, 9]
    # A line of an earlier version has none.
    content = json.loads(first.to_json())
    del content["clock"]
    assert from_json(json.dumps(content)).clock is None


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
