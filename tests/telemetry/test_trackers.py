"""TensorBoard, MLflow and Prometheus read back what was told; a tracker that fails or hangs costs nothing."""

import dataclasses
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from photon.telemetry import aside
from photon.telemetry.aside import Aside
from photon.telemetry.events import (
    Evaluated,
    Event,
    EventStream,
    Notice,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiloFailed,
)
from photon.telemetry.listener import ListenerRun
from photon.telemetry.mlflow import MlflowListener
from photon.telemetry.prometheus import PrometheusListener
from photon.telemetry.rows import Rows, numbers_of
from photon.telemetry.tensorboard import TensorBoardListener
from tests.telemetry.synthetic import synthetic_events

# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_are_numbers_alone(events: list[Event]) -> None:
    rows = Rows()
    found = [row for row in map(rows.of, events) if row is not None]
    assert [row.round for row in found] == [0, *(number for r in range(1, 11) for number in (r, r))]
    assert all(type(value) is float for row in found for value in row.values.values())
    told = [event for event in events if isinstance(event, RoundFinished)]
    rounds = [row for row in found if "train/loss" in row.values]
    assert [row.values["train/loss"] for row in rounds] == [event.train_loss for event in told]
    # In round 4 one of three gave nothing.
    assert [row.values["silos/failed"] for row in rounds] == [float(r == 4) for r in range(1, 11)]
    assert [row.values["silos/finished"] for row in rounds] == [2.0 if r == 4 else 3.0 for r in range(1, 11)]


def test_many_silos_are_summed_up() -> None:
    rows = Rows()
    evaluated = next(one for one in synthetic_events(extra_silos=61) if isinstance(one, Evaluated))
    row = rows.of(evaluated)
    assert row is not None
    assert row.values["validation/silos"] == 65.0
    assert not [name for name in row.values if "hospital" in name]


def test_of_a_summary_numbers_are_told() -> None:
    summary = {"a": {"b": 1, "c": None, "d": "x"}, "e": True, "f": [1], "g": float("inf"), "h": 0.5}
    assert numbers_of(summary) == {"a/b": 1.0, "h": 0.5}


# --- a tracker that fails or hangs --------------------------------------------------------------------------


class Told:
    """Remember what is told; ``then`` is called with each event."""

    def __init__(self, then: Callable[[Event], None] = lambda event: None) -> None:
        self.events: list[Event] = []
        self.closed = False
        self._then = then

    def __call__(self, event: Event) -> None:
        self._then(event)
        self.events.append(event)

    def close(self) -> None:
        self.closed = True


def hang(until: threading.Event) -> None:
    until.wait()


def notices(heard: list[Event]) -> list[str]:
    return [event.message for event in heard if isinstance(event, Notice) and event.level == "warning"]


def test_a_tracker_hears_all_in_order_and_is_closed(events: list[Event]) -> None:
    told = Told()
    heard: list[Event] = []
    stream = EventStream([heard.append, Aside(lambda: told, "Told")])
    for event in events:
        stream.emit(event)
    stream.close()
    assert told.events == events
    assert told.closed
    assert notices(heard) == []


def test_a_tracker_that_raises_is_dropped_with_a_notice(events: list[Event]) -> None:
    raised = threading.Event()

    def then(event: Event) -> None:
        if isinstance(event, RoundFinished):
            raised.set()
            raise OSError("the server is\ngone")

    told, heard = Told(then), list[Event]()
    tracker = Aside(lambda: told, "Told")
    stream = EventStream([heard.append, tracker])
    for event in events:
        stream.emit(event)
        if isinstance(event, RoundFinished):
            assert raised.wait(10)
            tracker._thread.join(10)
    stream.close()
    assert notices(heard) == ["telemetry: Told is dropped, the run goes on: OSError: the server is"]
    assert len(heard) == len(events) + 1
    assert told.closed


