"""The report: one HTML page with the figures of a run, or of several runs laid side by side.

The page needs nothing but itself: style and plots are in it, there are no scripts, and its content
security policy forbids it to load anything.
"""

import datetime
import itertools
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml

from photon import __version__
from photon.config.tree import TreeNode, read_tree
from photon.errors import PhotonError
from photon.files import atomic
from photon.report import plots, tree_figures
from photon.report.plots import INK, REFERENCE, Axis, Drawing, Series, Style
from photon.report.template import TEMPLATE
from photon.telemetry.events import (
    ClientFailed,
    ClientFinished,
    Diagnostics,
    Evaluated,
    Event,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunInterrupted,
    RunStarted,
)
from photon.telemetry.log import current_history, elapsed_seconds, read_events
from photon.telemetry.summary import (
    build_summary,
    counted,
    format_bytes,
    format_count,
    format_perplexity,
    format_seconds,
    format_share,
    last_start,
    privacy_figures,
)

_MOST_ROWS = 200
_ROUND = Axis("round", "round")
_TOKENS = Axis("tokens trained, all silos", "count")
_TIME = Axis("time", "seconds")
_PERPLEXITY = Axis("validation perplexity", log=True)
_PHASES = (
    ("training", Style("c1")),
    ("fold", Style("c4")),
    ("outer", Style("c3")),
    ("evaluate", Style("c2")),
    ("checkpoint", Style("c5")),
    ("other", Style("muted")),
)
_DIAGNOSTICS = {
    "attention": "Weights of a node's own key blocks and of its children's, by block, in each aggregation.",
    "residual_route": "Of key blocks that travelled to another child: how much alike they are, by block.",
    "noise": "Gradient noise scale: trace of the covariance of updates, squared norm of the true one, ratio.",
    "pseudo_gradient_norm": "By layer.",
    "parameter_norm": "By layer, after the outer step.",
    "activation_norm_in": "Root mean square over tokens, leaving the embedding, on each client's own text.",
    "activation_norm_out": "Root mean square over tokens, entering the head, on each client's own text.",
    "basis_similarity": "Of LoRDO's subspaces before and after a refresh: 1 means that they do not turn.",
}


def write_report(runs: Sequence[Path], output: Path) -> None:
    """Write the report on one run, or on several side by side, to ``output``.

    Parameters
    ----------
    runs
        Run folders, with ``config.yaml`` and ``events.jsonl``; a run need not be finished.
    output
        The HTML file; what was there is replaced.

    Raises
    ------
    PhotonError
        ``runs`` is empty, a folder of it is not a run, or ``output`` cannot be written; the message names it.
    """
    if not runs:
        raise PhotonError("report: no run is named; name at least one folder that `photon train` made")
    loaded = [_Run.load(folder) for folder in runs]
    page = _run_page(loaded[0]) if len(loaded) == 1 else _comparison_page(loaded)
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.from_string(TEMPLATE).render(page=page, version=__version__)
    try:
        atomic.write_text(output, text)
    except OSError as error:
        raise PhotonError(f"{output}: cannot be written ({error.strerror}); name another file") from error


@dataclass(frozen=True)
class _Figure:
    """A plot with all that stands around it; ``rows`` are the figures behind it."""

    title: str
    note: str
    drawing: Drawing
    columns: list[str]
    rows: list[list[str]]
    legend: list[tuple[str, Style]] = field(default_factory=list)


@dataclass(frozen=True)
class _Table:
    """A table; the first column holds names, ``marks`` the look of what they name."""

    columns: list[str]
    rows: list[list[str]]
    marks: list[Style | None]
    strong_last: bool = False
    #: What share of its colour each cell beside the names has, in a heat map.
    shades: list[list[float]] | None = None


@dataclass(frozen=True)
class _Tables:
    """Tables with all that stands around them, in the place of a plot."""

    title: str
    note: str
    tables: list[_Table]


_Panel = _Figure | _Tables


