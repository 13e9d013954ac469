"""Who hears what happens in a run: the event log, the display, Weights & Biases."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from photon.config.schema import RunConfig
from photon.telemetry.display import Display
from photon.telemetry.events import Event, Listener
from photon.telemetry.log import EventLog, read_events


@contextmanager
def display(config: RunConfig, *, live: bool, history: Sequence[Event]) -> Iterator[Listener]:
    """Yield the listener that shows the run as ``telemetry.display`` wants it."""
    if config.telemetry.display == "none":
        yield lambda _: None
        return
    lines_only = not live or config.telemetry.display == "plain"
    with Display(Console(force_terminal=False if lines_only else None), history=history) as listener:
        yield listener


@contextmanager
def listeners(config: RunConfig, run_dir: Path, *, live: bool) -> Iterator[list[Listener]]:
    """Yield all listeners of a run, the event log first: what the others show is on the disk."""
    path = run_dir / "events.jsonl"
    history = read_events(path) if path.exists() else []
    with (
        EventLog(path) as log,
        display(config, live=live, history=history) as show,
        _wandb(config, run_dir) as more,
    ):
        yield [log, show, *more]


@contextmanager
def _wandb(config: RunConfig, run_dir: Path) -> Iterator[list[Listener]]:
    settings = config.telemetry.wandb
    if settings.mode == "off":
        yield []
        return
    from photon.telemetry.wandb import WandbListener

    listener = WandbListener(
        mode=settings.mode,
        project=settings.project,
        run_dir=run_dir,
        config=config.model_dump(by_alias=True),
        run_id=f"{run_dir.name}-{zlib.crc32(str(run_dir).encode()):08x}",
    )
    try:
        yield [listener]
    finally:
        listener.close()
