import dataclasses
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import PhotonError
from photon.telemetry.events import (
    EVENT_TYPES,
    Event,
    EventStream,
    Notice,
    PrivacyFacts,
    PrivacyReport,
    Remembered,
    RoundFinished,
    RoundSeconds,
    RunFinished,
    SiloEvaluation,
    SiloFacts,
    SiloFailed,
    SiloSeconds,
    SuiteFigures,
    TaskFigures,
    from_json,
    perplexity_text,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
COUNT = st.integers(0, 2**62)
NAMES = st.text(min_size=1, max_size=12)

EVALUATIONS = st.dictionaries(
    NAMES, st.builds(SiloEvaluation, loss=FINITE, perplexity=FINITE, tokens=COUNT), max_size=3
)
FIELDS = {
    "run_started": {
        "silos": st.lists(
            st.builds(
                SiloFacts, name=NAMES, train_tokens=COUNT, validation_tokens=COUNT, unigram_loss=FINITE
            ),
            max_size=3,
        ),
        "privacy": st.none() | st.builds(PrivacyFacts, noise_multiplier=FINITE, delta=FINITE),
        "tree": st.none() | st.dictionaries(st.text(), JSON, max_size=4),
    },
    "silo_finished": {
        "seconds": st.builds(SiloSeconds, total=FINITE, training=FINITE, load=FINITE, save=FINITE),
        "privacy": st.none()
        | st.builds(PrivacyReport, clip_norm=FINITE, noise_multiplier=FINITE, releases=COUNT),
        "before_merge": EVALUATIONS,
    },
    "round_finished": {
        "seconds": st.builds(
            RoundSeconds,
            **dict.fromkeys(RoundSeconds.__required_keys__, FINITE),  # type: ignore[arg-type]
        )
    },
    "evaluated": {
        **dict.fromkeys(("per_silo", "per_node"), EVALUATIONS),
        "remembered": st.dictionaries(
            NAMES, st.builds(Remembered, asked=COUNT, rouge1=FINITE, refused=FINITE), max_size=3
        ),
        "figures": st.dictionaries(NAMES, FINITE, max_size=3),
    },
    "tasks_evaluated": {
        "tasks": st.dictionaries(
            NAMES,
            st.builds(
                TaskFigures,
                metrics=st.dictionaries(NAMES, FINITE, max_size=3),
                questions=COUNT,
                shots=COUNT,
                chance=FINITE,
            ),
            max_size=3,
        ),
        "suites": st.dictionaries(
            NAMES, st.builds(SuiteFigures, tasks=COUNT, accuracy=FINITE, above_chance=FINITE), max_size=2
        ),
    },
    "unlearned": {"request": st.dictionaries(st.text(), JSON, max_size=4)},
    "diagnostics": {"values": st.dictionaries(NAMES, FINITE, max_size=3)},
    "run_finished": {"summary": st.dictionaries(st.text(), JSON, max_size=4)},
}
NAMES_IN_ORDER = [
    "run_started",
    "round_started",
    "silo_finished",
    "silo_failed",
    "round_finished",
    "diagnostics",
    "evaluated",
    "tasks_evaluated",
    "unlearned",
    "checkpointed",
    "run_finished",
    "run_interrupted",
    "notice",
]
NAME_OF = dict(zip(EVENT_TYPES, NAMES_IN_ORDER, strict=True))


def _field(kind: type[Event], name: str, annotation: object) -> st.SearchStrategy:
    special = FIELDS.get(NAME_OF[kind], {}).get(name)
    if special is not None:
        return special
    if annotation is int:
        return COUNT
    if annotation in (float, float | None) or "Annotated" in str(annotation):
        return FINITE | st.none() if annotation == (float | None) else FINITE
    return st.from_type(annotation)  # type: ignore[arg-type]


def _events(kind: type[Event]) -> st.SearchStrategy[Event]:
    fields = {field.name: _field(kind, field.name, field.type) for field in dataclasses.fields(kind)}
    return st.builds(kind, **fields)


@pytest.mark.parametrize("kind", EVENT_TYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_event_survives_its_line(kind: type[Event], data: st.DataObject) -> None:
    event = data.draw(_events(kind))
    line = event.to_json()
    assert len(line.splitlines()) == 1
    content = json.loads(line, parse_constant=pytest.fail)
    assert content.pop("event") == NAME_OF[kind]
    assert content == dataclasses.asdict(event)
    assert from_json(line) == event


def _round_finished(**changes: object) -> RoundFinished:
    seconds: RoundSeconds = {
        "round": 5.0,
        "training": 3.0,
        "fold": 0.1,
        "outer": 0.1,
        "evaluate": 1.0,
        "checkpoint": 0.2,
        "overhead": 2.0,
    }
    fields: dict = {
        "time": 12.5,
        "round": 1,
        "global_step": 8,
        "tokens": 4096,
        "train_loss": 5.0,
        "pseudo_gradient_norm": 1.0,
        "silo_cosine": None,
        "consensus": 1.0,
        "parameter_norm": 30.0,
        "bytes_up": 10,
        "bytes_down": 20,
        "seconds": seconds,
    }
    return RoundFinished(**(fields | changes))


def test_what_is_not_finite_becomes_null() -> None:
    event = _round_finished(train_loss=math.inf, silo_cosine=math.nan)
    content = json.loads(event.to_json(), parse_constant=pytest.fail)
    assert content["train_loss"] is None
    assert content["silo_cosine"] is None
    back = from_json(event.to_json())
    assert isinstance(back, RoundFinished)
    assert math.isnan(back.train_loss)
    assert back.silo_cosine is None


def test_numpy_scalars_are_numbers() -> None:
    event = _round_finished(tokens=np.int64(7), train_loss=np.float32(0.5), consensus=np.float32("nan"))
    content = json.loads(event.to_json())
    assert (content["tokens"], content["train_loss"], content["consensus"]) == (7, 0.5, None)


def test_a_file_name_that_is_no_text_is_readable_again() -> None:
    event = Notice(level="info", message="cannot read data-\udcff.txt")
    back = from_json(event.to_json())
    assert isinstance(back, Notice)
    assert back.message == "cannot read data-?.txt"


def test_time_is_now_unless_given() -> None:
    before = time.time()
    assert before <= Notice(level="info", message="x").time <= time.time()


GOOD = '{"event": "notice", "time": 1.0, "level": "info", "message": "x"}'


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("", "no JSON"),
        ('{"event": "notice", "time": 1.0, "lev', "no JSON"),
        ("[1, 2]", 'no JSON object with an "event"'),
        ('{"time": 1.0}', 'no JSON object with an "event"'),
        ('{"event": 3, "time": 1.0}', 'no JSON object with an "event"'),
        (GOOD.replace("notice", "notise"), "unknown event 'notise'"),
        (GOOD.replace('"time": 1.0, ', ""), "lacks 'time'"),
        (GOOD.replace(', "message": "x"', ""), "lacks 'message'"),
        (GOOD.replace('"info"', '"loud"'), "bad 'level'"),
        (GOOD.replace('"x"', "7"), "bad 'message'"),
        (
            '{"event": "round_started", "time": 1, "round": "2", "cohort": [], "global_step": 0}',
            "bad 'round'",
        ),
        (
            '{"event": "round_started", "time": 1, "round": 2, "cohort": ["a", 1], "global_step": 0}',
            "bad 'cohort.1'",
        ),
        (_round_finished().to_json().replace('"fold"', '"mold"'), "lacks 'seconds.fold'"),
    ],
)
def test_a_malformed_line_is_named(line: str, fault: str) -> None:
    with pytest.raises(PhotonError) as raised:
        from_json(line)
    message = str(raised.value)
    assert fault in message
    assert line.strip()[:60] in message
    assert "\n" not in message


