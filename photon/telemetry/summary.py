"""``summary.json`` from the events, and the table a run ends with.

The figures are computed here and nowhere else; the display, the report and the command line show them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from photon.config.tree import read_tree
from photon.errors import PhotonError
from photon.privacy.accountant import epsilon
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    Event,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    SiloFacts,
    SiloFailed,
    SiloFinished,
    TaskFigures,
    TasksEvaluated,
    Unlearned,
    perplexity_of,
    perplexity_text,
    plain_json,
)
from photon.telemetry.labels import label_rounds
from photon.telemetry.log import current_history, elapsed_seconds

#: Silos up to which the tables at the end of a run list each.
_MOST_LISTED = 64
#: The first of these that a task has says how well it was done.
_MAIN = ("acc", "exact_match", "bits_per_byte", "perplexity")


def build_summary(events: Iterable[Event], *, weights_sha256: str | None) -> dict[str, Any]:
    """Compute the content of ``summary.json`` from a run's events.

    Seconds count the time at work on what stands: pauses and work lost with an interruption are left out.
    ``training`` sums the time in which silos trained, ``overhead`` is everything else.
    ``bytes`` are those of training and validation; ``per_silo`` has training's, ``evaluation`` the others;
    ``per_group`` has those of each state group's tensors in training.
    ``perplexity.per_node`` has what the own model of every silo and federation below gives on its own text;
    ``perplexity.mean_of_silos`` is the mean over the silos alone, each counting the same.
    ``perplexity.final`` is that of the model after round ``final_round``; it rests on ``final_silos`` silos,
    with the standard error ``final_error`` as an estimate of all (0: all have measured it; None: unknown).
    ``tree`` is that of a federation of federations.
    ``density`` is the share of the prunable weights that are not zero; None where nothing is pruned.
    ``privacy`` has δ and the ε of each silo (None: unbounded) for all that it may have sent; None where no
    update is clipped.
    ``tasks`` has what the last evaluation on tasks found, and after which round; None: there was none.
    ``unlearned`` has the requests that the run has fulfilled; ``recall_of_forgotten`` is the last model's
    mean ROUGE-1 recall of answers that were to be forgotten, None where nobody asks.
    ``labels`` has the last accuracy of a classifier, and what each round told; None: no labels are learnt.
    ``tokens_per_second`` is tokens by total seconds; ``mfu`` averages the silos by training seconds.

    Parameters
    ----------
    events
        All events of the run, also those of interrupted attempts.
    weights_sha256
        Over the global parameters in name order; ``None`` while the run is not finished.

    Raises
    ------
    PhotonError
        There is no ``run_started`` among the events.
    """
    all_events = [event for event in events if not isinstance(event, RunFinished)]
    history = current_history(all_events)
    started = last_start(history)
    rounds = [event for event in history if isinstance(event, RoundFinished)]
    replies = [event for event in history if isinstance(event, SiloFinished)]
    evaluations = [event for event in history if isinstance(event, Evaluated)]
    total = elapsed_seconds(history)[-1]
    training = math.fsum(event.seconds["training"] for event in rounds)
    tokens = rounds[-1].tokens if rounds else 0
    done = rounds[-1].round if rounds else 0
    summary = {
        "run_id": started.run_id,
        "status": "finished" if done >= started.rounds else "interrupted",
        "strategy": started.strategy,
        "model": started.model,
        "engine": started.engine,
        "parameters": started.parameters,
        "rounds": len(rounds),
        "tokens": tokens,
        "tree": started.tree,
        "perplexity": _perplexities(started, history),
        "bytes": {
            **_bytes([*rounds, *evaluations]),
            "evaluation": _bytes(evaluations),
            "per_silo": _bytes_per_silo(replies),
            "per_group": _bytes_per_group(rounds),
        },
        "seconds": {"total": total, "training": training, "overhead": total - training},
        "tokens_per_second": tokens / total if total > 0 else None,
        "mfu": _mean_mfu(replies),
        "density": _last_density(history),
        "privacy": _privacy(started, all_events),
        "tasks": _last_tasks(history),
        "unlearned": [event.request for event in history if isinstance(event, Unlearned)],
        "recall_of_forgotten": evaluations[-1].recall if evaluations else None,
        "labels": _labels(history),
        "failures": sum(isinstance(event, SiloFailed) for event in history),
        "weights_sha256": weights_sha256,
    }
    return plain_json(summary)


def last_start(history: Iterable[Event]) -> RunStarted:
    """Return the latest ``run_started``, which describes the run as it is now.

    Raises
    ------
    PhotonError
        There is none.
    """
    starts = [event for event in history if isinstance(event, RunStarted)]
    if not starts:
        raise PhotonError(
            "the events hold no run_started: the run is only starting, or it ended before it began"
        )
    return starts[-1]


def unigram_perplexity(started: RunStarted, evaluation: Evaluated | None) -> float | None:
    """Return the perplexity of the unigram model over all silos, to stand beside that of ``evaluation``.

    It has one base wherever it is shown: of each silo all validation text, and the silos weighted by the
    tokens that ``evaluation`` predicted, so that both figures mean the same mixture of text. Without an
    evaluation there is none. Silos that keep their figures are left out.
    """
    if evaluation is None:
        return None
    losses = {silo["name"]: silo["unigram_loss"] for silo in started.silos}
    tokens = {name: silo["tokens"] for name, silo in evaluation.per_silo.items()}
    return mixed_perplexity(losses, tokens)


def mixed_perplexity(losses: Mapping[str, float | None], tokens: Mapping[str, int]) -> float | None:
    """Return the perplexity of losses in nats per token, weighted by tokens, of those that have both."""
    both = [(loss, tokens[name]) for name, loss in losses.items() if loss is not None and name in tokens]
    whole = sum(weight for _, weight in both)
    return perplexity_of(math.fsum(loss * weight for loss, weight in both) / whole) if whole else None


def has_own_models(started: RunStarted, evaluation: Evaluated) -> bool:
    """Return whether own models of nodes were evaluated, and not the global one on each silo alone."""
    nodes = evaluation.per_node
    return bool(nodes) and (started.tree is not None or nodes != evaluation.per_silo)


def mean_over_silos(started: RunStarted, evaluation: Evaluated) -> float | None:
    """Return the mean perplexity of the own models of all silos below, each counting the same.

    ``None`` where nothing is known of them, or not which nodes are silos: without a tree only if no node
    but the run's own participants answered.
    """
    nodes = evaluation.per_node
    if started.tree is not None:
        silos = [name for name in read_tree(started.tree).silos() if name in nodes]
    else:
        silos = list(nodes) if nodes.keys() <= evaluation.per_silo.keys() else []
    return math.fsum(nodes[name]["perplexity"] for name in silos) / len(silos) if silos else None


def silo_unigram_perplexity(silo: SiloFacts) -> float | None:
    """Return the perplexity of the unigram model on a silo, ``None`` where the silo keeps it."""
    return None if silo["unigram_loss"] is None else perplexity_of(silo["unigram_loss"])


def print_summary(
    console: Console,
    summary: dict[str, Any],
    report_path: Path | None,
    export_path: Path | None,
    sample: str | None,
) -> None:
    """Print what a run came to: perplexities, tokens, bytes, seconds, paths and a sample of text.

    Parameters
    ----------
    console
        Where to print; it may be a terminal or a file.
    summary
        The content of ``summary.json``, see `build_summary`.
    report_path, export_path
        Where the report and the exported model lie; ``None`` leaves the line out.
    sample
        Text the trained model wrote; ``None`` leaves it out.
    """
    console.print()
    console.print(_perplexity_table(summary["perplexity"]))
    own = _own_models_table(summary["perplexity"], summary["tree"])
    if own is not None:
        console.print(own)
    console.print(_bytes_table(summary["bytes"]))
    # Not a table, because a path must stay in one piece.
    facts = _facts(summary, report_path, export_path)
    width = max(len(label) for label, _ in facts)
    for label, text in facts:
        console.print(Text.assemble((f"{label:{width}}", "dim"), f"  {text}"), soft_wrap=True)
    if sample is not None:
        console.print(Text("\nThe model writes:", style="bold"))
        console.print(Text(sample.strip(), style="italic"))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 round``, ``1,200 rounds``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_count(value: float | None) -> str:
    """Return a count in at most four digits: ``987``, ``12.3 k``, ``4.56 M``; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would be written as 1000 of the smaller unit is one of this.
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f}"