def test_a_tracker_that_hangs_stalls_nothing(events: list[Event], monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    heard: list[Event] = []
    stream = EventStream([heard.append])
    stream.add(Aside(lambda: Told(lambda event: hang(forever)), "Told", ends_within=0.2))
    begun = time.monotonic()
    for event in events:
        stream.emit(event)
    stream.close()
    assert time.monotonic() - begun < 5
    assert notices(heard) == [
        "telemetry: Told could not be closed: TimeoutError: it has not ended within 0.2 seconds, and is "
        "left alone"
    ]
    # One that has hung for long is not even waited for.
    monkeypatch.setattr(aside, "MOST_WAITING", 3)
    heard.clear()
    stream = EventStream([heard.append])
    stream.add(Aside(lambda: Told(lambda event: hang(forever)), "Told", ends_within=60))
    for event in events:
        stream.emit(event)
    stream.close()
    assert time.monotonic() - begun < 10
    assert notices(heard) == [
        "telemetry: Told is dropped, the run goes on: TimeoutError: it hangs: 3 events wait for it"
    ]
    forever.set()


def test_a_tracker_that_cannot_begin_says_so() -> None:
    def broken() -> Told:
        raise PhotonError("log in first")

    with pytest.raises(PhotonError, match="log in first"):
        Aside(broken, "Told")
    forever = threading.Event()

    def slow() -> Told:
        forever.wait()
        return Told()

    with pytest.raises(PhotonError, match=r"Told has not begun within 0\.1 seconds"):
        Aside(slow, "Told", begins_within=0.1)
    forever.set()


# --- TensorBoard --------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_reads_back_what_was_told(events: list[Event], tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    for event in events:
        listener(event)
    listener.close()
    told = [event for event in events if isinstance(event, Evaluated)]
    found = scalars(tmp_path)
    assert found["validation/perplexity"] == [
        (event.round, pytest.approx(event.perplexity, rel=1e-6)) for event in told
    ]
    assert "silo/cpp/tokens_per_second" in found
    assert b"not finite" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())


