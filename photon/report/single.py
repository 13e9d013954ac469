"""The page on one run."""

import datetime
import shlex
from collections.abc import Callable
from functools import partial

from photon.report import figures
from photon.report.charts import INK
from photon.report.label_section import label_section
from photon.report.own_section import own_section
from photon.report.page import Figure, Page, Table, draw_sections
from photon.report.run import Run, report_command
from photon.report.sample_section import sample_section
from photon.report.task_section import task_section
from photon.report.tree_section import tree_section
from photon.report.unlearned_section import unlearned_section
from photon.telemetry.events import Event, Notice, RunInterrupted, RunStarted, SiloFailed, TasksEvaluated
from photon.telemetry.summary import (
    counted,
    format_bytes,
    format_count,
    format_seconds,
    format_share,
    perplexity_in,
    privacy_figures,
)


def run_page(run: Run) -> Page:
    """Return the page on ``run``."""
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
    sections: list[tuple[str, list[Callable[[Run], Figure | None]]]] = [
        (
            "Learning",
            [
                figures.perplexity_by_tokens,
                figures.perplexity_by_time,
                figures.train_loss,
                figures.gradient_norm,
            ],
        ),
        ("Rounds", [figures.cohorts, figures.update_norms, figures.agreement, figures.learning_rate]),
        ("Cost", [figures.link_bytes, figures.phases, figures.throughput, figures.utilisation]),
        ("Diagnostics", [partial(figures.diagnostics, figure=figure) for figure in run.diagnosed]),
    ]
    return Page(
        title=started.name,
        subtitle=facts,
        status=status,
        status_kind=kind,
        cards=_cards(run),
        tables=[("Validation perplexity by silo", _silo_table(run))],
        sections=[
            *label_section(run),
            *tree_section(run),
            *own_section(run),
            *task_section(run),
            *unlearned_section(run),
            *sample_section(run),
            *draw_sections(run, sections),
        ],
        log=[
            line for line in map(log_line, run.history, map(format_seconds, run.elapsed)) if line is not None
        ],
        configs=[("config.yaml", run.config_text)],
        commands=_commands(run),
        facts=_identity(run),
    )


def _cards(run: Run) -> list[tuple[str, str, str]]:
    summary = run.summary
    perplexity, sizes, seconds = summary["perplexity"], summary["bytes"], summary["seconds"]
    roofline = run.started.roofline_flops
    share = seconds["training"] / seconds["total"] if seconds["total"] else None
    before, after, unigram = (perplexity_in(perplexity, key) for key in ("initial", "final", "unigram"))
    cards = [
        ("Validation perplexity, all silos", f"{before} → {after}", f"the corpus's unigram model: {unigram}"),
        (
            "Tokens trained" if run.started.local_steps else "Tokens read",
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
    cards.append(("Failures", str(failures), f"and {run.updates.total()} updates that counted"))
    return cards


def _silo_table(run: Run) -> Table:
    facts = run.started.silos
    whole = sum(silo["train_tokens"] for silo in facts)
    perplexity = run.summary["perplexity"]
    rows = []
    for silo in facts:
        found = perplexity["per_silo"][silo["name"]]
        rows.append(
            [
                silo["name"],
                *(perplexity_in(found, key) for key in ("initial", "final", "unigram")),
                str(run.updates[silo["name"]]),
                f"{silo['train_tokens']:,}",
                format_share(silo["train_tokens"] / whole if whole else None),
            ]
        )
    rows.append(
        [
            "overall",
            *(perplexity_in(perplexity, key) for key in ("initial", "final", "unigram")),
            str(run.updates.total()),
            f"{whole:,}",
            format_share(1.0),
        ]
    )
    columns = ["silo", "before", "after", "unigram", "rounds", "train tokens", "share"]
    return Table(columns, rows, [*run.silos.values(), INK], strong_last=True)


def log_line(event: Event, at: str) -> tuple[str, str, str, str] | None:
    """Return kind, time, what and details of an event that a reader should know of; None: it is none."""
    match event:
        case SiloFailed():
            return "bad", at, f"round {event.round}: {event.silo} failed ({event.kind})", event.reason
        case TasksEvaluated() if event.failure is not None:
            return "warn", at, f"round {event.round}: no figures of tasks", event.failure
        case Notice():
            return "warn" if event.level == "warning" else "info", at, event.level, event.message
        case RunInterrupted():
            return "warn", at, f"interrupted after round {event.round}", event.reason
        case RunStarted() if event.resumed_from is not None:
            return "info", at, "resumed", f"from round {event.resumed_from}"
        case _:
            return None


def _commands(run: Run) -> list[str]:
    config = shlex.quote(str(run.folder / "config.yaml"))
    return [f"photon train --config {config} run_dir=NEW", report_command([run])]


def _identity(run: Run) -> list[tuple[str, str]]:
    facts = [("run", run.started.run_id), ("parameters", f"{run.started.parameters:,}")]
    if run.summary["weights_sha256"]:
        facts.append(("SHA-256 of the weights", run.summary["weights_sha256"]))
    return facts