def format_bytes(value: float | None) -> str:
    """Return a size in decimal units: ``12.6 MB``."""
    if value is None:
        return "–"
    text = format_count(value)
    return f"{text}B" if " " in text else f"{text} B"


def format_seconds(value: float | None) -> str:
    """Return a duration: ``8.3 s``, ``2:05`` (minutes) or ``1:02:05`` (hours)."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_perplexity(value: float | None, loss: float | None = None) -> str:
    """Return a perplexity as text; see `photon.telemetry.events.perplexity_text`."""
    return perplexity_text(value, loss=loss)


def perplexity_in(row: Mapping[str, Any], key: str) -> str:
    """Return as text what a summary says of a perplexity: ``initial``, ``final`` or ``unigram``."""
    return perplexity_text(row[key], loss=row.get(f"{key}_loss"))


def privacy_figures(privacy: dict[str, Any]) -> tuple[str, str]:
    """Return the largest ε of a silo as text, and what to say beside it."""
    # None stands for no bound.
    worst = {name: math.inf if value is None else value for name, value in privacy["epsilon"].items()}
    name = max(worst, key=lambda silo: worst[silo])
    if math.isinf(worst[name]):
        return "no ε", f"updates of {name} left without noise"
    return f"ε ≤ {worst[name]:.3g}", f"at δ = {privacy['delta']:g}; {name} has the largest"


def estimate_text(evaluation: Evaluated) -> str:
    """Say on how many silos a perplexity rests, with its standard error, where not all have measured it."""
    if not evaluation.is_estimate:
        return ""
    error = perplexity_error(evaluation)
    bar = "" if error is None else f" ± {format_perplexity(error)}"
    return f"{bar} by {len(evaluation.per_silo):,} of {evaluation.of_silos:,} silos"


def perplexity_error(evaluation: Evaluated) -> float | None:
    """Return the standard error of a perplexity, e^L times that of the loss L; None: it is not known."""
    return None if evaluation.error is None else evaluation.perplexity * evaluation.error


def format_share(value: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _perplexities(started: RunStarted, history: list[Event]) -> dict[str, Any]:
    evaluations = [event for event in history if isinstance(event, Evaluated)]
    initial = next((event for event in evaluations if event.round == 0), None)
    final = evaluations[-1] if evaluations else None

    def of_silo(name: str) -> dict[str, float | None]:
        found = {key: one.per_silo.get(name) if one else None for key, one in both.items()}
        return {
            **{key: silo["perplexity"] if silo else None for key, silo in found.items()},
            **{f"{key}_loss": silo["loss"] if silo else None for key, silo in found.items()},
        }

    both = {"initial": initial, "final": final}
    return {
        **{key: one.perplexity if one else None for key, one in both.items()},
        **{f"{key}_loss": one.loss if one else None for key, one in both.items()},
        "unigram": unigram_perplexity(started, final),
        "per_silo": {
            silo["name"]: {
                **of_silo(silo["name"]),
                "unigram": silo_unigram_perplexity(silo),
            }
            for silo in started.silos
        },
        "final_round": final.round if final else None,
        "final_silos": len(final.per_silo) if final else None,
        "final_error": perplexity_error(final) if final else None,
        "per_node": {name: node["perplexity"] for name, node in (final.per_node if final else {}).items()},
        "mean_of_silos": mean_over_silos(started, final) if final else None,
    }


def bytes_of(history: Iterable[Event]) -> dict[str, int]:
    """Return the bytes ``up`` and ``down`` of a run's rounds and evaluations."""
    return _bytes(event for event in history if isinstance(event, RoundFinished | Evaluated))