def test_in_tensorboard_a_run_that_goes_on_has_one_axis(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    chosen = ("telemetry=tensorboard", "schedule=constant")
    run_small(*chosen, "rounds=2")
    run_small(*chosen, "rounds=4", resume=True)
    folder = tmp_path / "run" / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    assert [step for step, _ in scalars(folder)["train/loss"]] == [1, 2, 3, 4]
    # Rounds that are done again take the place of those that were lost.
    listener = TensorBoardListener(tmp_path / "again")
    events = list(synthetic_events(rounds=3))
    started = next(event for event in events if isinstance(event, RunStarted))
    for event in events:
        listener(event)
    time.sleep(1.1)  # Files are read in the order of the seconds in their names.
    later = [event for event in events if getattr(event, "round", 0) > 1]
    for event in [dataclasses.replace(started, resumed_from=1), *later]:
        listener(event)
    listener.close()
    assert [step for step, _ in scalars(tmp_path / "again")["train/loss"]] == [1, 2, 3]


# --- MLflow -------------------------------------------------------------------------------------------------


@pytest.fixture
def file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow keep runs in a folder: what it keeps them in otherwise has a schema to be built first."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


@pytest.mark.usefixtures("file_store")
def test_mlflow_reads_back_what_was_told_and_goes_on(events: list[Event], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    half = len(events) // 2
    config = {"rounds": 10, "model": {"name": "it's"}, "long": "x" * 900}
    for part in (events[:half], [*events[half:], RunFinished(summary={"tokens": 7, "status": "of a silo"})]):
        listener = MlflowListener(uri, "tests", "mine", str(tmp_path / "it's"), config)
        for event in part:
            listener(event)
        listener.close()
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "mine")
    assert (run.data.params["model.name"], run.data.params["rounds"]) == ("it's", "10")
    assert run.data.metrics["summary/tokens"] == 7.0
    history = client.get_metric_history(run.info.run_id, "validation/perplexity")
    told = [event for event in events if isinstance(event, Evaluated)]
    assert [(one.step, one.value) for one in history] == [(event.round, event.perplexity) for event in told]


# --- Prometheus ---------------------------------------------------------------------------------------------


def scraped(listener: PrometheusListener) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{listener.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_prometheus_scrapes_what_was_told(events: list[Event]) -> None:
    listener = PrometheusListener("127.0.0.1", 0)
    try:
        before = scraped(listener)
        assert before["photon_state{state=starting}"] == 1.0
        for event in events:
            listener(event)
        found = scraped(listener)
        rounds = [event for event in events if isinstance(event, RoundFinished)]
        evaluated = [event for event in events if isinstance(event, Evaluated)]
        assert found["photon_round"] == found["photon_rounds_planned"] == 10.0
        assert found["photon_tokens_trained"] == rounds[-1].tokens
        assert found["photon_validation_perplexity"] == evaluated[-1].perplexity
        assert found["photon_silo_failures_total{kind=rejected}"] == 1.0
        assert found["photon_silo_failures_total{kind=error}"] == 0.0
        moved = sum(event.bytes_up for event in [*rounds, *evaluated])
        assert found["photon_link_bytes_total{way=up}"] == moved
        assert found["photon_state{state=running}"] == 1.0
        assert found["photon_state{state=starting}"] == 0.0
        # However many silos there are, and whatever they are called and say.
        names = set(found)
        listener(SiloFailed(round=11, silo="a silo", kind="error", reason="a secret"))
        for event in synthetic_events(extra_silos=40):
            listener(event)
        assert set(scraped(listener)) == names
    finally:
        listener.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{listener.port}/metrics", timeout=10)


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    listener = PrometheusListener("127.0.0.1", 0)
    try:
        with pytest.raises(
            PhotonError, match=rf"cannot listen at 127\.0\.0\.1:{listener.port} .*another port"
        ):
            PrometheusListener("127.0.0.1", listener.port)
    finally:
        listener.close()


# --- as configured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "begin"),
    [
        ("tensorboard", TensorBoardListener),
        ("mlflow", lambda folder: MlflowListener(None, "e", "n", str(folder), {})),
        ("prometheus_client", lambda folder: PrometheusListener("127.0.0.1", 0)),
    ],
)
def test_a_missing_package_is_said_with_the_command(
    package: str, begin: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    extra = package.removesuffix("_client")
    with pytest.raises(PhotonError, match=rf"pip install 'photon-fl\[{extra}\]'"):
        begin(tmp_path)


@pytest.mark.usefixtures("file_store")
def test_mlflow_and_prometheus_follow_a_run(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = (tmp_path / "store").as_uri()
    summary = run_small("telemetry=mlflow", f"telemetry.listeners.3.uri={uri}", "rounds=1", name="first")
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("photon").experiment_id])
    assert run.data.metrics["summary/perplexity.final"] == pytest.approx(summary["perplexity"]["final"])
    summary = run_small("telemetry=prometheus", "telemetry.listeners.3.port=0", "rounds=1", name="second")
    assert summary["status"] == "finished"


def test_a_listener_of_a_run_that_hangs_or_raises_changes_nothing(
    run_small: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    weights = run_small("rounds=1", name="plain")["weights_sha256"]

    def hangs(event: Event) -> None:
        forever.wait()

    def raises(event: Event) -> None:
        raise ValueError("no")

    for name, then in (("hangs", hangs), ("raises", raises)):
        module = sys.modules["photon.telemetry.tensorboard"]

        def tracker(run: ListenerRun, *, folder: str, then: Any = then) -> Aside:
            return Aside(lambda: Told(then), "Told", ends_within=0.1)

        monkeypatch.setattr(module, "tensorboard", tracker)
        assert run_small("telemetry=tensorboard", "rounds=1", name=name)["weights_sha256"] == weights
    forever.set()
