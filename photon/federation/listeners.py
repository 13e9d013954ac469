"""Who hears what happens in a run: what ``telemetry.listeners`` names, the event log first."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from photon.components import build, import_target
from photon.config.schema import Component, RunConfig
from photon.errors import PhotonError
from photon.state.checkpoint import CheckpointStore
from photon.telemetry import display, log, wandb
from photon.telemetry.events import Event, EventStream, Listener, Notice, RunInterrupted
from photon.telemetry.listener import ListenerRun

WHERE = "telemetry.listeners"

#: Those of a run whose configuration names none, as one that was written before they could be chosen.
DEFAULT = tuple(
    Component.model_validate({"_target_": f"{factory.__module__}.{factory.__name__}"})
    for factory in (log.event_log, display.display, wandb.weights_and_biases)
)


def entries(config: RunConfig) -> Sequence[Component]:
    """Return what names the listeners of a run."""
    chosen = config.telemetry.listeners
    return DEFAULT if chosen is None else chosen


def listener_run(config: RunConfig, run_dir: Path, *, live: bool) -> ListenerRun:
    """Return what the listeners of a run are told when they begin."""
    path = run_dir / log.EVENTS
    return ListenerRun(run_dir, config, live, log.read_events(path) if path.exists() else [])


def mended(run_dir: Path) -> list[Notice]:
    """Cut damaged lines out of a run's events, and return what is to be told of that."""
    return [
        Notice(
            level="warning",
            message=f"line {number} of {log.EVENTS} was damaged and is cut out; it is kept in {log.DAMAGED}",
        )
        for number in log.mend(run_dir / log.EVENTS)
    ]


def open_log(run: ListenerRun) -> EventStream:
    """Return a stream that the event log alone hears: what others will show is on the disk."""
    return EventStream(log=log.event_log(run))


def open_others(run: ListenerRun, stream: EventStream) -> None:
    """Let the run's other listeners begin, in order.

    Raises
    ------
    PhotonError
        If one cannot: before the run starts, it is better mended than missed.
    """
    for index, entry in enumerate(entries(run.config)[1:], start=1):
        listener = _begin(entry, f"{WHERE}.{index}", run)
        if listener is not None:
            stream.add(listener)


def _begin(entry: Component, where: str, run: ListenerRun) -> Listener | None:
    try:
        listener: Listener | None = build(entry.as_mapping(), where, run)
    except PhotonError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise PhotonError(f"{where}: {entry.target} cannot begin ({what})") from error
    if listener is not None and not callable(listener):
        raise PhotonError(f"{where}: what {entry.target} returns cannot be called with an event")
    return listener


@contextmanager
def listening(
    config: RunConfig, run_dir: Path, *, live: bool
) -> Iterator[tuple[ListenerRun, EventStream, list[Notice]]]:
    """Open the event log, and tell in it what ends the run before its time.

    Yields
    ------
    tuple
        What listeners are told; the stream; and what is to be told of damaged lines once they listen.
    """
    # Here, because it brings transformers: who only shows a run does without.
    from photon.federation.for_above import reason_of

    cut = mended(run_dir)
    run = listener_run(config, run_dir, live=live)
    with closing(open_log(run)) as stream:
        try:
            yield run, stream, cut
        except BaseException as error:
            bad_input = isinstance(error, PhotonError)
            last = max(CheckpointStore(run_dir / "checkpoints").rounds(), default=0)
            # A log that cannot be written may be what ends the run.
            with suppress(Exception):
                stream.emit(RunInterrupted(round=last, reason=reason_of(error), bad_input=bad_input))
            raise


@contextmanager
def watching(config: RunConfig, history: Sequence[Event]) -> Iterator[EventStream]:
    """Yield what shows a run that another process does: its display, if that is one of its listeners."""
    run = ListenerRun(Path(str(config.run_dir)), config, live=True, history=history)
    stream = EventStream()
    try:
        for index, entry in enumerate(entries(config)):
            where = f"{WHERE}.{index}"
            if import_target(entry.target, where) is display.display:
                shown = _begin(entry, where, run)
                if shown is not None:
                    stream.add(shown)
        yield stream
    finally:
        stream.close()
