"""Validation perplexity, bytes and masks of sparse federated training on real text, at equal tokens.

    python scripts/studies/sparse_text.py run --minutes 45    # go on with what is missing
    python scripts/studies/sparse_text.py table               # what there is, as docs/results/sparsity.md

Every run is a whole federation of eight silos in this process, all of them in every round, on text that the
installation brings: dealt out evenly (``iid``), or a domain to two silos, each with its own half of the
documents (``domains``). Its result is a line of a file; a run that has one is not done again, so the script
may be stopped at any time. The same seed draws the same weights and the same text.

The peak learning rate is tuned for every method and sparsity, ``iid`` and seed 0, by the same rule: two rates
(at other sparsities than 90 % the best one there), then half and twice the best one until both are worse.
Dense training with SparsyFed's map of the weights, and nothing pruned, is one method more: what it does
better than dense training is not due to zeros. What prunes nothing is what the others are compared with, and
tuned on a finer grid, of factors of √2. The other runs take the best rate of their method and sparsity; a
variant takes that of its method, half and twice that.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from results import Result, Results, Runs, has_line
from study import Study
from tables import by_rate, marked, percent, perplexity, save_figure, table, with_lines
from text import (
    SEQUENCE_LENGTH,
    SETTINGS,
    VOCABULARY,
    add_data,
    dealt_evenly,
    federate,
    prepared,
    temporary_folder,
)

if TYPE_CHECKING:
    from photon.data.documents import Document

DENSE, MAPPED, TOPK, SPARSYFED = "dense", "dense, β = 1.25", "Top-K", "SparsyFed"
#: Overrides by method. Those after the first four are variants, for the cell alone that rates are tuned in.
METHODS: dict[str, list[str]] = {
    DENSE: ["strategy=photon"],
    MAPPED: ["strategy=sparsyfed"],
    SPARSYFED: ["strategy=sparsyfed"],
    TOPK: ["strategy=topk"],
    "SparsyFed, β = 2": ["strategy=sparsyfed", "strategy.beta=2"],
    "SparsyFed, β = 1.1": ["strategy=sparsyfed", "strategy.beta=1.1"],
    "SparsyFed, β = 1.5": ["strategy=sparsyfed", "strategy.beta=1.5"],
    "SparsyFed, ramp of 8 rounds": ["strategy=sparsyfed", "strategy.ramp_rounds=8"],
    "Top-K, ramp of 8 rounds": ["strategy=topk", "strategy.ramp_rounds=8"],
    "SparsyFed, whole inputs": ["strategy=sparsyfed", "strategy.activation_pruning=false"],
}
TUNED_FIRST = 0.9
#: In the order of the runs.
SPARSITIES = (TUNED_FIRST, 0.5, 0.75, 0.95)
MAIN = (DENSE, MAPPED, SPARSYFED, TOPK)
#: Those that prune nothing: their sparsity is always 0.
UNPRUNED = (DENSE, MAPPED)
VARIANTS = tuple(METHODS)[len(MAIN) :]
RATES = (0.004, 0.008)
#: Where the others are looked for: every one without pruning, every other one with it.
GRID = (0.001, 0.0014, 0.002, 0.0028, 0.004, 0.0057, 0.008, 0.011, 0.016, 0.023, 0.032, 0.045, 0.064)
CLIENTS = 8
ROUNDS = 16
LOCAL_STEPS = 24
BATCH = 2
OVERRIDES = [
    *SETTINGS,
    f"rounds={ROUNDS}",
    f"local_steps={LOCAL_STEPS}",
    f"cohort={CLIENTS}",
    f"training.batch_size={BATCH}",
    f"evaluation.every={ROUNDS}",
]
COLUMNS = [
    "Method",
    "Sparsity",
    "Rate",
    "Perplexity, each seed",
    "To dense",
    "Density",
    "IoU of masks",
    "Regrown",
    "Up",
    "Of dense",
    "Down",
]
#: Weights of the linear layers of the model that SETTINGS describe, which sparse strategies prune.
PRUNABLE = 2 * 12 * 64**2


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    sparsity: float
    split: str
    seed: int
    rate: float


# --- runs -------------------------------------------------------------------------------------------


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    def once(method: str, sparsity: float, split: str, seed: int, rate: float | None) -> None:
        if rate is not None:
            case = Case(method, own(method, sparsity), split, seed, rate)
            name = f"{method}-{case.sparsity:g}-{split}-seed{seed}-lr{rate:g}"
            runs.once(name, partial(train, case, arguments.data))

    def best(method: str, sparsity: float) -> float | None:
        return tuned(runs.results(), method, sparsity)

    def tune(method: str, sparsity: float) -> None:
        tried = None
        while (rate := untried(runs.results(), method, sparsity)) != tried:
            once(method, sparsity, "iid", 0, rate)
            tried = rate

    def compare(split: str, sparsities: Sequence[float], seed: int) -> None:
        for sparsity, method in itertools.product(sparsities, MAIN):
            once(method, sparsity, split, seed, best(method, sparsity))

    def vary(neighbour: int) -> None:
        for method in VARIANTS:
            if rate := best(method.partition(",")[0], TUNED_FIRST):
                once(method, TUNED_FIRST, "iid", 0, GRID[GRID.index(rate) + neighbour])

    for method in MAIN:
        tune(method, TUNED_FIRST)
    compare("iid", SPARSITIES[:1], seed=0)  # which tuning leaves out where earlier figures have done it
    compare("iid", SPARSITIES[:1], seed=1)
    compare("domains", SPARSITIES[:1], seed=0)
    for sparsity, method in itertools.product(SPARSITIES[1:], MAIN):
        tune(method, sparsity)
    compare("domains", SPARSITIES[-1:], seed=0)
    vary(0)
    for seed, split in itertools.product((0, 1), ("iid", "domains")):
        compare(split, SPARSITIES, seed)
    vary(-2)
    vary(2)


def own(method: str, sparsity: float) -> float:
    return 0.0 if method in UNPRUNED else sparsity


def train(case: Case, data: Path) -> Result:
    from photon.telemetry.events import Diagnostics
    from photon.telemetry.log import read_events

    overrides = [*METHODS[case.method], f"optimizer.lr={case.rate}", f"seed={case.seed}"]
    if case.method != DENSE:  # whose strategy does not know of it
        overrides.append(f"strategy.sparsity={case.sparsity}")
    with temporary_folder() as run_dir:
        text = dealt_evenly(data, CLIENTS) if case.split == "iid" else by_domain(data)
        summary = federate([*OVERRIDES, *overrides, f"data.path={text}"], run_dir)
        figures = [
            {name: event.values[name] for name in ("density/all", "mask_iou/all", "regrown/mean")}
            for event in read_events(run_dir / "events.jsonl")
            if isinstance(event, Diagnostics) and "density/all" in event.values
        ]
    result: Result = {**asdict(case), "rounds": figures, "perplexity": None}
    if summary is not None:
        result["perplexity"] = summary["perplexity"]["final"]
        result["per_silo"] = {
            silo: found["final"] for silo, found in summary["perplexity"]["per_silo"].items()
        }
        result["parameters"] = summary["parameters"]
        result["bytes"] = {
            way: sum(one[way] for one in summary["bytes"]["per_silo"].values()) / ROUNDS / CLIENTS
            for way in ("up", "down")
        }
    return result


def by_domain(folder: Path) -> Path:
    """Return the installation's text, a domain to two silos."""
    return prepared(folder / "domains", VOCABULARY, SEQUENCE_LENGTH, deal=halved)


