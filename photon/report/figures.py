"""The figures of one run."""

import itertools
import math
from collections.abc import Callable, Sequence

from photon.report import charts
from photon.report.charts import INK, REFERENCE, Axis, Series, Style
from photon.report.page import PERPLEXITY, ROUND, TIME, TOKENS, Figure, by_round, line_figure, thinned
from photon.report.run import Run, bytes_by_round
from photon.telemetry.events import (
    Diagnostics,
    Evaluated,
    RoundFinished,
    RoundStarted,
    SiloFailed,
    SiloFinished,
)
from photon.telemetry.summary import (
    estimate_text,
    format_bytes,
    format_count,
    format_perplexity,
    format_seconds,
    format_share,
)

PHASES = (
    ("training", Style("c1")),
    ("fold", Style("c4")),
    ("outer", Style("c3")),
    ("evaluate", Style("c2")),
    ("checkpoint", Style("c5")),
    ("other", Style("muted")),
)
_DIAGNOSTICS = {
    "attention": "Weights of a node's own key blocks and of its children's, by block, in each aggregation.",
    "routed": "Of key blocks that travelled to another child: how much alike they are, by block.",
    "noise": "Gradient noise scale: trace of the covariance of updates, squared norm of the true one, ratio.",
    "pseudo_gradient_norm": "By layer.",
    "parameter_norm": "By layer, after the outer step.",
    "activation_norm_in": "Root mean square over tokens, leaving the embedding, on each silo's own text.",
    "activation_norm_out": "Root mean square over tokens, entering the head, on each silo's own text.",
    "basis_similarity": "Of LoRDO's subspaces before and after a refresh: 1 means that they do not turn.",
}


def perplexity_by_tokens(run: Run) -> Figure | None:
    """Draw perplexity of each silo against the tokens that all trained."""
    note = "How well the global model predicts each silo's held-out text; the lower the better."
    places = [float(event.tokens_trained) for event, _ in run.evaluations]
    return _perplexity_figure(run, "Perplexity against tokens", note, places, TOKENS)


def perplexity_by_time(run: Run) -> Figure | None:
    """Draw perplexity of each silo against the time at work."""
    note = "The same against the time at work; pauses before a run is resumed are left out."
    places = [seconds for _, seconds in run.evaluations]
    return _perplexity_figure(run, "Perplexity against time", note, places, TIME)


def train_loss(run: Run) -> Figure | None:
    """Draw the loss of each silo and of the cohort."""
    note = "Mean loss of each silo over its local steps, and of the cohort, in nats per token."
    overall = Series("cohort", [event.round for event in run.rounds], [e.train_loss for e in run.rounds], INK)
    series = [*_silo_series(run, lambda reply: reply.loss), overall]
    return by_round("Training loss", note, series, Axis("training loss"), "{:.4f}".format)


def gradient_norm(run: Run) -> Figure | None:
    """Draw the norm of each silo's gradients."""
    note = "Norm of the gradient before clipping, mean over a silo's local steps."
    series = _silo_series(run, lambda reply: reply.gradient_norm)
    return by_round("Gradient norm", note, series, Axis("gradient norm"), "{:.4g}".format)


def learning_rate(run: Run) -> Figure | None:
    """Draw the local optimizer's learning rate."""
    note = "The local optimizer's learning rate at the end of each round."
    last = {reply.round: reply.learning_rate for reply in run.replies}
    series = [Series("learning rate", sorted(last), [last[number] for number in sorted(last)], Style("c1"))]
    return by_round("Learning rate", note, series, Axis("learning rate"), "{:.3g}".format)


def cohorts(run: Run) -> Figure | None:
    """Draw who took part in which round, and who failed."""
    begun = [event for event in run.history if isinstance(event, RoundStarted)]
    if not begun or not run.draws_silos:
        return None
    sampled = {(event.round, name) for event in begun for name in event.cohort}
    done = {(event.round, event.silo) for event in run.replies}
    # A silo that could not validate the model failed as well, but not as a member of the cohort.
    failed = {(e.round, e.silo) for e in run.history if isinstance(e, SiloFailed)} & sampled - done
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
    chart = charts.cohort_grid(
        rounds,
        list(styles),
        list(styles.values()),
        [[(number, name) in done for number in rounds] for name in styles],
        [[(number, name) in failed for number in rounds] for name in styles],
    )
    note = "Full: the silo's update counted. Cross: it failed. Pale: not sampled."
    return Figure("Cohort of each round", note, chart, ["round", "took part", "failed"], thinned(rows))


def update_norms(run: Run) -> Figure | None:
    """Draw the norms of the pseudo-gradient and of the updates that it is made of."""
    note = "L2 norm of the pseudo-gradient, and of each silo's own update."
    norms = [event.pseudo_gradient_norm for event in run.rounds]
    whole = Series("pseudo-gradient", [event.round for event in run.rounds], norms, INK)
    series = [*_silo_series(run, lambda reply: reply.update_norm), whole]
    return by_round("Pseudo-gradient norm", note, series, Axis("L2 norm"), "{:.4g}".format)


