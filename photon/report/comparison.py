"""The page on several runs, laid side by side."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from photon.errors import PhotonError
from photon.report import charts
from photon.report.charts import REFERENCE, Axis, Series, Style
from photon.report.figures import PHASES, phase_seconds, phases_of
from photon.report.page import (
    PERPLEXITY,
    TIME,
    TOKENS,
    Figure,
    Page,
    Table,
    by_round,
    draw_sections,
    line_figure,
)
from photon.report.run import Run, bytes_by_round, report_command
from photon.telemetry.events import Evaluated, RoundFinished
from photon.telemetry.summary import (
    format_bytes,
    format_count,
    format_perplexity,
    format_seconds,
    format_share,
    perplexity_in,
)

_Named = dict[str, Run]


def comparison_page(runs: Sequence[Run]) -> Page:
    """Return the page on ``runs``.

    Raises
    ------
    PhotonError
        A run is named twice.
    """
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
    return Page(
        title=f"{len(runs)} runs side by side",
        subtitle=list(named),
        status="",
        status_kind="",
        cards=[],
        tables=tables,
        sections=draw_sections(named, sections),
        log=[],
        configs=[(f"{name}: config.yaml", run.config_text) for name, run in named.items()],
        commands=[report_command(runs)],
        facts=[],
    )


def _named(runs: Sequence[Run]) -> _Named:
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


def _result_table(runs: _Named) -> Table:
    rows = []
    for name, run in runs.items():
        summary = run.summary
        perplexity, sizes, seconds = summary["perplexity"], summary["bytes"], summary["seconds"]
        rows.append(
            [
                name,
                f"{summary['rounds']} of {run.started.rounds}",
                perplexity_in(perplexity, "final"),
                perplexity_in(perplexity, "initial"),
                perplexity_in(perplexity, "unigram"),
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
    return Table(columns, rows, list(_styles(runs)))


def _settings_table(runs: _Named) -> Table:
    flat = {name: _flatten(run.config) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
    # Each run has its own folder; that is no setting anyone compares.
    differing = [
        key for key in keys if key != "run_dir" and len({s.get(key, "–") for s in flat.values()}) > 1
    ]
    rows = [[name, *(settings.get(key, "–") for key in differing)] for name, settings in flat.items()]
    return Table(["run", *differing], rows, list(_styles(runs)))


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: json.dumps(value, default=str, ensure_ascii=False).strip('"')}


def _compare_evaluations(
    runs: _Named, title: str, note: str, place: Callable[[Run, Evaluated, float], float], x: Axis
) -> Figure | None:
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
    return line_figure(title, note, series, x, PERPLEXITY, columns, rows, references=[reference])


def _compare_by_tokens(runs: _Named) -> Figure | None:
    note = "Overall validation perplexity of each run's global model; the lower the better."
    return _compare_evaluations(
        runs,
        "Perplexity against tokens",
        note,
        lambda run, event, seconds: float(event.tokens_trained),
        TOKENS,
    )


def _compare_by_time(runs: _Named) -> Figure | None:
    note = "The same against the time at work; pauses before a run is resumed are left out."
    return _compare_evaluations(
        runs, "Perplexity against time", note, lambda run, event, seconds: seconds, TIME
    )


def _compare_by_bytes(runs: _Named) -> Figure | None:
    def sent(run: Run, event: Evaluated, seconds: float) -> float:
        rounds, ups, downs = bytes_by_round(run)
        place = rounds.index(event.round)
        return ups[place] + downs[place]

    note = "The same against what crossed the link by then, both ways, all silos."
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
) -> Figure | None:
    series = [
        Series(name, [event.round for event in run.rounds], [value(event) for event in run.rounds], style)
        for (name, run), style in zip(runs.items(), _styles(runs), strict=True)
    ]
    return by_round(title, note, series, y, write)


def _compare_train_loss(runs: _Named) -> Figure | None:
    note = "Mean over the cohort's local steps, in nats per token."
    y = Axis("training loss")
    return _compare_rounds(runs, "Training loss", note, lambda e: e.train_loss, y, "{:.4f}".format)


def _compare_norms(runs: _Named) -> Figure | None:
    y = Axis("L2 norm")
    note = "L2 norm of the pseudo-gradient of each round."
    return _compare_rounds(
        runs, "Pseudo-gradient norm", note, lambda e: e.pseudo_gradient_norm, y, "{:.4g}".format
    )


def _compare_cosines(runs: _Named) -> Figure | None:
    y = Axis("cosine")
    note = "Mean cosine between pairs of silo updates, weighted by norm."
    return _compare_rounds(runs, "Agreement of the silos", note, lambda e: e.silo_cosine, y, "{:.3f}".format)


def _compare_bytes(runs: _Named) -> Figure | None:
    y = Axis("bytes", "bytes")
    note = "What training moved over the link in each round, both ways, all silos."
    return _compare_rounds(
        runs, "Bytes of each round", note, lambda e: e.bytes_up + e.bytes_down, y, format_bytes
    )


def _compare_phases(runs: _Named) -> Figure | None:
    split = []
    for run in runs.values():
        parts = [phase_seconds(event) for event in run.rounds]
        split.append({phase: math.fsum(part[phase] for part in parts) for phase, _ in PHASES})
    if not any(any(parts.values()) for parts in split):
        return None
    layers = [
        charts.row_series(phase, [parts[phase] for parts in split], style)
        for phase, style in phases_of(split)
    ]
    rows = [
        [name, *(f"{parts[phase]:.2f}" for phase, _ in PHASES)]
        for name, parts in zip(runs, split, strict=True)
    ]
    return Figure(
        "Where the time went",
        "Summed over the rounds; training is the time in which silos trained.",
        charts.rows("lying", list(runs), layers, TIME),
        ["run", *(f"{phase} (s)" for phase, _ in PHASES)],
        rows,
    )