def _bytes(events: Iterable[RoundFinished | Evaluated | SiloFinished]) -> dict[str, int]:
    sums = {"up": 0, "down": 0}
    for event in events:
        sums["up"] += event.bytes_up
        sums["down"] += event.bytes_down
    return sums


def _bytes_per_silo(replies: list[SiloFinished]) -> dict[str, dict[str, int]]:
    by_silo: dict[str, list[SiloFinished]] = {}
    for event in replies:
        by_silo.setdefault(event.silo, []).append(event)
    return {name: _bytes(by_silo[name]) for name in sorted(by_silo)}


def _bytes_per_group(rounds: list[RoundFinished]) -> dict[str, dict[str, int]]:
    names = sorted({name for event in rounds for name in (*event.group_bytes_up, *event.group_bytes_down)})
    return {
        name: {
            "up": sum(event.group_bytes_up.get(name, 0) for event in rounds),
            "down": sum(event.group_bytes_down.get(name, 0) for event in rounds),
        }
        for name in names
    }


def _last_density(history: list[Event]) -> float | None:
    known = [event.values for event in history if isinstance(event, Diagnostics)]
    return next((values["density/all"] for values in reversed(known) if "density/all" in values), None)


def _labels(history: list[Event]) -> dict[str, Any] | None:
    rounds = label_rounds(history)
    if not rounds:
        return None
    known = [one["accuracy"] for one in rounds if one["accuracy"] is not None]
    return {"accuracy": known[-1] if known else None, "rounds": rounds}