def agreement(run: Run) -> Figure | None:
    """Draw how much the updates of a round are alike."""
    note = (
        "Cosine: mean over pairs of silo updates, weighted by norm. Consensus: norm of the mean update by "
        "mean norm. Both are 1 where all silos pull the same way."
    )
    places = [event.round for event in run.rounds]
    series = [
        Series("silo cosine", places, [event.silo_cosine for event in run.rounds], Style.of(0)),
        Series("consensus", places, [event.consensus for event in run.rounds], Style.of(1)),
    ]
    return by_round("Agreement of the silos", note, series, Axis("agreement"), "{:.3f}".format)


def link_bytes(run: Run) -> Figure | None:
    """Draw what had crossed the link by each round."""
    if not run.rounds:
        return None
    places, ups, downs = bytes_by_round(run)
    series = [
        Series("up, to the server", places, ups, Style.of(0)),
        Series("down, to the silos", places, downs, Style("c2", 1)),
    ]
    note = "Training and validation, all silos together, summed over the rounds, as measured on the link."
    return by_round("Bytes on the link", note, series, Axis("bytes", "bytes"), format_bytes)


def phases(run: Run) -> Figure | None:
    """Draw what the time of each round was spent on."""
    if not run.rounds:
        return None
    split = [phase_seconds(event) for event in run.rounds]
    places = [event.round for event in run.rounds]
    layers = [
        Series(phase, places, [seconds[phase] for seconds in split], style)
        for phase, style in phases_of(split)
    ]
    rows = [
        [str(event.round), *(f"{seconds[phase]:.3f}" for phase, _ in PHASES)]
        for event, seconds in zip(run.rounds, split, strict=True)
    ]
    return Figure(
        "Time of each round",
        "Training is the time in which silos trained, one after the other where they share a machine; "
        "other is what is left of the round.",
        charts.bars(layers, ROUND, Axis("time", "seconds")),
        ["round", *(f"{phase} (s)" for phase, _ in PHASES)],
        thinned(rows),
    )


def phase_seconds(event: RoundFinished) -> dict[str, float]:
    """Return the seconds of a round by phase."""
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


def phases_of(split: Sequence[dict[str, float]]) -> list[tuple[str, Style]]:
    """Return the phases that took any time, and how each looks."""
    return [(phase, style) for phase, style in PHASES if any(seconds[phase] > 0 for seconds in split)]


def throughput(run: Run) -> Figure | None:
    """Draw tokens per second of each silo and of the cohort."""
    note = "Tokens each silo trains per second of training, and the cohort per second of the round."
    totals = [0, *(event.tokens for event in run.rounds)]
    speeds = [
        (tokens - before) / event.seconds["round"] if event.seconds["round"] else None
        for event, (before, tokens) in zip(run.rounds, itertools.pairwise(totals), strict=True)
    ]
    whole = Series("cohort", [event.round for event in run.rounds], speeds, INK)
    series = [*_silo_series(run, lambda reply: reply.tokens_per_second), whole]
    return by_round("Throughput", note, series, Axis("tokens per second", "count"), format_count)


def utilisation(run: Run) -> Figure | None:
    """Draw each silo's model FLOPs utilisation, if the device's roofline is known."""
    series = _silo_series(run, lambda reply: reply.mfu)
    roofline = run.started.roofline_flops
    if not roofline:
        return None
    note = f"Model FLOPs of a silo's training by the device's roofline of {format_count(roofline)}FLOP/s."
    axis = Axis("utilisation", "share")
    return by_round("Model FLOPs utilisation", note, series, axis, format_share)


def diagnostics(run: Run, figure: str) -> Figure | None:
    """Draw one of the figures that the `Diagnostics` tell of, such as ``parameter_norm``."""
    events = [event for event in run.history if isinstance(event, Diagnostics)]
    names = dict.fromkeys(name for event in events for name in event.values)
    of_what = [name.partition("/")[2] for name in names if name.partition("/")[0] == figure]
    if not run.draws_silos:
        silos = run.silos
        of_what = [label for label in of_what if label not in silos]
    styles = run.participants
    series = [
        Series(
            label,
            [event.round for event in events],
            [event.values.get(f"{figure}/{label}") for event in events],
            styles.get(label) or Style.of(number),
        )
        for number, label in enumerate(of_what)
    ]
    title = figure.replace("_", " ")
    note = _DIAGNOSTICS.get(figure, "")
    return by_round(title[0].upper() + title[1:], note, series, Axis(title), "{:.4g}".format)


def _perplexity_figure(run: Run, title: str, note: str, places: list[float], x: Axis) -> Figure | None:
    evaluations = [event for event, _ in run.evaluations]
    series = [
        Series(name, places, [_perplexity_of(event, name) for event in evaluations], style)
        for name, style in (run.silos.items() if run.draws_silos else ())
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
    if any(event.is_estimate for event in evaluations):
        columns.append("rests on")
        for row, event in zip(rows, evaluations, strict=True):
            row.append(estimate_text(event).strip() or "all silos")
        note = f"{note} Where some of the silos alone have measured a model, the table says how many."
    return line_figure(title, note, series, x, PERPLEXITY, columns, rows, references=[reference])


def _perplexity_of(event: Evaluated, silo: str) -> float | None:
    return event.per_silo[silo]["perplexity"] if silo in event.per_silo else None


def _silo_series(run: Run, value: Callable[[SiloFinished], float | None]) -> list[Series]:
    if not run.draws_silos:
        return []
    series, replies = [], run.replies
    for name, style in run.participants.items():
        own = [reply for reply in replies if reply.silo == name]
        series.append(Series(name, [c.round for c in own], [value(c) for c in own], style))
    return series
