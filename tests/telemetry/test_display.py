import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from photon.telemetry.display import Display
from photon.telemetry.events import (
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFinished,
)
from photon.telemetry.steps import TellSteps
from photon.telemetry.summary import format_count


def _plain(events: list[Event], **options: object) -> list[str]:
    out = io.StringIO()
    with Display(Console(file=out, width=60), **options) as display:  # type: ignore[arg-type]
        for event in events:
            display(event)
    return out.getvalue().splitlines()


def _terminal(width: int = 100, height: int = 40) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, width=width, height=height, _environ={"TERM": "xterm-256color"}
    )
    return console, out


def _frame(display: Display, width: int = 100, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    with console.capture() as captured:
        console.print(display)
    return captured.get()


def _until(events: list[Event], kind: type[Event], number: int) -> list[Event]:
    """Return the events up to the first of a kind in a round."""
    for index, event in enumerate(events):
        if isinstance(event, kind) and getattr(event, "round", None) == number:
            return events[: index + 1]
    raise AssertionError(f"no {kind} of round {number}")


def test_a_log_file_has_one_line_per_round_and_evaluation(events: list[Event]) -> None:
    lines = _plain([*events, RunFinished(time=events[-1].time, summary={})])
    assert lines[0].startswith("Photon quickstart · photon · tiny (3.23 M parameters) · 3 of 4 silos a round")
    assert lines[0].endswith("10 rounds")
    before = next(event for event in events if isinstance(event, Evaluated))
    assert lines[1].startswith(
        f"before training: validation perplexity {before.perplexity:,.1f} (unigram 863.7)"
    )
    for number in range(1, 11):
        told = [line for line in lines if line.startswith(f"round {number}/10: ")]
        assert len(told) == (3 if number == 4 else 2)
    (failed,) = [line for line in lines if "failed" in line]
    assert "(rejected): the reply holds a value that is not finite" in failed
    assert lines[-1] == "finished after 1:02"
    assert not any("\x1b" in line for line in lines)


def test_a_round_line_holds_its_figures(events: list[Event]) -> None:
    finished = next(event for event in events if isinstance(event, RoundFinished))
    (line,) = [line for line in _plain(events) if "train loss" in line][:1]
    assert f"train loss {finished.train_loss:.3f}" in line
    assert f"silo cosine {finished.silo_cosine:.2f}" in line
    assert "38.8 MB up, 38.8 MB down" in line
    left = 9 * finished.seconds["round"]
    assert line.endswith(f"about {left:.1f} s left")


def test_the_time_left_counts_down_within_a_round(events: list[Event]) -> None:
    told = _until(events, RoundFinished, 8)
    took = [event.seconds["round"] for event in told if isinstance(event, RoundFinished)]
    mean = sum(took) / len(took)
    now = told[-1].time
    display = Display(Console(file=io.StringIO()), clock=lambda: now)
    for event in told:
        display(event)
    assert f"about {2 * mean:.1f} s left" in _frame(display)
    now += mean / 2
    assert f"about {1.5 * mean:.1f} s left" in _frame(display)
    # A round that takes longer than the others does not eat up the time of those after it.
    now += 100 * mean
    assert f"about {mean:.1f} s left" in _frame(display)


def test_the_view_shows_each_silo_in_its_state(events: list[Event]) -> None:
    told = _until(events, RoundStarted, 5)
    display = Display(Console(file=io.StringIO()), clock=lambda: told[-1].time)
    for event in told:
        display(event)
    started = told[-1]
    assert isinstance(started, RoundStarted)
    reply = next(e for e in events[len(told) :] if isinstance(e, SiloFinished))
    display(reply)
    rows = {line.split()[0]: line for line in _frame(display).splitlines() if line.strip()}
    for name in ("cpp", "legal", "prose", "python"):
        if name == reply.silo:
            assert "✓ done" in rows[name]
            assert f"{reply.loss:.3f}" in rows[name]
        elif name in started.cohort:
            assert "● training" in rows[name]
        else:
            assert "– resting" in rows[name]
    assert "round 5: 1 of 3 silos are done" in _frame(display)
    assert "4/10" in _frame(display)


def test_the_view_shows_steps_of_silos_that_say_them_and_others_wait(
    events: list[Event], tmp_path: Path
) -> None:
    told = _until(events, RoundStarted, 5)
    started = told[-1]
    assert isinstance(started, RoundStarted)
    display = Display(Console(file=io.StringIO()), silos=tmp_path, clock=lambda: started.time)
    for event in told:
        display(event)
    first, second, third = started.cohort
    TellSteps(tmp_path / first, 5, 0, 16)
    TellSteps(tmp_path / second, 4, 0, 16)
    rows = {line.split()[0]: line for line in _frame(display).splitlines() if line.strip()}
    assert "● step 0 of 16" in rows[first]
    assert "○ waiting" in rows[second], "what it says is of another round"
    assert "○ waiting" in rows[third]


def test_silos_that_train_in_turn_are_no_faster_together_than_one(events: list[Event]) -> None:
    told = _until(events, RoundFinished, 5)
    started = next(e for e in told if isinstance(e, RoundStarted) and e.round == 5)
    replies = [e for e in told if isinstance(e, SiloFinished) and e.round == 5]
    last = max(reply.time for reply in replies)
    display = Display(Console(file=io.StringIO()), clock=lambda: last)
    for event in told:
        display(event)
    (row,) = [line.split() for line in _frame(display).splitlines() if line.strip().startswith("all")]
    assert " ".join(row[1:3]) == format_count(sum(reply.tokens for reply in replies) / (last - started.time))


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_of_the_view_is_wider_than_the_window(events: list[Event], width: int) -> None:
    display = Display(Console(file=io.StringIO(), width=width), clock=lambda: events[-1].time)
    for event in _until(events, RoundFinished, 8):
        display(event)
    frame = _frame(display, width)
    assert max(len(line) for line in frame.splitlines()) <= width
    # No column is squeezed away.
    (row,) = [line for line in frame.splitlines() if line.strip().startswith("python")]
    assert not re.search(r"…|\.\.\.", row)


def test_a_failed_silo_is_shown_as_failed(events: list[Event]) -> None:
    told = _until(events, RoundFinished, 4)
    display = Display(Console(file=io.StringIO()))
    for event in told:
        display(event)
    assert re.search(r"✗ rejected", _frame(display))


def test_the_view_fits_into_a_small_window(events: list[Event]) -> None:
    started = events[0]
    assert isinstance(started, RunStarted)
    many = [
        {"name": f"silo-{number:03}", "train_tokens": 1, "validation_tokens": 1, "unigram_loss": 6.0}
        for number in range(100)
    ]
    fields = {name: getattr(started, name) for name in started.__dataclass_fields__}
    console, _ = _terminal(80, 24)
    display = Display(console, clock=lambda: started.time)
    display(RunStarted(**{**fields, "silos": many}))
    display(RoundStarted(time=started.time, round=1, cohort=["silo-077"], global_step=0))
    frame = _frame(display, 80, 24)
    assert len(frame.splitlines()) <= 24
    assert "silo-077" in frame
    assert "and 92 more" in frame


def test_the_centralized_silo_is_shown_though_it_is_no_silo(events: list[Event]) -> None:
    display = Display(Console(file=io.StringIO()))
    display(events[0])
    display(RoundStarted(time=events[0].time, round=1, cohort=["centralized"], global_step=0))
    assert re.search(r"centralized\s+● training", _frame(display))


def test_a_resumed_run_knows_its_past_and_does_not_tell_it_again(events: list[Event]) -> None:
    history = _until(events, RoundFinished, 3)
    started = events[0]
    fields = {name: getattr(started, name) for name in started.__dataclass_fields__}
    again = RunStarted(**{**fields, "resumed_from": 2, "time": history[-1].time + 100})
    third = history[len(_until(events, RoundFinished, 2)) :]
    lines = _plain([again, *third], history=history)
    assert lines[0].endswith("going on from round 2")
    assert not any(line.startswith(("before", "round 1", "round 2")) for line in lines)
    (evaluation,) = [line for line in lines if "validation perplexity" in line]
    before = next(event for event in events if isinstance(event, Evaluated))
    assert f"({before.perplexity:,.1f} before training" in evaluation


def test_the_terminal_is_left_as_it_was(events: list[Event]) -> None:
    console, out = _terminal()
    with Display(console) as display:
        for event in [*events, RunFinished(time=events[-1].time, summary={})]:
            display(event)
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert text.endswith("\x1b[?25h") or text.endswith("\n")
    assert "10/10" in text


def test_ctrl_c_leaves_a_clean_terminal(events: list[Event]) -> None:
    console, out = _terminal()

    def interrupted() -> None:
        with Display(console) as display:
            for event in _until(events, RoundStarted, 3):
                display(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    last_frame = text[text.rindex("Photon ") :]
    assert "silos are done" not in last_frame, "the spinner is still there"


def test_warnings_stay_above_the_live_view() -> None:
    console, out = _terminal()
    with Display(console) as display:
        display(Notice(level="warning", message="the disk is [nearly] full"))
    assert "warning: the disk is [nearly] full" in out.getvalue()


def test_an_interruption_is_told(events: list[Event]) -> None:
    told = [*_until(events, RoundFinished, 2), RunInterrupted(round=2, reason="stopped by the user")]
    assert _plain(told)[-1] == "interrupted after round 2/10"
    # The command tells the reason once, as its error.
    assert _plain([RunInterrupted(round=0, reason="cohort=9 is too large", bad_input=True)]) == []


def test_a_display_that_saw_nothing_ends_well(tmp_path: Path) -> None:
    console, out = _terminal()
    with Display(console):
        pass
    assert "Photon" in out.getvalue()


def test_own_models_of_silos_are_told_in_the_mean(events: list[Event]) -> None:
    evaluation = next(event for event in events if isinstance(event, Evaluated))
    assert "own models" not in " ".join(_plain([events[0], evaluation]))
    same = dataclasses.replace(evaluation, per_node=evaluation.per_silo)
    assert "own models" not in " ".join(_plain([events[0], same]))
    own = dataclasses.replace(
        evaluation,
        per_node={
            "north": {"loss": 2.0, "perplexity": 99.0, "tokens": 1},
            "x": {"loss": 2.0, "perplexity": 20.0, "tokens": 1},
            "y": {"loss": 2.0, "perplexity": 30.0, "tokens": 9},
        },
    )
    assert isinstance(events[0], RunStarted)
    started = dataclasses.replace(events[0], tree={"north": {"children": {"x": None, "y": None}}})
    assert _plain([started, own])[-1].endswith(" · own models of silos 25.0 in the mean")