def test_a_listener_that_raises_is_dropped_with_one_notice() -> None:
    heard: list[Event] = []
    calls = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise OSError("disk\nfull")

    stream = EventStream([broken, heard.append])
    events = [Notice(level="info", message=str(number)) for number in range(3)]
    for event in events:
        stream.emit(event)
    assert calls == events[:1]
    notice = heard.pop(1)
    assert heard == events
    assert isinstance(notice, Notice)
    assert notice.level == "warning"
    assert "broken is dropped, the run goes on: OSError: disk" in notice.message
    assert "\n" not in notice.message


class Recorder:
    """Notes what it hears and when it is closed; raises where it is told to."""

    def __init__(self, name: str, notes: list[str], breaks: str = "") -> None:
        self.name, self.notes, self.breaks = name, notes, breaks

    def __call__(self, event: Event) -> None:
        self.notes.append(f"{self.name}: {getattr(event, 'message', '')[:9]}")
        if self.breaks == "hearing":
            raise OSError("no")

    def close(self) -> None:
        self.notes.append(f"{self.name} closed")
        if self.breaks == "closing":
            raise OSError("no")


def test_the_log_hears_first_and_is_closed_last_whatever_breaks() -> None:
    notes: list[str] = []
    log, *others = (
        Recorder(name, notes, breaks)
        for name, breaks in (("log", ""), ("a", ""), ("b", "hearing"), ("c", "closing"))
    )
    stream = EventStream(others[:2], log=log)
    stream.add(others[2])
    stream.emit(Notice(level="info", message="x"))
    assert notes == ["log: x", "a: x", "b: x", "c: x", "log: telemetry", "a: telemetry", "c: telemetry"]
    notes.clear()
    stream.close()
    assert notes == ["c closed", "log: telemetry", "a: telemetry", "b closed", "a closed", "log closed"]
    notes.clear()
    stream.close()
    assert notes == []


def test_what_the_log_raises_is_not_kept_back() -> None:
    notes: list[str] = []
    stream = EventStream([Recorder("a", notes)], log=Recorder("log", notes, "hearing"))
    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            stream.emit(Notice(level="info", message="x"))
    assert notes == ["log: x", "log: x"], "what is not in the log is told to nobody"
    stream.close()
    assert notes[2:] == ["a closed", "log closed"]


def test_ctrl_c_in_a_listener_ends_the_run() -> None:
    def interrupted(event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EventStream([interrupted]).emit(RunFinished(summary={}))


def test_events_cannot_be_changed() -> None:
    event = SiloFailed(round=1, silo="a", kind="error", reason="x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.round = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "loss", "text"),
    [
        (38.24, None, "38.2"),
        (1062.04, None, "1,062.0"),
        (11165.4, None, "11,165"),
        (1.2e128, None, "1e128"),
        (math.inf, 2000.0, "1e869"),
        (math.nan, 2000.0, "1e869"),
        (None, 2000.0, "1e869"),
        (math.inf, None, "beyond 1e308"),
        (None, None, "–"),
        (math.nan, 3.0, "–"),
        (None, math.inf, "–"),
    ],
)
def test_a_perplexity_is_text_whatever_it_is(value: float | None, loss: float | None, text: str) -> None:
    assert perplexity_text(value, loss=loss) == text