def main_figure(task: TaskFigures) -> tuple[str, float] | None:
    """Return the figure by which a task's models are compared, with its name; None: it has none."""
    metrics = task["metrics"]
    known = [name for name in _MAIN if name in metrics] or [name for name in metrics if "_stderr" not in name]
    return (known[0], metrics[known[0]]) if known else None


def _last_tasks(history: list[Event]) -> dict[str, Any] | None:
    known = [event for event in history if isinstance(event, TasksEvaluated) and event.failure is None]
    if not known:
        return None
    last = known[-1]
    tasks = {name: dict(task) for name, task in last.tasks.items()}
    return {
        "round": last.round,
        "tasks": tasks,
        "suites": {name: dict(suite) for name, suite in last.suites.items()},
        "missing": last.missing,
    }


def _privacy(started: RunStarted, events: Iterable[Event]) -> dict[str, Any] | None:
    """Compute ε from what each silo said last; every request sent since then counts as a release."""
    last: dict[str, tuple[float, int]] = {}
    since: Counter[str] = Counter()
    for event in events:
        if isinstance(event, RoundStarted):
            since.update(event.cohort)
        elif isinstance(event, SiloFailed) and event.kind == "refused":
            since[event.silo] -= 1
        elif isinstance(event, SiloFinished) and event.privacy is not None:
            last[event.silo] = event.privacy["noise_multiplier"], event.privacy["releases"]
            since[event.silo] = 0
    asked = started.privacy
    if asked is None:
        return None
    if asked["noise_multiplier"] > 0:
        last = dict.fromkeys(since, (asked["noise_multiplier"], 0)) | last
    epsilons = {
        silo: epsilon(noise, releases + since[silo], asked["delta"])
        for silo, (noise, releases) in sorted(last.items())
    }
    return {"delta": asked["delta"], "epsilon": epsilons} if epsilons else None


def _mean_mfu(replies: list[SiloFinished]) -> float | None:
    known = [(event.mfu, event.seconds["training"]) for event in replies if event.mfu is not None]
    seconds = math.fsum(weight for _, weight in known)
    return math.fsum(mfu * weight for mfu, weight in known) / seconds if seconds > 0 else None


