"""Listeners that the configuration names: who begins, hears and is closed, and what happens if one breaks."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from flwr.app import RecordDict

from photon.components import build
from photon.config.compose import load, parse, with_overrides
from photon.config.schema import Component, RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError, RunError
from photon.federation.federation import Federation
from photon.federation.listeners import DEFAULT, watching
from photon.federation.run import prepare_run
from photon.link.messages import BODY, unpack_config
from photon.node import answer
from photon.preflight import preflight, preflight_file
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Event, Notice, RoundFinished, RunInterrupted, RunStarted
from photon.telemetry.listener import ListenerRun
from photon.telemetry.log import EventLog, read_events
from tests.conftest import SMALL, composed

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]
LOG = "{_target_: photon.telemetry.log.event_log}"
DISPLAY = "{_target_: photon.telemetry.display.display}"
WANDB = "{_target_: photon.telemetry.wandb.weights_and_biases}"
SHORT = ("cohort=1", "rounds=2", "local_steps=1", "evaluation.every=2")


def listening(*more: str) -> str:
    return f"telemetry.listeners=[{', '.join([LOG, *more])}]"


def own(name: str, **arguments: str) -> str:
    given = "".join(f", {key}: {value}" for key, value in arguments.items())
    return f"{{_target_: {__name__}.Own, name: {name}{given}}}"


class Own:
    """Notes what it is told; breaks where it is told to."""

    notes: ClassVar[list[str]] = []
    runs: ClassVar[list[ListenerRun]] = []

    def __init__(self, run: ListenerRun, *, name: str, breaks: str = "") -> None:
        if breaks == "beginning":
            raise OSError("no such\nserver")
        self.run, self.name, self.breaks = run, name, breaks
        self.runs.append(run)

    def __call__(self, event: Event) -> None:
        written = read_events(self.run.run_dir / "events.jsonl")[-1]
        assert written == event, "what is heard is on the disk"
        self.notes.append(f"{self.name}: {type(event).__name__}")
        if self.breaks == type(event).__name__:
            raise RuntimeError("broken")

    def close(self) -> None:
        self.notes.append(f"{self.name} closed")
        if self.breaks == "closing":
            raise RuntimeError("broken")


def silent(run: ListenerRun) -> None:
    """Listen to no run."""


def no_listener(run: ListenerRun) -> int:
    """Return what cannot be called."""
    return 1


def without_a_run(path: str) -> Own:
    raise AssertionError("it is never called")


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    Own.notes.clear()
    Own.runs.clear()


def notices(run_dir: Path) -> list[str]:
    return [event.message for event in read_events(run_dir / "events.jsonl") if isinstance(event, Notice)]


# --- a run with listeners of one's own --------------------------------------------------------------------


def test_listeners_hear_every_event_after_the_log_in_order(run_small: Run, tmp_path: Path) -> None:
    nothing = f"{{_target_: {__name__}.silent}}"
    run_small(*SHORT, listening(own("a"), nothing, DISPLAY, own("b")))
    written = [type(event).__name__ for event in read_events(tmp_path / "run" / "events.jsonl")]
    heard = [f"{name}: {event}" for event in written for name in ("a", "b")]
    assert Own.notes == [*heard, "b closed", "a closed"]
    assert written.count("RoundFinished") == 2
    run = Own.runs[0]
    assert (run.run_dir, list(run.history)) == (tmp_path / "run", [])
    # What the run left open was decided after they had begun.
    written = load(tmp_path / "run" / "config.yaml")
    assert written.training != run.config.training
    assert written.model_copy(update={"training": run.config.training}).text == run.config.text


def test_one_that_goes_on_is_told_what_was_before(small_config: Make, tmp_path: Path) -> None:
    config = prepare_run(small_config(*SHORT, listening(own("a"))))
    run_inprocess(config, answer, resume=False)
    before = read_events(tmp_path / "run" / "events.jsonl")
    run_inprocess(config.model_copy(update={"rounds": 3}), answer, resume=True, live=False)
    assert list(Own.runs[1].history) == before
    assert [run.live for run in Own.runs] == [True, False]


def test_all_are_closed_when_the_run_crashes(
    run_small: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(Federation, "_round", crash)
    with pytest.raises(MemoryError, match="too large"):
        run_small(*SHORT, listening(own("a"), own("b", breaks="closing")))
    assert Own.notes[-5:] == ["a: RunInterrupted", "b: RunInterrupted", "b closed", "a: Notice", "a closed"]
    assert notices(tmp_path / "run") == ["telemetry: Own could not be closed: RuntimeError: broken"]


def test_a_listener_that_breaks_costs_no_round(run_small: Run, tmp_path: Path) -> None:
    whole = run_small(*SHORT, name="whole")
    broken = run_small(*SHORT, listening(own("a", breaks="RoundFinished"), own("b")))
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert notices(tmp_path / "run") == [
        "telemetry: Own is dropped, the run goes on: RuntimeError: broken",
    ]
    assert Own.notes.count("a: RoundFinished") == 1
    assert Own.notes.count("b: RoundFinished") == 2
    assert Own.notes[-2:] == ["b closed", "a closed"]


def test_a_log_that_cannot_be_written_ends_the_run_which_can_go_on(
    run_small: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run_small(*SHORT, name="whole")
    write, full = EventLog.__call__, []

    def until_the_disk_is_full(log: EventLog, event: Event) -> None:
        if full or (isinstance(event, RoundFinished) and event.round == 2):
            full.append(event)
            raise OSError(28, "No space left on device")
        write(log, event)

    with monkeypatch.context() as patched:
        patched.setattr(EventLog, "__call__", until_the_disk_is_full)
        with pytest.raises(RunError, match=r"run: OSError: .*No space left on device"):
            run_small(*SHORT, listening(own("a")))
    assert len(full) == 2, "the end of the run could not be told, either"
    assert CheckpointStore(tmp_path / "run" / "checkpoints").rounds() == [0, 1]
    assert Own.notes[-1] == "a closed"
    assert run_small(*SHORT, resume=True)["weights_sha256"] == whole["weights_sha256"]


def test_what_ended_a_run_is_told_even_if_the_log_cannot_tell_it(
    run_small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(EventLog, "__call__", full)
        raise MemoryError("too large")

    monkeypatch.setattr(Federation, "_round", crash)
    with pytest.raises(MemoryError, match="too large"):
        run_small(*SHORT)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [listening(own("a"), own("b", breaks="beginning"))],
            f"telemetry.listeners.2: {__name__}.Own cannot begin (OSError: no such server)",
        ),
        (
            [listening(own("a"), f"{{_target_: {__name__}.no_listener}}")],
            f"telemetry.listeners.2: what {__name__}.no_listener returns cannot be called with an event",
        ),
        (
            [listening(own("a"), WANDB), "telemetry.wandb.mode=offline"],
            "telemetry.wandb.mode=offline needs Weights & Biases; run: pip install 'photon-fl[wandb]'",
        ),
    ],
)
def test_one_that_cannot_begin_ends_the_run_before_it_starts(
    run_small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PhotonError) as refused:
        run_small(*SHORT, *overrides)
    assert str(refused.value) == message
    assert Own.notes == ["a: RunInterrupted", "a closed"]
    (event,) = read_events(tmp_path / "run" / "events.jsonl")
    assert isinstance(event, RunInterrupted)
    assert (event.reason, event.bad_input) == (message, True)
    assert not CheckpointStore(tmp_path / "run" / "checkpoints").rounds()


# --- the configuration ------------------------------------------------------------------------------------

MISTAKES = {
    "argument": (
        own("a", brakes="x"),
        "telemetry.listeners.1.brakes: unknown key; did you mean 'breaks'?",
    ),
    "missing argument": (
        f"{{_target_: {__name__}.Own}}",
        f"telemetry.listeners.1: {__name__}.Own: missing a required argument: 'name'",
    ),
    "type": (
        own("[1]"),
        "telemetry.listeners.1.name=[1]: input should be a valid string",
    ),
    "what Photon gives": (
        own("a", run="1"),
        "telemetry.listeners.1.run: unknown key; Own takes breaks, name",
    ),
    "target": (
        "{_target_: photon.telemetry.display.dispaly}",
        "telemetry.listeners.1: cannot import 'photon.telemetry.display.dispaly' (module "
        "'photon.telemetry.display' has no attribute 'dispaly'); did you mean 'display'?",
    ),
    **{
        target: (
            f"{{_target_: {target}}}",
            f"telemetry.listeners.1._target_={target} is not a listener, whose first argument is a "
            "ListenerRun; see docs/contributing.md for what fits",
        )
        # The last is a class whose objects cannot be called.
        for target in (
            "os.system",
            f"{__name__}.without_a_run",
            "photon.telemetry.log.EventLog",
            "photon.telemetry.listener.ListenerRun",
        )
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_begins(mistake: str) -> None:
    entry, message = MISTAKES[mistake]
    with pytest.raises(PhotonError) as refused:
        composed(*SMALL, "data.path=x", listening(entry))
    assert str(refused.value) == message
    assert not Own.runs


@pytest.mark.parametrize("listeners", ["[]", f"[{DISPLAY}]", f"[{DISPLAY}, {LOG}]"])
def test_the_log_comes_first(listeners: str) -> None:
    with pytest.raises(PhotonError) as refused:
        composed(*SMALL, "data.path=x", f"telemetry.listeners={listeners}")
    assert str(refused.value) == (
        "telemetry.listeners: the event log comes first, because report and summary are made from it; begin "
        "the list with {_target_: photon.telemetry.log.event_log}"
    )


def test_weights_and_biases_cannot_be_asked_for_where_nobody_logs_there() -> None:
    with pytest.raises(PhotonError, match=r"add {_target_: photon\.telemetry\.wandb\."):
        composed(*SMALL, "data.path=x", listening(DISPLAY), "telemetry=wandb")
    composed(*SMALL, "data.path=x", listening(WANDB), "telemetry=wandb")


def test_a_configuration_from_before_listeners_goes_on_with_those_of_the_default(
    small_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    default = small_config(*SHORT)
    assert default.telemetry.listeners == list(DEFAULT)
    run_inprocess(prepare_run(default), answer, resume=False)
    file = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["telemetry"]["listeners"]
    file.write_text(yaml.safe_dump(values | {"rounds": 3}))
    old = preflight_file(file, ["telemetry.display=plain"])
    assert old.telemetry.listeners is None
    run_inprocess(old, answer, resume=True)
    assert "round 3/3" in capsys.readouterr().out
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event.resumed_from for event in events if isinstance(event, RunStarted)] == [None, 2]


def test_a_stored_configuration_still_follows_the_short_keys(
    small_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(prepare_run(small_config(*SHORT)).text)
    assert load(file).telemetry.display == "none"
    run_inprocess(with_overrides(file, ["telemetry.display=plain"]), answer, resume=False)
    assert "round 2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], True),
        (["telemetry.display=none"], False),
        ([listening(own("a"))], False),
        ([listening(own("a"), DISPLAY)], True),
    ],
)
def test_who_follows_a_run_of_another_process_shows_its_display_alone(
    small_config: Make, capsys: pytest.CaptureFixture[str], overrides: list[str], shown: bool
) -> None:
    config = small_config("telemetry.display=plain", *overrides)
    with watching(config, []) as stream:
        stream.emit(Notice(level="info", message="hello"))
    assert capsys.readouterr().out == ("hello\n" if shown else "")
    assert not Own.runs


# --- who else gets the configuration ----------------------------------------------------------------------


def test_nodes_are_not_told_who_listens_and_a_federation_below_has_its_log_alone(
    small_config: Make, tmp_path: Path
) -> None:
    sent: list[RunConfig] = []

    def answering(kind: Any, content: RecordDict, *rest: Any) -> RecordDict:
        if "config" in content[BODY]:
            sent.append(parse(unpack_config(content)))
        return answer(kind, content, *rest)

    tree = "federation.tree={north: [alpha, beta], south: [gamma]}"
    config = prepare_run(small_config("rounds=1", "cohort=2", tree, listening(own("a"))))
    run_inprocess(config, answering, resume=False)
    assert len(sent) > 5
    assert all(each.telemetry.listeners is None for each in sent)
    assert {run.run_dir for run in Own.runs} == {tmp_path / "run"}
    below = sorted(file for file in tmp_path.rglob("config.yaml") if file.parent != tmp_path / "run")
    assert [file.parent.name for file in below] == ["north", "south"]
    for file in below:
        assert load(file).telemetry.listeners == [DEFAULT[0]]
        assert json.loads((file.parent / "events.jsonl").read_text().splitlines()[0])
    preflight(load(below[0]))


def test_every_default_is_built_as_any_other(small_config: Make, tmp_path: Path) -> None:
    run = ListenerRun(tmp_path, small_config(), live=False, history=[])
    kinds = [build(Component.as_mapping(entry), "x", run) for entry in DEFAULT]
    assert isinstance(kinds[0], EventLog)
    assert kinds[1:] == [None, None], "with display=none and wandb.mode=off"
    kinds[0].close()


def test_a_run_that_ends_within_its_warm_up_says_so_once(run_small, tmp_path):
    """Steps count batches of the recipe, so a short run with small ones may never leave its warm-up."""
    run_small("rounds=2", "local_steps=2", "schedule.steps=72", "schedule.warmup_steps=6", name="short")
    told = [event for event in read_events(tmp_path / "short" / "events.jsonl") if isinstance(event, Notice)]
    assert [event.level for event in told] == ["warning"]
    assert told[0].message.startswith("the run ends within its warm-up")