def halved(domains: "Mapping[str, list[Document]]") -> "dict[str, list[Document]]":
    """Deal the documents of every domain out evenly over two silos."""
    from photon.data.partition import Partition, partition_documents

    return {
        f"{domain}-{number}": list(half)
        for domain, documents in domains.items()
        for number, half in enumerate(
            partition_documents({domain: documents}, Partition("iid", silos=2), seed=0).values()
        )
    }


# --- the page ---------------------------------------------------------------------------------------


def tuning(results: Results, method: str, sparsity: float) -> dict[float, float]:
    """Return the perplexity by rate of the runs that tune a method; infinite for one that diverged."""
    return {
        rate: math.inf if one["perplexity"] is None else one["perplexity"]
        for rate, one in tuning_runs(results, method, sparsity).items()
    }


def tuning_runs(results: Results, method: str, sparsity: float) -> dict[float, Result]:
    cell = (method, own(method, sparsity), "iid", 0)
    return {
        one["rate"]: one
        for one in results
        if (one["method"], one["sparsity"], one["split"], one["seed"]) == cell
    }


def untried(results: Results, method: str, sparsity: float) -> float | None:
    """Return the rate that a method should be tried with next; None: the best one's neighbours are worse."""
    found = tuning(results, method, sparsity)
    first = RATES if sparsity == TUNED_FIRST else (tuned(results, method, TUNED_FIRST),)
    for rate in first:
        if rate not in found:
            return rate
    best, step = GRID.index(min(found, key=lambda rate: found[rate])), 1 if method in UNPRUNED else 2
    return next((rate for rate in (GRID[best - step], GRID[best + step]) if rate not in found), None)