@dataclass(frozen=True)
class _Page:
    """What the template shows."""

    title: str
    subtitle: list[str]
    status: str
    status_kind: str
    cards: list[tuple[str, str, str]]
    tables: list[tuple[str, _Table]]
    sections: list[tuple[str, Sequence[_Panel]]]
    log: list[tuple[str, str, str, str]]
    configs: list[tuple[str, str]]
    commands: list[str]
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class _Run:
    """A run folder as it was read."""

    folder: Path
    started: RunStarted
    history: list[Event]
    elapsed: list[float]
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "_Run":
        for name in ("events.jsonl", "config.yaml"):
            if not (folder / name).is_file():
                raise PhotonError(
                    f"{folder}: not a run, it has no {name}; name a folder that `photon train` made"
                )
        events = read_events(folder / "events.jsonl")
        history = current_history(events)
        text = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            started = last_start(history)
        except PhotonError as error:
            raise PhotonError(f"{folder}: {error}") from None
        return cls(
            folder=folder,
            started=started,
            history=history,
            elapsed=elapsed_seconds(history),
            summary=build_summary(events, weights_sha256=_weights_sha256(folder, events)),
            config_text=text,
            config=_read_config(folder / "config.yaml", text),
        )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def silos(self) -> dict[str, Style]:
        return {silo["name"]: Style.of(index) for index, silo in enumerate(self.started.silos)}

    @property
    def participants(self) -> dict[str, Style]:
        """The silos, and who else took part: the centralized strategy's only client is no silo."""
        names = [silo["name"] for silo in self.started.silos]
        cohorts = [event.cohort for event in self.history if isinstance(event, RoundStarted)]
        seen = dict.fromkeys(name for cohort in cohorts for name in cohort)
        names += [name for name in seen if name not in names]
        return {name: Style.of(index) for index, name in enumerate(names) if name in seen}

    @property
    def rounds(self) -> list[RoundFinished]:
        return [event for event in self.history if isinstance(event, RoundFinished)]

    @property
    def clients(self) -> list[ClientFinished]:
        return [event for event in self.history if isinstance(event, ClientFinished)]

    @property
    def diagnosed(self) -> list[str]:
        """What figures the `Diagnostics` tell of, such as ``parameter_norm``."""
        events = [event for event in self.history if isinstance(event, Diagnostics)]
        return list(dict.fromkeys(name.partition("/")[0] for event in events for name in event.values))

    @property
    def evaluations(self) -> list[tuple[Evaluated, float]]:
        """The last evaluation of each round with the seconds at work until then."""
        found: dict[int, tuple[Evaluated, float]] = {}
        for event, seconds in zip(self.history, self.elapsed, strict=True):
            if isinstance(event, Evaluated):
                found[event.round] = (event, seconds)
        return [found[number] for number in sorted(found)]

    @property
    def status(self) -> tuple[str, str]:
        """In words, and as the kind that the page colours."""
        done, planned = self.summary["rounds"], self.started.rounds
        if any(isinstance(event, RunFinished) for event in self.history):
            return f"finished, {counted(planned, 'round')}", "good"
        stopped = [event for event in self.history if isinstance(event, RunInterrupted | RunStarted)][-1]
        word = "interrupted" if isinstance(stopped, RunInterrupted) else "not finished"
        return f"{word}, {done} of {counted(planned, 'round')}", "warn"


def _weights_sha256(folder: Path, events: Sequence[Event]) -> str | None:
    if events and isinstance(events[-1], RunFinished):
        return events[-1].summary.get("weights_sha256")
    try:
        return json.loads((folder / "summary.json").read_text()).get("weights_sha256")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        raise PhotonError(f"{folder / 'summary.json'}: not a JSON object; remove it") from None


