"""Events are read as they are written, each byte once, whatever happens to the file."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from photon.telemetry.events import Evaluated, Event, Notice, RoundFinished, RunStarted, SiloFinished
from photon.telemetry.log import EventLog, read_events
from photon.ui.tail import Tail
from tests.telemetry.synthetic import synthetic_events
from tests.ui.conftest import begin_run, tell


def many() -> list[Event]:
    """Return the events of a run of more silos than a chart draws."""
    return list(synthetic_events(extra_silos=70))


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = list(synthetic_events())
    begin_run(tmp_path, events, 9)
    tail = Tail(tmp_path / "events.jsonl")
    assert tail.read()
    assert tail.events == read_events(tmp_path / "events.jsonl")
    assert not tail.read()
    before = tail.position
    # What was read cannot be read again, but for the beginning that the file is known by: it is not there.
    with (tmp_path / "events.jsonl").open("r+b") as file:
        file.seek(512)
        file.write(b"x" * (before - 513))
    tell(tmp_path, events[9:12])
    assert tail.read()
    assert tail.events == events[:12]


def test_a_line_that_is_not_complete_waits_for_its_end(tmp_path: Path) -> None:
    events = list(synthetic_events())
    begin_run(tmp_path, events, 3)
    line = events[3].to_json().encode()
    file = tmp_path / "events.jsonl"
    tail = Tail(file)
    tail.read()
    with file.open("ab") as end:
        end.write(line[:40])
    assert not tail.read()
    assert tail.events == events[:3]
    with file.open("ab") as end:
        end.write(line[40:] + b"\n")
    assert tail.read()
    assert tail.events == events[:4]


def test_a_file_that_is_another_is_read_anew(tmp_path: Path) -> None:
    events = list(synthetic_events())
    begin_run(tmp_path, events, 20)
    file = tmp_path / "events.jsonl"
    tail = Tail(file)
    tail.read()
    with file.open("r+b") as cut:
        cut.truncate(0)
    tell(tmp_path, events[:2])
    assert tail.read()
    assert tail.events == events[:2], "it became shorter"
    # Larger, and in the very place of the one before: its number on the disk may be the same, too.
    another = [replace(events[0], name="another"), *events[1:30]]  # type: ignore[call-arg]
    with file.open("r+b") as cut:
        cut.truncate(0)
    tell(tmp_path, another)
    assert tail.read()
    assert tail.events == another, "it is another file"
    assert tail.begun == 3
    file.unlink()
    with pytest.raises(FileNotFoundError):
        tail.read()


def test_a_damaged_line_is_a_warning(tmp_path: Path) -> None:
    events = list(synthetic_events())
    begin_run(tmp_path, events, 3)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff\xfe nonsense\n")
    tail = Tail(tmp_path / "events.jsonl")
    tail.read()
    warning = tail.events[-1]
    assert isinstance(warning, Notice)
    assert warning.message.startswith("line 4 of events.jsonl was damaged")
    assert warning.time == events[2].time


def test_of_many_silos_replies_are_counted_and_the_last_is_kept(tmp_path: Path) -> None:
    events = many()
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in events:
            # A name that JSON escapes is read the slow way, and counts the same.
            is_odd = isinstance(event, SiloFinished) and event.silo.endswith("7")
            log(replace(event, silo=f"{event.silo} ü") if is_odd else event)  # type: ignore[call-arg, attr-defined]
    whole = read_events(tmp_path / "events.jsonl")
    replies = [event for event in whole if isinstance(event, SiloFinished)]
    tail = Tail(tmp_path / "events.jsonl")
    tail.read()
    assert tail.is_thin
    assert tail.updates == Counter(reply.silo for reply in replies)
    assert tail.last_replies() == {reply.silo: reply for reply in replies}
    assert [e for e in tail.events if isinstance(e, RoundFinished)] == [
        e for e in whole if isinstance(e, RoundFinished)
    ]
    assert not any(isinstance(event, SiloFinished) for event in tail.events)
    found = [event for event in tail.events if isinstance(event, Evaluated)]
    known = [event for event in whole if isinstance(event, Evaluated)]
    assert [event.perplexity for event in found] == [event.perplexity for event in known]
    assert [found[0], found[-1]] == [known[0], known[-1]], "the first and the last have all silos"
    assert all(event.per_silo == {} for event in found[1:-1])


def test_of_many_silos_each_evaluation_takes_the_place_of_the_last(tmp_path: Path) -> None:
    events = many()
    tail = Tail(tmp_path / "events.jsonl")
    for event in events:
        tell(tmp_path, [event])
        tail.read()
    found = [event for event in tail.events if isinstance(event, Evaluated)]
    assert [bool(event.per_silo) for event in found] == [True, *[False] * (len(found) - 2), True]


def test_rounds_that_are_done_again_count_once(tmp_path: Path) -> None:
    events = many()
    started = events[0]
    assert isinstance(started, RunStarted)
    ends = [place for place, event in enumerate(events) if isinstance(event, RoundFinished)]
    again = [replace(started, resumed_from=2), *events[ends[1] + 1 : ends[2] + 1]]
    with EventLog(tmp_path / "events.jsonl") as log:
        for event in [*events[: ends[3] + 1], *again]:
            log(event)
    tail = Tail(tmp_path / "events.jsonl")
    tail.read()
    expected = [e for e in events[: ends[2] + 1] if isinstance(e, SiloFinished)]
    assert tail.updates == Counter(reply.silo for reply in expected)


def test_a_long_file_is_read_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.ui.tail._CHUNK", 2000)
    events = list(synthetic_events())
    begin_run(tmp_path, events, len(events))
    tail = Tail(tmp_path / "events.jsonl")
    shares = []
    while not shares or shares[-1] < 1:
        # Nothing is read where no time is given, and a chunk where there is some.
        assert not tail.read(0.0)
        tail.read(1e-9)
        tail.read(0.0005)
        shares.append(tail.share)
        assert len(shares) < 10_000
    tail.read()
    assert shares == sorted(shares)
    assert tail.events == events