def tuned(results: Results, method: str, sparsity: float) -> float | None:
    """Return the rate with the lowest perplexity of those tried; None before ``RATES`` are."""
    found = tuning(results, method, sparsity)
    if sparsity == TUNED_FIRST and not found.keys() >= set(RATES):
        return None
    return min(found, key=lambda rate: found[rate], default=None)


def sections(results: Results) -> Iterator[str]:
    yield from rates_table(results)
    yield from split_table(results, "Documents dealt out evenly", "iid")
    yield from variants_table(results)
    yield from split_table(results, "A domain to two silos", "domains")
    yield from domains_table(results)


def rates_table(results: Results) -> Iterator[str]:
    cells = [
        (method, sparsity)
        for method in MAIN
        for sparsity in (SPARSITIES[:1] if method in UNPRUNED else sorted(SPARSITIES))
    ]
    found = {cell: runs for cell in cells if (runs := tuning_runs(results, *cell))}
    if not found:
        return
    rates = sorted(set(RATES).union(*found.values()))
    rows = []
    for (method, sparsity), runs in found.items():
        texts = {rate: marked(perplexity(one["perplexity"]), one) for rate, one in runs.items()}
        cells_of_rates = by_rate(texts, rates, tuned(results, method, sparsity))
        rows.append([method, percent(own(method, sparsity)), *cells_of_rates])
    yield "## Tuning: perplexity by peak learning rate (evenly, seed 0)"
    yield ""
    yield from table(["Method", "Sparsity", *(f"{rate:g}" for rate in rates)], rows)


def chosen(results: Results, method: str, sparsity: float, split: str) -> list[Result]:
    """Return the runs of a cell at the tuned rate, by seed."""
    cell = (method, sparsity, split, tuned(results, method, sparsity or TUNED_FIRST))
    runs = [one for one in results if (one["method"], one["sparsity"], one["split"], one["rate"]) == cell]
    return sorted(runs, key=lambda one: int(one["seed"]))


def split_table(results: Results, title: str, split: str) -> Iterator[str]:
    cells = itertools.product((0.0, *sorted(SPARSITIES)), MAIN)
    groups = [chosen(results, method, sparsity, split) for sparsity, method in cells]
    yield from runs_table(title, groups, chosen(results, DENSE, 0.0, split))


def variants_table(results: Results) -> Iterator[str]:
    groups = [chosen(results, method, own(method, TUNED_FIRST), "iid")[:1] for method in MAIN]
    groups += [[one] for method in VARIANTS for one in results if one["method"] == method]
    yield from runs_table("Variants at 90 %, documents dealt out evenly, seed 0", groups, groups[0])


def runs_table(title: str, groups: Sequence[Results], dense: Results) -> Iterator[str]:
    """Give a row to each group of runs that differ in the seed alone; nothing if there is no group."""
    groups = list(filter(None, groups))
    if not groups:
        return
    yield f"## {title}"
    yield ""
    yield from table(COLUMNS, (runs_row(runs, dense) for runs in groups))


def runs_row(runs: Results, dense: Results) -> list[str]:
    of_seed = {one["seed"]: one for one in dense}
    first = runs[0]
    row = [first["method"], percent(first["sparsity"]), f"{first['rate']:g}"]
    row.append(", ".join(marked(perplexity(one["perplexity"]), one) for one in runs))
    if not all(one["perplexity"] for one in runs):
        return row + [""] * 7
    pairs = [(one, of_seed[one["seed"]]) for one in runs if one["seed"] in of_seed]
    row.append(
        ", ".join(
            marked(percent(one["perplexity"] / other["perplexity"] - 1, 1, "+"), one, other)
            for one, other in pairs
        )
    )
    return [*row, *mask_cells(with_lines(runs)), *byte_cells(with_lines(runs), with_lines(dense))]


def mask_cells(runs: Results) -> list[str]:
    """Return density and IoU in the first and the last round, and what grew again, means over seeds."""
    if not runs[0]["rounds"]:
        return ["1", "–", "–"]
    cells = []
    for figure, digits in (("density/all", 3), ("mask_iou/all", 2)):
        first, last = (statistics.fmean(one["rounds"][at][figure] for one in runs) for at in (0, -1))
        cells.append(f"{first:.{digits}f} → {last:.{digits}f}")
    regrown = statistics.fmean(later["regrown/mean"] for one in runs for later in one["rounds"][1:])
    return [marked(cell, *runs) for cell in (*cells, percent(regrown / PRUNABLE, 2))]