def _read_config(path: Path, text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise PhotonError(f"{path}{line}: not YAML; mend it or start the run again") from None
    if not isinstance(config, dict):
        raise PhotonError(f"{path}: not a mapping of settings; mend it or start the run again")
    return config


# --- the page on one run ---------------------------------------------------------------------------


def _run_page(run: _Run) -> _Page:
    status, kind = run.status
    started = run.started
    begun = datetime.datetime.fromtimestamp(run.history[0].time, datetime.UTC)
    facts = [
        f"strategy {started.strategy}",
        f"model {started.model}, {format_count(started.parameters)} parameters",
        f"{len(started.silos)} silos, {started.cohort} a round",
        f"{counted(started.local_steps, 'local step')} of {started.batch_size} × "
        f"{started.sequence_length} tokens",
        f"{started.engine} engine on {started.device}",
        f"started {begun:%Y-%m-%d %H:%M} UTC",
    ]
    sections: list[tuple[str, list[Callable[[_Run], _Figure | None]]]] = [
        ("Learning", [_perplexity_by_tokens, _perplexity_by_time, _train_loss, _gradient_norm]),
        ("Rounds", [_cohorts, _update_norms, _agreement, _learning_rate]),
        ("Cost", [_bytes, _phases, _throughput, _utilisation]),
        ("Diagnostics", [partial(_diagnostics, figure=figure) for figure in run.diagnosed]),
    ]
    return _Page(
        title=started.name,
        subtitle=facts,
        status=status,
        status_kind=kind,
        cards=_cards(run),
        tables=[("Validation perplexity by silo", _silo_table(run))],
        sections=[*_tree_section(run), *_draw_sections(run, sections)],
        log=_log(run),
        configs=[("config.yaml", run.config_text)],
        commands=_commands(run),
        facts=_identity(run),
    )


def _draw_sections(
    what: Any, sections: Sequence[tuple[str, Sequence[Callable[[Any], _Figure | None]]]]
) -> list[tuple[str, Sequence[_Panel]]]:
    drawn: list[tuple[str, Sequence[_Panel]]] = []
    for title, makers in sections:
        figures = [figure for figure in (maker(what) for maker in makers) if figure is not None]
        if figures:
            drawn.append((title, figures))
    return drawn


def _cards(run: _Run) -> list[tuple[str, str, str]]:
    summary = run.summary
    perplexity, sizes, seconds = summary["perplexity"], summary["bytes"], summary["seconds"]
    roofline = run.started.roofline_flops
    share = seconds["training"] / seconds["total"] if seconds["total"] else None
    before, after, unigram = (format_perplexity(perplexity[key]) for key in ("initial", "final", "unigram"))
    cards = [
        ("Validation perplexity, all silos", f"{before} → {after}", f"the corpus's unigram model: {unigram}"),
        (
            "Tokens trained",
            format_count(summary["tokens"]),
            f"in {counted(summary['rounds'], 'round')}, all silos",
        ),
        ("Time", format_seconds(seconds["total"]), f"{format_share(share)} of it training"),
        ("Sent up", format_bytes(sizes["up"]), f"{format_bytes(sizes['down'])} down"),
        ("Tokens per second", format_count(summary["tokens_per_second"]), "tokens by total time"),
    ]
    if summary["mfu"] is not None and roofline:
        peak = f"of {format_count(roofline)}FLOP/s"
        cards.append(("Model FLOPs utilisation", format_share(summary["mfu"]), peak))
    if summary["privacy"] is not None:
        cards.append(("Privacy of a silo", *privacy_figures(summary["privacy"])))
    failures = summary["failures"]
    cards.append(("Failures", str(failures), f"and {len(run.clients)} updates that counted"))
    return cards


def _silo_table(run: _Run) -> _Table:
    facts = run.started.silos
    whole = sum(silo["train_tokens"] for silo in facts)
    perplexity = run.summary["perplexity"]
    part = {name: sum(client.silo == name for client in run.clients) for name in run.silos}
    rows = []
    for silo in facts:
        found = perplexity["per_silo"][silo["name"]]
        rows.append(
            [
                silo["name"],
                *(format_perplexity(found[key]) for key in ("initial", "final", "unigram")),
                str(part[silo["name"]]),
                f"{silo['train_tokens']:,}",
                format_share(silo["train_tokens"] / whole if whole else None),
            ]
        )
    rows.append(
        [
            "overall",
            *(format_perplexity(perplexity[key]) for key in ("initial", "final", "unigram")),
            str(len(run.clients)),
            f"{whole:,}",
            format_share(1.0),
        ]
    )
    columns = ["silo", "before", "after", "unigram", "rounds", "train tokens", "share"]
    return _Table(columns, rows, [*run.silos.values(), INK], strong_last=True)


def _perplexity_by_tokens(run: _Run) -> _Figure | None:
    note = "How well the global model predicts each silo's held-out text; the lower the better."
    places = [float(event.tokens_trained) for event, _ in run.evaluations]
    return _perplexity_figure(run, "Perplexity against tokens", note, places, _TOKENS)


def _perplexity_by_time(run: _Run) -> _Figure | None:
    note = "The same against the time at work; pauses before a run is resumed are left out."
    places = [seconds for _, seconds in run.evaluations]
    return _perplexity_figure(run, "Perplexity against time", note, places, _TIME)


def _perplexity_figure(run: _Run, title: str, note: str, places: list[float], x: Axis) -> _Figure | None:
    evaluations = [event for event, _ in run.evaluations]
    series = [
        Series(name, places, [_perplexity_of(event, name) for event in evaluations], style)
        for name, style in run.silos.items()
    ]
    series.append(Series("overall", places, [event.perplexity for event in evaluations], INK))
    unigram = run.summary["perplexity"]["unigram"]
    reference = Series(f"unigram model {format_perplexity(unigram)}", [0.0], [unigram], REFERENCE)
    write = format_seconds if x.kind == "seconds" else format_count
    rows = [
        [str(event.round), write(place), *(format_perplexity(line.y[index]) for line in series)]
        for index, (event, place) in enumerate(zip(evaluations, places, strict=True))
    ]
    columns = ["round", x.label, *(line.label for line in series)]
    return _line_figure(title, note, series, x, _PERPLEXITY, columns, rows, references=[reference])


def _perplexity_of(event: Evaluated, silo: str) -> float | None:
    return event.per_silo[silo]["perplexity"] if silo in event.per_silo else None


def _train_loss(run: _Run) -> _Figure | None:
    note = "Mean loss of each client over its local steps, and of the cohort, in nats per token."
    overall = Series("cohort", [event.round for event in run.rounds], [e.train_loss for e in run.rounds], INK)
    series = [*_client_series(run, lambda client: client.loss), overall]
    return _by_round("Training loss", note, series, Axis("training loss"), "{:.4f}".format)


def _gradient_norm(run: _Run) -> _Figure | None:
    note = "Norm of the gradient before clipping, mean over a client's local steps."
    series = _client_series(run, lambda client: client.gradient_norm)
    return _by_round("Gradient norm", note, series, Axis("gradient norm"), "{:.4g}".format)


def _learning_rate(run: _Run) -> _Figure | None:
    note = "The local optimizer's learning rate at the end of each round."
    last = {client.round: client.learning_rate for client in run.clients}
    series = [Series("learning rate", sorted(last), [last[number] for number in sorted(last)], Style("c1"))]
    return _by_round("Learning rate", note, series, Axis("learning rate"), "{:.3g}".format)


def _cohorts(run: _Run) -> _Figure | None:
    begun = [event for event in run.history if isinstance(event, RoundStarted)]
    if not begun:
        return None
    sampled = {(event.round, name) for event in begun for name in event.cohort}
    done = {(event.round, event.silo) for event in run.clients}
    # A silo that could not validate the model failed as well, but not as a member of the cohort.
    failed = {(e.round, e.silo) for e in run.history if isinstance(e, ClientFailed)} & sampled - done
    styles = run.silos | run.participants
    if not run.silos.keys() & run.participants.keys():
        styles = run.participants
    rows = [
        [
            str(event.round),
            ", ".join(name for name in styles if (event.round, name) in done) or "–",
            ", ".join(name for name in styles if (event.round, name) in failed) or "–",
        ]
        for event in begun
    ]
    rounds = [event.round for event in begun]
    drawing = plots.cohort_grid(
        rounds,
        list(styles),
        list(styles.values()),
        [[(number, name) in done for number in rounds] for name in styles],
        [[(number, name) in failed for number in rounds] for name in styles],
    )
    note = "Full: the silo's update counted. Cross: it failed. Pale: not sampled."
    return _Figure("Cohort of each round", note, drawing, ["round", "took part", "failed"], _thinned(rows))


def _update_norms(run: _Run) -> _Figure | None:
    note = "L2 norm of the pseudo-gradient, and of each client's own update."
    norms = [event.pseudo_gradient_norm for event in run.rounds]
    whole = Series("pseudo-gradient", [event.round for event in run.rounds], norms, INK)
    series = [*_client_series(run, lambda client: client.update_norm), whole]
    return _by_round("Pseudo-gradient norm", note, series, Axis("L2 norm"), "{:.4g}".format)


def _agreement(run: _Run) -> _Figure | None:
    note = (
        "Cosine: mean over pairs of client updates, weighted by norm. Consensus: norm of the mean update by "
        "mean norm. Both are 1 where all clients pull the same way."
    )
    places = [event.round for event in run.rounds]
    series = [
        Series("client cosine", places, [event.client_cosine for event in run.rounds], Style.of(0)),
        Series("consensus", places, [event.consensus for event in run.rounds], Style.of(1)),
    ]
    return _by_round("Agreement of the clients", note, series, Axis("agreement"), "{:.3f}".format)


def _bytes(run: _Run) -> _Figure | None:
    if not run.rounds:
        return None
    places, ups, downs = _bytes_by_round(run)
    series = [
        Series("up, to the server", places, ups, Style.of(0)),
        Series("down, to the silos", places, downs, Style("c2", 1)),
    ]
    note = "Training and validation, all silos together, summed over the rounds, as measured on the link."
    return _by_round("Bytes on the link", note, series, Axis("bytes", "bytes"), format_bytes)


def _bytes_by_round(run: _Run) -> tuple[list[int], list[float], list[float]]:
    """Return rounds, and what had crossed the link up and down by the end of each."""
    up: dict[int, float] = {}
    down: dict[int, float] = {}
    moved: list[RoundFinished | Evaluated] = [*run.rounds, *(event for event, _ in run.evaluations)]
    for event in moved:
        up[event.round] = up.get(event.round, 0) + event.bytes_up
        down[event.round] = down.get(event.round, 0) + event.bytes_down
    rounds = sorted(up)
    return (
        rounds,
        list(itertools.accumulate(up[number] for number in rounds)),
        list(itertools.accumulate(down[number] for number in rounds)),
    )


def _phases(run: _Run) -> _Figure | None:
    if not run.rounds:
        return None
    split = [_phase_seconds(event) for event in run.rounds]
    layers = [(style, [seconds[phase] for seconds in split]) for phase, style in _PHASES]
    rows = [
        [str(event.round), *(f"{seconds[phase]:.3f}" for phase, _ in _PHASES)]
        for event, seconds in zip(run.rounds, split, strict=True)
    ]
    return _Figure(
        "Time of each round",
        "Training is the time in which clients trained, one after the other where they share a machine; "
        "other is what is left of the round.",
        plots.stacked_bars([event.round for event in run.rounds], layers, _ROUND, Axis("time", "seconds")),
        ["round", *(f"{phase} (s)" for phase, _ in _PHASES)],
        _thinned(rows),
        _phase_legend(split),
    )


def _phase_seconds(event: RoundFinished) -> dict[str, float]:
    known: dict[str, float] = {
        "training": event.seconds["training"],
        "fold": event.seconds["fold"],
        "outer": event.seconds["outer"],
        "evaluate": event.seconds["evaluate"],
        "checkpoint": event.seconds["checkpoint"],
    }
    known = {phase: seconds if math.isfinite(seconds) else 0.0 for phase, seconds in known.items()}
    # Folding overlaps with training where replies come one by one, so the parts may exceed the whole.
    return {**known, "other": max(0.0, event.seconds["round"] - math.fsum(known.values()))}


def _phase_legend(split: Sequence[dict[str, float]]) -> list[tuple[str, Style]]:
    return [(phase, style) for phase, style in _PHASES if any(seconds[phase] > 0 for seconds in split)]


def _throughput(run: _Run) -> _Figure | None:
    note = "Tokens each client trains per second of training, and the cohort per second of the round."
    sums: dict[int, int] = {}
    for client in run.clients:
        sums[client.round] = sums.get(client.round, 0) + client.tokens
    speeds = [sums.get(e.round, 0) / e.seconds["round"] if e.seconds["round"] else None for e in run.rounds]
    whole = Series("cohort", [event.round for event in run.rounds], speeds, INK)
    series = [*_client_series(run, lambda client: client.tokens_per_second), whole]
    return _by_round("Throughput", note, series, Axis("tokens per second", "count"), format_count)


def _utilisation(run: _Run) -> _Figure | None:
    series = _client_series(run, lambda client: client.mfu)
    roofline = run.started.roofline_flops
    if not roofline:
        return None
    note = f"Model FLOPs of a client's training by the device's roofline of {format_count(roofline)}FLOP/s."
    axis = Axis("utilisation", "share")
    return _by_round("Model FLOPs utilisation", note, series, axis, format_share)


def _diagnostics(run: _Run, figure: str) -> _Figure | None:
    events = [event for event in run.history if isinstance(event, Diagnostics)]
    names = dict.fromkeys(name for event in events for name in event.values)
    of_what = [name.partition("/")[2] for name in names if name.partition("/")[0] == figure]
    series = [
        Series(
            label,
            [event.round for event in events],
            [event.values.get(f"{figure}/{label}") for event in events],
            run.participants.get(label) or Style.of(number),
        )
        for number, label in enumerate(of_what)
    ]
    title = figure.replace("_", " ")
    note = _DIAGNOSTICS.get(figure, "")
    return _by_round(title[0].upper() + title[1:], note, series, Axis(title), "{:.4g}".format)


def _client_series(run: _Run, value: Callable[[ClientFinished], float | None]) -> list[Series]:
    series = []
    for name, style in run.participants.items():
        own = [client for client in run.clients if client.silo == name]
        series.append(Series(name, [c.round for c in own], [value(c) for c in own], style))
    return series


def _log(run: _Run) -> list[tuple[str, str, str, str]]:
    """Return kind, time, what and details of what a reader should know of."""
    lines = []
    for event, seconds in zip(run.history, run.elapsed, strict=True):
        at = format_seconds(seconds)
        if isinstance(event, ClientFailed):
            lines.append(
                ("bad", at, f"round {event.round}: {event.silo} failed ({event.kind})", event.reason)
            )
        elif isinstance(event, Notice):
            lines.append(("warn" if event.level == "warning" else "info", at, event.level, event.message))
        elif isinstance(event, RunInterrupted):
            lines.append(("warn", at, f"interrupted after round {event.round}", event.reason))
        elif isinstance(event, RunStarted) and event.resumed_from is not None:
            lines.append(("info", at, "resumed", f"from round {event.resumed_from}"))
    return lines


def _commands(run: _Run) -> list[str]:
    config = shlex.quote(str(run.folder / "config.yaml"))
    return [f"photon train --config {config} run_dir=NEW", _report_command([run])]


def _report_command(runs: Sequence[_Run]) -> str:
    return f"photon report {shlex.join(str(run.folder) for run in runs)} --output report.html"


def _identity(run: _Run) -> list[tuple[str, str]]:
    facts = [("run", run.started.run_id), ("parameters", f"{run.started.parameters:,}")]
    if run.summary["weights_sha256"]:
        facts.append(("SHA-256 of the weights", run.summary["weights_sha256"]))
    return facts


# --- a federation of federations -------------------------------------------------------------------


def _tree_section(run: _Run) -> list[tuple[str, Sequence[_Panel]]]:
    if run.started.tree is None:
        return []
    root = read_tree(run.started.tree)
    events = tree_figures.histories(run.folder, run.history, root)
    panels: list[_Panel | None] = [
        _tree(root, events),
        *_own_models_by_level(run, root),
        _attention(root, events),
        _routes(root, events),
    ]
    return [("Tree", [panel for panel in panels if panel is not None])]


_Histories = Mapping[str, Sequence[Event]]


def _tree(root: TreeNode, events: _Histories) -> _Figure:
    branches = tree_figures.branches(root, events)
    rows = [
        plots.TreeRow(
            name=branch.name,
            level=branch.level,
            is_silo=branch.is_silo,
            figure=f"{format_perplexity(branch.first)} → {format_perplexity(branch.last)}",
            edge=f"↑ {format_bytes(branch.up)}   ↓ {format_bytes(branch.down)}" if branch.level else "",
        )
        for branch in branches
    ]
    table = [
        [
            branch.name,
            str(branch.level),
            format_perplexity(branch.first),
            format_perplexity(branch.last),
            format_bytes(branch.up),
            format_bytes(branch.down),
        ]
        for branch in branches
    ]
    note = (
        "Rings are federations, dots silos. Beside each: perplexity of its own model on its own text before "
        "training and last, and bytes of training on the edge to the node above it."
    )
    if any(branch.level and branch.up is None for branch in branches):
        note += " Where bytes are missing, the run folder of the federation above is not at hand."
    columns = ["node", "level", "before", "after", "up", "down"]
    return _Figure("Perplexity and bytes of each node", note, plots.tree_plot(rows), columns, _thinned(table))


def _own_models_by_level(run: _Run, root: TreeNode) -> list[_Figure | None]:
    levels: dict[int, list[str]] = {}
    for level, node in root.levels():
        levels.setdefault(level, []).append(node.name)
    return [_own_models(run, level, names) for level, names in levels.items() if level]


def _own_models(run: _Run, level: int, names: Sequence[str]) -> _Figure | None:
    series = []
    for index, name in enumerate(names):
        curve = tree_figures.perplexities(run.history, name)
        series.append(
            Series(name, [number for number, _ in curve], [value for _, value in curve], Style.of(index))
        )
    note = f"What the own models of the nodes at level {level} give on their own validation text."
    title = f"Own models, level {level}"
    return _by_round(title, note, series, _PERPLEXITY, format_perplexity)


def _attention(root: TreeNode, events: _Histories) -> _Tables | None:
    """Return heat maps: for each federation key blocks by children, then all nodes by what they keep."""
    tables, kept = [], []
    for _, node in root.levels():
        weights = tree_figures.attention_to_children(events.get(node.name, ()))
        columns = ["self", *(child.name for level, child in node.levels() if level == 1)]
        cells = {
            f"{node.name}, block {block}": [found.get(who) for who in columns]
            for block, found in weights.items()
        }
        if cells:
            tables.append(_heat_map(["of its children", *columns], cells))
    for parent in root.walk():
        for child in (node for level, node in parent.levels() if level == 1):
            history, above = events.get(child.name, ()), events.get(parent.name, ())
            kept.append((child.name, tree_figures.attention_to_above(child, history, above)))
    known = {name: [own, 1 - own] for name, own in kept if own is not None}
    if known:
        tables.append(_heat_map(["of what comes down", "self", "others"], known))
    if not tables:
        return None
    note = (
        "How much of itself and of its children a federation takes into each key "
        "block, and how much of its own key layers a node keeps when those from above and residuals come "
        "down, averaged over key blocks."
    )
    return _Tables("Attention in the last round", note, tables)


def _heat_map(columns: list[str], cells: Mapping[str, Sequence[float | None]]) -> _Table:
    rows = [[name, *(_write("{:.2f}".format, value) for value in values)] for name, values in cells.items()]
    shades = [[value or 0.0 for value in values] for values in cells.values()]
    return _Table(columns, rows, [None] * len(rows), shades=shades)


def _routes(root: TreeNode, events: _Histories) -> _Tables | None:
    rows = [
        [
            route.block,
            route.origin,
            route.child,
            str(route.rounds),
            str(route.last_round),
            f"{route.similarity:.3f}",
        ]
        for _, node in root.levels()
        for route in tree_figures.routes(events.get(node.name, ()))
    ]
    if not rows:
        return None
    note = (
        "Key blocks that travelled to other nodes: whose, where to, in how many rounds, how much alike last. "
        "Each federation counts its own rounds."
    )
    columns = ["block", "from", "to", "rounds", "last round", "similarity"]
    return _Tables("Residual routes", note, [_Table(columns, _thinned(rows), [None] * len(rows))])


# --- the page on several runs ----------------------------------------------------------------------


def _comparison_page(runs: Sequence[_Run]) -> _Page:
    named = _named(runs)
    sections = [
        ("Learning", [_compare_by_tokens, _compare_by_time, _compare_by_bytes, _compare_train_loss]),
        ("Rounds", [_compare_norms, _compare_cosines]),
        ("Cost", [_compare_phases, _compare_bytes]),
    ]
    tables = [("Results", _result_table(named))]
    settings = _settings_table(named)
    if settings.columns[1:]:
        tables.append(("Settings that differ", settings))
    return _Page(
        title=f"{len(runs)} runs side by side",
        subtitle=list(named),
        status="",
        status_kind="",
        cards=[],
        tables=tables,
        sections=_draw_sections(named, sections),
        log=[],
        configs=[(f"{name}: config.yaml", run.config_text) for name, run in named.items()],
        commands=[_report_command(runs)],
        facts=[],
    )


_Named = dict[str, _Run]


def _named(runs: Sequence[_Run]) -> _Named:
    """Name runs by their folder, with as much of the path before it as tells them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    if len(set(paths)) < len(paths):
        raise PhotonError("report: a run is named twice; name each run once")
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return {"/".join(path[-depth:]): run for path, run in zip(paths, runs, strict=True)}


def _styles(runs: _Named) -> list[Style]:
    return [Style.of(index) for index in range(len(runs))]


def _result_table(runs: _Named) -> _Table:
    rows = []
    for name, run in runs.items():
        summary = run.summary
        perplexity, sizes, seconds = summary["perplexity"], summary["bytes"], summary["seconds"]
        rows.append(
            [
                name,
                f"{summary['rounds']} of {run.started.rounds}",
                format_perplexity(perplexity["final"]),
                format_perplexity(perplexity["initial"]),
                format_perplexity(perplexity["unigram"]),
                format_count(summary["tokens"]),
                format_seconds(seconds["total"]),
                format_seconds(seconds["overhead"]),
                format_bytes(sizes["up"]),
                format_bytes(sizes["down"]),
                format_count(summary["tokens_per_second"]),
                format_share(summary["mfu"]),
                str(summary["failures"]),
            ]
        )
    columns = [
        "run",
        "rounds",
        "perplexity",
        "before",
        "unigram",
        "tokens",
        "time",
        "not training",
        "up",
        "down",
        "tokens/s",
        "MFU",
        "failed",
    ]
    return _Table(columns, rows, list(_styles(runs)))


def _settings_table(runs: _Named) -> _Table:
    flat = {name: _flatten(run.config) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    # Each run has its own folder; that is no setting anyone compares.
    differing = [
        key for key in keys if key != "run_dir" and len({s.get(key, "–") for s in flat.values()}) > 1
    ]
    rows = [[name, *(settings.get(key, "–") for key in differing)] for name, settings in flat.items()]
    return _Table(["run", *differing], rows, list(_styles(runs)))


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value, default=str, ensure_ascii=False).strip('"')}


def _compare_evaluations(
    runs: _Named, title: str, note: str, place: Callable[[_Run, Evaluated, float], float], x: Axis
) -> _Figure | None:
    series, rows = [], []
    write = {"seconds": format_seconds, "bytes": format_bytes}.get(x.kind, format_count)
    for (name, run), style in zip(runs.items(), _styles(runs), strict=True):
        places = [place(run, event, seconds) for event, seconds in run.evaluations]
        values = [event.perplexity for event, _ in run.evaluations]
        series.append(Series(name, places, values, style))
        rows += [[name, write(a), format_perplexity(b)] for a, b in zip(places, values, strict=True)]
    found = {run.summary["perplexity"]["unigram"] for run in runs.values()}
    unigram = found.pop() if len(found) == 1 else None
    reference = Series(f"unigram model {format_perplexity(unigram)}", [0.0], [unigram], REFERENCE)
    columns = ["run", x.label, "perplexity"]
    return _line_figure(title, note, series, x, _PERPLEXITY, columns, rows, references=[reference])


def _compare_by_tokens(runs: _Named) -> _Figure | None:
    note = "Overall validation perplexity of each run's global model; the lower the better."
    return _compare_evaluations(
        runs,
        "Perplexity against tokens",
        note,
        lambda run, event, seconds: float(event.tokens_trained),
        _TOKENS,
    )


def _compare_by_time(runs: _Named) -> _Figure | None:
    note = "The same against the time at work; pauses before a run is resumed are left out."
    return _compare_evaluations(
        runs, "Perplexity against time", note, lambda run, event, seconds: seconds, _TIME
    )


def _compare_by_bytes(runs: _Named) -> _Figure | None:
    def sent(run: _Run, event: Evaluated, seconds: float) -> float:
        rounds, ups, downs = _bytes_by_round(run)
        place = rounds.index(event.round)
        return ups[place] + downs[place]

    note = "The same against what crossed the link by then, both ways, all clients."
    return _compare_evaluations(
        runs, "Perplexity against bytes", note, sent, Axis("bytes up and down", "bytes")
    )


def _compare_rounds(
    runs: _Named,
    title: str,
    note: str,
    value: Callable[[RoundFinished], float | None],
    y: Axis,
    write: Callable[[float], str],
) -> _Figure | None:
    series = [
        Series(name, [event.round for event in run.rounds], [value(event) for event in run.rounds], style)
        for (name, run), style in zip(runs.items(), _styles(runs), strict=True)
    ]
    return _by_round(title, note, series, y, write)


def _compare_train_loss(runs: _Named) -> _Figure | None:
    note = "Mean over the cohort's local steps, in nats per token."
    y = Axis("training loss")
    return _compare_rounds(runs, "Training loss", note, lambda e: e.train_loss, y, "{:.4f}".format)


def _compare_norms(runs: _Named) -> _Figure | None:
    y = Axis("L2 norm")
    note = "L2 norm of the pseudo-gradient of each round."
    return _compare_rounds(
        runs, "Pseudo-gradient norm", note, lambda e: e.pseudo_gradient_norm, y, "{:.4g}".format
    )


def _compare_cosines(runs: _Named) -> _Figure | None:
    y = Axis("cosine")
    note = "Mean cosine between pairs of client updates, weighted by norm."
    return _compare_rounds(
        runs, "Agreement of the clients", note, lambda e: e.client_cosine, y, "{:.3f}".format
    )


def _compare_bytes(runs: _Named) -> _Figure | None:
    y = Axis("bytes", "bytes")
    note = "What training moved over the link in each round, both ways, all clients."
    return _compare_rounds(
        runs, "Bytes of each round", note, lambda e: e.bytes_up + e.bytes_down, y, format_bytes
    )


def _compare_phases(runs: _Named) -> _Figure | None:
    split = []
    for run in runs.values():
        parts = [_phase_seconds(event) for event in run.rounds]
        split.append({phase: math.fsum(part[phase] for part in parts) for phase, _ in _PHASES})
    if not any(any(parts.values()) for parts in split):
        return None
    layers = [(style, [parts[phase] for parts in split]) for phase, style in _PHASES]
    rows = [
        [name, *(f"{parts[phase]:.2f}" for phase, _ in _PHASES)]
        for name, parts in zip(runs, split, strict=True)
    ]
    return _Figure(
        "Where the time went",
        "Summed over the rounds; training is the time in which clients trained.",
        plots.lying_bars(list(runs), layers, _TIME),
        ["run", *(f"{phase} (s)" for phase, _ in _PHASES)],
        rows,
        _phase_legend(split),
    )


# --- figures ---------------------------------------------------------------------------------------


def _by_round(
    title: str, note: str, series: Sequence[Series], y: Axis, write: Callable[[float], str]
) -> _Figure | None:
    values = [dict(zip(one.x, one.y, strict=True)) for one in series]
    rounds = sorted({int(number) for one in series for number in one.x})
    rows = [[str(number), *(_write(write, found.get(number)) for found in values)] for number in rounds]
    columns = ["round", *(one.label for one in series)]
    return _line_figure(title, note, series, _ROUND, y, columns, rows)


def _line_figure(
    title: str,
    note: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    columns: list[str],
    rows: list[list[str]],
    references: Sequence[Series] = (),
) -> _Figure | None:
    if not any(_is_number(value) for one in series for value in one.y):
        return None
    legend = [(one.label, one.style) for one in series] if len(series) > 1 else []
    drawing = plots.line_plot(series, x, y, references=references)
    return _Figure(title, note, drawing, columns, _thinned(rows), legend)


def _write(write: Callable[[float], str], value: float | None) -> str:
    return write(value) if value is not None and math.isfinite(value) else "–"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thinned(rows: list[list[str]]) -> list[list[str]]:
    """Return at most `_MOST_ROWS` rows, evenly spread, with the first and the last."""
    if len(rows) <= _MOST_ROWS:
        return rows
    last = len(rows) - 1
    return [rows[round(index * last / (_MOST_ROWS - 1))] for index in range(_MOST_ROWS)]