def _perplexity_table(perplexity: dict[str, Any]) -> Table:
    table = Table(
        title="Validation perplexity", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("silo")
    for heading in ("before", "after", "unigram"):
        table.add_column(heading, justify="right")
    for name, row in _listed(table, perplexity["per_silo"]):
        table.add_row(Text(name), *(perplexity_in(row, key) for key in ("initial", "final", "unigram")))
    table.add_section()
    overall = (perplexity_in(perplexity, key) for key in ("initial", "final", "unigram"))
    table.add_row("overall", *overall, style="bold")
    return table


def _listed(table: Table, per_silo: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the silos that a table at the end of a run lists; of many it says how many there are."""
    if len(per_silo) <= _MOST_LISTED:
        return list(per_silo.items())
    table.add_row(Text(f"{len(per_silo):,} silos; summary.json has each", style="dim"))
    return []


def _own_models_table(perplexity: dict[str, Any], tree: dict[str, Any] | None) -> Table | None:
    """Return what nodes' own models give, where that is more than what the global one gives on each silo."""
    nodes, per_silo = perplexity["per_node"], perplexity["per_silo"]
    known = {name: per_silo[name]["final"] for name in nodes if name in per_silo}
    if not nodes or (tree is None and nodes == known):
        return None
    levels = dict.fromkeys(nodes, 0)
    if tree is not None:
        levels = {node.name: level - 1 for level, node in read_tree(tree).levels() if level}
    table = Table(
        title="Own models, validation perplexity",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("node")
    table.add_column("after", justify="right")
    for name, level in levels.items():
        table.add_row(Text("  " * level + name), format_perplexity(nodes.get(name)))
    table.add_section()
    table.add_row("mean of silos", format_perplexity(perplexity["mean_of_silos"]), style="bold")
    return table


def _bytes_table(sizes: dict[str, Any]) -> Table:
    table = Table(title="Bytes on the link", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("reply")
    for heading in ("up", "down"):
        table.add_column(heading, justify="right")
    for name, row in _listed(table, sizes["per_silo"]):
        table.add_row(Text(name), format_bytes(row["up"]), format_bytes(row["down"]))
    validation = sizes["evaluation"]
    table.add_row(
        "for validation", format_bytes(validation["up"]), format_bytes(validation["down"]), style="dim"
    )
    table.add_section()
    table.add_row("all", format_bytes(sizes["up"]), format_bytes(sizes["down"]), style="bold")
    return table


def _facts(
    summary: dict[str, Any], report_path: Path | None, export_path: Path | None
) -> list[tuple[str, str]]:
    seconds = summary["seconds"]
    rows = [
        ("tokens trained", f"{summary['tokens']:,} in {counted(summary['rounds'], 'round')}"),
        ("training", format_seconds(seconds["training"])),
        ("everything else", f"{format_seconds(seconds['overhead'])} of {format_seconds(seconds['total'])}"),
        ("throughput", f"{format_count(summary['tokens_per_second'])} tokens/s"),
    ]
    if error := summary["perplexity"].get("final_error"):
        silos, after = summary["perplexity"]["final_silos"], summary["perplexity"]["final_round"]
        told = f"± {format_perplexity(error)}, by {counted(silos, 'silo')} after round {after}"
        rows.append(("error of the perplexity", told))
    if summary["mfu"] is not None:
        rows.append(("model FLOPs utilisation", format_share(summary["mfu"])))
    if summary.get("density") is not None:
        rows.append(
            ("weights that are not zero", f"{format_share(summary['density'])} of those that are pruned")
        )
    if summary.get("privacy") is not None:
        rows.append(("privacy of a silo", " ".join(privacy_figures(summary["privacy"]))))
    for name, task in ((summary.get("tasks") or {}).get("tasks") or {}).items():
        if (figure := main_figure(task)) is not None and figure[1] is not None:
            rows.append((name, f"{figure[0].replace('_', ' ')} {figure[1]:.4g}"))
    if (labels := summary.get("labels")) is not None:
        last = labels["rounds"][-1]
        right, sure = format_share(last["pseudo_label_accuracy"]), format_share(last["coverage"])
        rows.append(("accuracy", format_share(labels["accuracy"])))
        rows.append(("labels of the last round", f"{right} right, for {sure} of a silo's texts"))
    if summary["failures"]:
        rows.append(("failed silos", str(summary["failures"])))
    rows += [(label, str(path)) for label, path in (("report", report_path), ("model", export_path)) if path]
    return rows
