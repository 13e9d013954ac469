"""The progress of a run: a live view on a terminal, plain lines anywhere else."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from photon.telemetry.events import (
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
    SiloFailed,
    SiloFinished,
    TasksEvaluated,
    Unlearned,
)
from photon.telemetry.listener import ListenerRun
from photon.telemetry.log import current_history, seconds_between
from photon.telemetry.steps import SILOS, Steps, read_steps
from photon.telemetry.summary import (
    counted,
    estimate_text,
    format_bytes,
    format_count,
    format_perplexity,
    format_seconds,
    has_own_models,
    main_figure,
    mean_over_silos,
    silo_unigram_perplexity,
    unigram_perplexity,
)

# Silos that a line names, at most.
_NAMED = 16
# Figures of a silo, and the width of a window that has room for them beside the others.
_COLUMNS = (("tokens/s", 76), ("train loss", 0), ("ppl before", 76), ("ppl now", 0), ("unigram", 0))
# Lines of the live view around the table of silos; the rest of the window's height is for silos.
_LINES_AROUND = 16

#: What stays above the live view.
_KEPT = (SiloFailed, Notice, RunInterrupted, TasksEvaluated, Unlearned)


class Display:
    """Listener that shows a run from `start` to `close`, which leaves the terminal clean.

    As a context manager it does both.

    Parameters
    ----------
    console
        A live view is drawn where it is a terminal, otherwise one line is printed per round and
        evaluation.
    history
        Events of a run that goes on: they are shown as its past, but not told again.
    silos
        Folder where silos of this machine say how far they are; None: there are none.
    clock
        Unix seconds now.
    """

    def __init__(
        self,
        console: Console,
        *,
        history: Iterable[Event] = (),
        silos: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._console = console
        self._state = _State(history)
        self._silos_folder = silos
        self._clock = clock
        self._lock = threading.Lock()
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(self, console=console, refresh_per_second=8)

    def __call__(self, event: Event) -> None:
        """Show ``event``."""
        with self._lock:
            self._state.update(event)
            line = _line(event, self._state)
        if self._live is None:
            if line is not None:
                self._console.print(line, soft_wrap=True)
        elif isinstance(event, _KEPT) and line is not None:
            # Printed above the live view, where it stays.
            self._console.print(line)

    def start(self) -> Self:
        """Begin a live view, where there is one."""
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def close(self) -> None:
        """Leave the last view on the terminal."""
        if self._live is not None:
            with self._lock:
                self._state.ended = True
            self._live.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __rich__(self) -> RenderableType:
        with self._lock:
            return self._view(self._state)

    def _view(self, state: "_State") -> RenderableType:
        if state.started is None:
            self._spinner.update(text=Text("Photon is starting"))
            return self._spinner
        parts: list[RenderableType] = [Text(), _headline(state.started), self._progress(state)]
        parts += [self._silos(state), _figures(state)]
        if not state.ended:
            self._spinner.update(text=Text(state.phase(), style="dim"))
            parts.append(self._spinner)
        return Group(*parts)

    def _progress(self, state: "_State") -> RenderableType:
        assert state.started is not None
        line = Table.grid(padding=(0, 1))
        done = state.finished.round if state.finished else 0
        bar = ProgressBar(total=max(1, state.started.rounds), completed=done, width=30)
        cells: list[RenderableType] = [Text("rounds"), bar, Text(f"{done}/{state.started.rounds}", "bold")]
        now = state.last_time if state.ended else self._clock()
        cells.append(Text(f"{format_seconds(max(0.0, now - state.start_time))} so far", "dim"))
        left = state.seconds_left(now)
        if left is not None and not state.ended:
            cells.append(Text(f"about {format_seconds(left)} left", "cyan"))
        line.add_row(*cells)
        return line

    def _silos(self, state: "_State") -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        table.add_column("silo", no_wrap=True, overflow="ellipsis")
        table.add_column("this round", no_wrap=True)
        columns = [number for number, (_, wide) in enumerate(_COLUMNS) if self._console.width >= wide]
        for number in columns:
            table.add_column(_COLUMNS[number][0], justify="right", no_wrap=True)
        room = max(3, self._console.height - _LINES_AROUND)
        names = state.participants(room)
        shown = names[:room]
        steps = self._steps_of(state, shown)
        for name in shown:
            figures = state.row(name)
            table.add_row(
                Text(name), _state_text(state, name, steps), *(figures[number] for number in columns)
            )
        if len(shown) < len(names):
            table.add_row(Text(f"and {len(names) - len(shown)} more", style="dim"))
        table.add_section()
        figures = state.total_row()
        table.add_row("all", "", *(figures[number] for number in columns), style="bold")
        return table

    def _steps_of(self, state: "_State", names: Iterable[str]) -> dict[str, Steps]:
        """Return how far silos are that say so, in this round."""
        if self._silos_folder is None or not state.in_round():
            return {}
        assert state.round is not None
        told = {name: read_steps(self._silos_folder / name) for name in names if name in state.round.cohort}
        return {name: at for name, at in told.items() if at is not None and at.round == state.round.round}


def display(run: ListenerRun) -> Display | None:
    """Return what shows a run as ``telemetry.display`` wants it."""
    wanted = run.config.telemetry.display
    if wanted == "none":
        return None
    lines_only = not run.live or wanted == "plain"
    console = Console(force_terminal=False if lines_only else None)
    return Display(console, history=run.history, silos=run.run_dir / SILOS).start()


class _State:
    """What the events told so far, as the views need it."""

    def __init__(self, history: Iterable[Event]) -> None:
        self._events: list[Event] = []
        self.reset()
        for event in history:
            self.update(event)

    def reset(self) -> None:
        self.started: RunStarted | None = None
        self.start_time = 0.0
        self.last_time = 0.0
        self.ended = False
        self.round: RoundStarted | None = None
        self.finished: RoundFinished | None = None
        self.round_seconds: list[float] = []
        self.replies: dict[str, SiloFinished] = {}
        self.failed: dict[str, SiloFailed] = {}
        self.losses: dict[str, float] = {}
        self.first: Evaluated | None = None
        self.latest: Evaluated | None = None
        self.bytes_up = 0
        self.bytes_down = 0

    def update(self, event: Event) -> None:
        self._events.append(event)
        if isinstance(event, RunStarted):
            self._begin()
        else:
            self._apply(event)

    def _begin(self) -> None:
        # What an interrupted attempt told of rounds that will be done again is forgotten.
        self._events = current_history(self._events)
        self.reset()
        for event in self._events:
            self._apply(event)

    def _apply(self, event: Event) -> None:
        self.last_time = event.time
        if isinstance(event, RunStarted):
            self.started, self.start_time, self.ended = event, event.time, False
            self.round, self.round_seconds, self.replies, self.failed = None, [], {}, {}
        elif isinstance(event, RoundStarted):
            self.round, self.replies, self.failed = event, {}, {}
        elif isinstance(event, SiloFinished):
            self.replies[event.silo] = event
            self.losses[event.silo] = event.loss
        elif isinstance(event, SiloFailed):
            self.failed[event.silo] = event
        elif isinstance(event, RoundFinished):
            self.finished = event
            self.round_seconds.append(event.seconds["round"])
            self.bytes_up += event.bytes_up
            self.bytes_down += event.bytes_down
        elif isinstance(event, Evaluated):
            self.first = event if event.round == 0 else self.first
            self.latest = event
            self.bytes_up += event.bytes_up
            self.bytes_down += event.bytes_down
        elif isinstance(event, (RunFinished, RunInterrupted)):
            self.ended = True

    def seconds_left(self, now: float) -> float | None:
        """Return the rounds left times their mean length, less what the present one has used."""
        if self.started is None or self.finished is None or not self.round_seconds:
            return None
        mean = math.fsum(self.round_seconds) / len(self.round_seconds)
        left = (self.started.rounds - self.finished.round) * mean
        return max(0.0, left - min(mean, max(0.0, now - self.finished.time)))

    def in_round(self) -> bool:
        if self.round is None:
            return False
        return self.finished is None or self.finished.round < self.round.round

    def phase(self) -> str:
        if not self.in_round():
            return "before the first round" if self.finished is None else "between rounds"
        assert self.round is not None
        there, expected = len(self.replies) + len(self.failed), len(self.round.cohort)
        if there < expected:
            return f"round {self.round.round}: {there} of {expected} silos are done"
        return f"round {self.round.round}: outer step, validation, checkpoint"

    def participants(self, room: int) -> list[str]:
        """Return who can train, in the manifest's order, the cohort first where not all have room.

        The centralized strategy's only participant is no silo.
        """
        assert self.started is not None
        cohort = dict.fromkeys(self.round.cohort if self.round else [])
        names = list(dict.fromkeys([*(silo["name"] for silo in self.started.silos), *cohort]))
        return names if len(names) <= room else sorted(names, key=lambda name: name not in cohort)

    def row(self, name: str) -> list[str]:
        assert self.started is not None
        reply = self.replies.get(name)
        loss = self.losses.get(name)
        facts = next((silo for silo in self.started.silos if silo["name"] == name), None)
        return [
            format_count(reply.tokens_per_second) if reply else "",
            _loss(loss),
            _silo_perplexity(self.first, name),
            _silo_perplexity(self.latest, name),
            format_perplexity(silo_unigram_perplexity(facts)) if facts else "",
        ]

    def speed(self) -> float:
        """Return the tokens of the round's replies a second of the time that they took together.

        Silos that train one after the other are no faster than one.
        """
        assert self.round is not None
        until = max(reply.time for reply in self.replies.values())
        tokens = sum(reply.tokens for reply in self.replies.values())
        return tokens / max(1e-9, until - self.round.time)

    def total_row(self) -> list[str]:
        assert self.started is not None
        return [
            format_count(self.speed()) if self.replies else "",
            _loss(self.finished.train_loss if self.finished else None),
            format_perplexity(self.first.perplexity, self.first.loss) if self.first else "",
            format_perplexity(self.latest.perplexity, self.latest.loss) if self.latest else "",
            format_perplexity(unigram_perplexity(self.started, self.latest)),
        ]


def _silo_perplexity(evaluation: Evaluated | None, name: str) -> str:
    found = evaluation.per_silo.get(name) if evaluation else None
    return format_perplexity(found["perplexity"], found["loss"]) if found else ""


def _state_text(state: _State, name: str, steps: Mapping[str, Steps]) -> Text:
    if name in state.failed:
        return Text(f"✗ {state.failed[name].kind}", style="red")
    if name in state.replies:
        return Text("✓ done", style="green")
    if state.round is not None and name in state.round.cohort:
        if not state.in_round():
            return Text("")
        if name in steps:
            return Text(f"● step {steps[name].done} of {steps[name].asked}", style="cyan")
        # Where others say how far they are, one that does not has yet to begin.
        return Text("○ waiting", style="dim") if steps else Text("● training", style="cyan")
    return Text("– resting", style="dim") if state.round is not None else Text("")


def _headline(started: RunStarted) -> Text:
    line = Text.assemble(("Photon ", "bold magenta"), (started.name, "bold"))
    return line.append(f"\n{_setup(started)}", style="dim")


def _setup(started: RunStarted) -> str:
    facts = [
        started.strategy,
        f"{started.model} ({format_count(started.parameters)} parameters)",
        f"{started.cohort} of {len(started.silos)} silos a round",
        counted(started.local_steps, "local step"),
        f"{started.engine}, {started.device}",
    ]
    return " · ".join(facts)


def _figures(state: _State) -> Text:
    last = state.finished
    if last is None:
        return Text("no round is finished yet", style="dim")
    sizes = f"{format_bytes(state.bytes_up)} up, {format_bytes(state.bytes_down)} down"
    lines = [
        f"round {last.round}: {_train_facts(last)}",
        f"in all: {format_count(last.tokens)} tokens, {sizes}",
    ]
    return Text("\n".join(lines), style="dim")


def _loss(value: float | None) -> str:
    """Return a loss as it is shown; nothing where no steps were taken."""
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def _train_facts(event: RoundFinished) -> str:
    if math.isnan(event.train_loss):
        return "sums over the silos' text, no local steps"
    cosine = "" if event.silo_cosine is None else f", silo cosine {event.silo_cosine:.2f}"
    return f"train loss {event.train_loss:.3f}, pseudo-gradient norm {event.pseudo_gradient_norm:.3g}{cosine}"


def _line(event: Event, state: _State) -> Text | None:
    """Return what a log file says of an event, or None where it says nothing."""
    rounds = state.started.rounds if state.started else 0
    if isinstance(event, RunStarted):
        return _start_line(event)
    if isinstance(event, Evaluated):
        where = "before training" if event.round == 0 else f"round {event.round}/{rounds}"
        return Text(f"{where}: {_evaluation_text(event, state)}")
    if isinstance(event, RoundFinished):
        return Text(f"round {event.round}/{rounds}: {_round_text(event, state)}")
    if isinstance(event, TasksEvaluated):
        text = f"round {event.round}/{rounds}: {_tasks_text(event)}"
        return Text(text, style="yellow" if event.failure is not None else "")
    if isinstance(event, Unlearned):
        return Text(f"round {event.round}/{rounds}: {unlearned_text(event)}")
    if isinstance(event, SiloFailed):
        text = f"round {event.round}/{rounds}: silo {event.silo} failed ({event.kind}): {event.reason}"
        return Text(text, style="yellow")
    if isinstance(event, Notice):
        return Text(
            event.message if event.level == "info" else f"warning: {event.message}",
            style="" if event.level == "info" else "yellow",
        )
    if isinstance(event, RunInterrupted):
        # Whoever follows the run tells the reason, as the last line.
        if event.bad_input:
            return None
        return Text(f"interrupted after round {event.round}/{rounds}", style="yellow")
    if isinstance(event, RunFinished):
        begun = event if state.started is None else state.started
        return Text(f"finished after {format_seconds(seconds_between(begun, event))}")
    return None


def _start_line(event: RunStarted) -> Text:
    resumed = "" if event.resumed_from is None else f", going on from round {event.resumed_from}"
    return Text(f"Photon {event.name} · {_setup(event)} · {counted(event.rounds, 'round')}{resumed}")


def _evaluation_text(event: Evaluated, state: _State) -> str:
    notes = []
    if state.first is not None and event.round > 0:
        notes.append(f"{format_perplexity(state.first.perplexity, state.first.loss)} before training")
    if state.started is not None:
        notes.append(f"unigram {format_perplexity(unigram_perplexity(state.started, event))}")
    own = ""
    if state.started is not None and has_own_models(state.started, event):
        own = f" · own models of silos {format_perplexity(mean_over_silos(state.started, event))} in the mean"
    per_silo = _named(
        [
            f"{name} {format_perplexity(silo['perplexity'], silo['loss'])}"
            for name, silo in sorted(event.per_silo.items())
        ],
        " · ",
    )
    overall = f"validation perplexity {format_perplexity(event.perplexity, event.loss)}{estimate_text(event)}"
    recall = "" if event.recall is None else f" · recall of what was forgotten {event.recall:.2f}"
    measured = "".join(
        f" · {name.replace('_', ' ')} {value:.3g}" for name, value in sorted(event.figures.items())
    )
    return f"{overall} ({', '.join(notes)}) · {per_silo}{own}{measured}{recall}"


def _named(names: list[str], between: str) -> str:
    """Name the first few of many."""
    more = [] if len(names) <= _NAMED else [f"and {len(names) - _NAMED:,} more"]
    return between.join([*names[:_NAMED], *more])


def unlearned_text(event: Unlearned) -> str:
    """Return what a line says of a request that was fulfilled."""
    request = event.request
    before, after = request["before"], request["after"]
    moved = ", ".join(
        f"{name} {before[key]:.2f} → {after[key]:.2f}"
        for name, key in (
            ("recall of what is forgotten", "forget/rouge1"),
            ("refused of it", "forget/refused"),
            ("recall of what is kept", "retain/rouge1"),
        )
        if key in before and key in after
    )
    return (
        f"unlearned as {request['asked_by']} asked: layer {request['layer']}, ridge {request['ridge']:g}, "
        f"coefficient {request['coefficient']:g} · {moved}"
    )


def _tasks_text(event: TasksEvaluated) -> str:
    if event.failure is not None:
        return f"no figures of tasks: {event.failure}"
    figures = [(name, main_figure(task)) for name, task in event.tasks.items()]
    told = " · ".join(f"{name} {figure[1]:.4g}" for name, figure in figures if figure is not None)
    return f"tasks {told} · {format_seconds(event.seconds)}"


def _round_text(event: RoundFinished, state: _State) -> str:
    left = state.seconds_left(event.time)
    facts = [
        _named(sorted(state.replies), ", ") or "no silo",
        _train_facts(event),
        f"{format_bytes(event.bytes_up)} up, {format_bytes(event.bytes_down)} down",
        f"{format_seconds(event.seconds['round'])}",
    ]
    if left is not None and state.started is not None and event.round < state.started.rounds:
        facts.append(f"about {format_seconds(left)} left")
    return " · ".join(facts)