def byte_cells(runs: Results, dense: Results) -> list[str]:
    """Return bytes up, their share of those of dense training, and bytes down, means over seeds."""
    up, down = (statistics.fmean(one["bytes"][way] for one in runs) for way in ("up", "down"))
    share = f"1/{statistics.fmean(one['bytes']['up'] for one in dense) / up:.2f}" if dense else ""
    return [
        marked(f"{up / 1e3:,.1f} kB", *runs),
        marked(share, *runs, *dense),
        marked(f"{down / 1e3:,.1f} kB", *runs),
    ]


def domains_table(results: Results) -> Iterator[str]:
    rows, names = [], []
    for sparsity, method in itertools.product((0.0, *sorted(SPARSITIES)), MAIN):
        runs = [one for one in chosen(results, method, sparsity, "domains") if one["perplexity"]]
        if runs := with_lines(runs):
            found = by_domain_of(runs)
            names = list(found)
            cells = [marked(perplexity(value), *runs) for value in found.values()]
            rows.append([method, percent(sparsity), *cells])
    if rows:
        yield "Perplexity of each domain, the geometric mean of its two silos and of the seeds:"
        yield ""
        yield from table(["Method", "Sparsity", *names], rows)


def by_domain_of(runs: Results) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for one in runs:
        for silo, value in one["per_silo"].items():
            values.setdefault(silo.rpartition("-")[0], []).append(value)
    return {domain: statistics.geometric_mean(found) for domain, found in values.items()}


def plot(results: Results, path: Path) -> None:
    """Draw perplexity by sparsity for each split; a dot is a run, a line the mean of the seeds.

    A dot is hollow if the run has no line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, split, title in zip(
        axes, ("iid", "domains"), ("dealt out evenly", "a domain to two silos"), strict=True
    ):
        for number, method in enumerate(MAIN):
            means: dict[float, float] = {}
            for sparsity in (0.0,) if method in UNPRUNED else sorted(SPARSITIES):
                runs = [one for one in chosen(results, method, sparsity, split) if one["perplexity"]]
                for one in runs:
                    face = f"C{number}" if has_line(one) else "none"
                    axis.plot(1 - sparsity, one["perplexity"], f"C{number}o", markersize=4, mfc=face)
                if runs:
                    means[1 - sparsity] = statistics.fmean(one["perplexity"] for one in runs)
            if method in UNPRUNED and means:
                axis.axhline(means[1.0], color=f"C{number}", linestyle="--", label=method)
            else:
                axis.plot(list(means), list(means.values()), f"C{number}-", label=method)
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xticks([1.0, *(1 - sparsity for sparsity in sorted(SPARSITIES))], minor=False)
        axis.set_xticklabels(["0", *map(percent, sorted(SPARSITIES))])
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("sparsity of the prunable weights")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation perplexity")
    if not all(map(has_line, results)):
        axes[0].plot([], [], "ko", markersize=4, mfc="none", label="no line in the repository")
    axes[0].legend()
    save_figure(figure, path)


TOKENS = CLIENTS * ROUNDS * LOCAL_STEPS * BATCH * SEQUENCE_LENGTH
ABOUT = (
    f"{CLIENTS} silos, {ROUNDS} rounds of {LOCAL_STEPS} local steps, batch {BATCH} × {SEQUENCE_LENGTH}, "
    f"{TOKENS:,} tokens in all. *Dense, β = 1.25* has SparsyFed's map of the weights and prunes nothing. "
    "*Density* is that of the mean of the silos' models, *IoU* compares two silos' masks, both after the "
    "first and after the last round. *Regrown* is the share of the prunable weights that were zero when a "
    "silo got them and were not when they left, mean over the rounds after the first. Bytes are those of "
    "one message, with all that it carries. What the figures mean is in "
    "[sparse training](../sparsity.md#on-text)."
)
STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/sparsity.md",
    title="Sparse training on text: the figures",
    about=lambda _: ABOUT,
    run=run_missing,
    sections=sections,
    options=add_data,
    plot=plot,
    plotted="Perplexity by sparsity",
    marks=True,
)

if __name__ == "__main__":
    STUDY.main()
