"""Validation perplexity of the low-communication methods on real text, at equal tokens and equal bytes.

    python scripts/studies/convergence.py run --minutes 45       # go on with what is missing
    python scripts/studies/convergence.py run --rate 0.004 strategy=mtdao    # one try, which the page lists
    python scripts/studies/convergence.py table                  # docs/results/convergence.md

Every run is a whole federation in this process, on text that the installation brings, dealt out evenly. Its
result is a line of a file; a run that has one is not done again, so the script may be stopped at any time,
and several processes may share the work. The peak learning rate of a method is tuned for each H with 384
steps and 4 silos: three rates a factor √2 apart, then the neighbours of the best until the best has a worse
one on both sides. With H = 64, where a rate may suit one seed and not the next, the mean of two counts. The
other cells take the best one. Long runs have two rates; what sends fewer bytes than Local Adam, and is
compared with it, has its best rate. Outer rates of DiLoCo are methods of their own.

Synchronous data-parallel training is one silo with the batch of all. Its bytes are not measured but
counted: a gradient of the model's size in each step.
"""

import argparse
import hashlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from results import Result, Results, Runs, tuned_rate, untried_rates
from study import Study
from tables import by_rate, perplexity, save_figure, table
from text import (
    BATCH,
    MUON,
    QUICK,
    SEQUENCE_LENGTH,
    SETTINGS,
    add_data,
    dealt_evenly,
    federate,
    temporary_folder,
)

STEPS = 384
LONG = 1024
#: How often the model is evaluated, in local steps.
EVALUATION = 64


@dataclass(frozen=True)
class Cell:
    """What methods are compared at."""

    local_steps: int
    clients: int
    seed: int
    steps: int = STEPS


@dataclass(frozen=True)
class Part:
    """Methods that are tuned alike, and the cells that they are compared at.

    Parameters
    ----------
    title
        Over its table of rates.
    tuning
        Where the rates are tried: cells that differ in the seed alone.
    rates
        Ascending. The middle three are tried first, then neighbours of the best in the mean of ``tuning``.
    methods
        Name to overrides.
    cells
        In the order in which they are run.
    """

    title: str
    tuning: Sequence[Cell]
    rates: Sequence[float]
    methods: dict[str, list[str]]
    cells: Sequence[Cell]


TUNING = Cell(16, 4, 0)
RATES = (0.001, 0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008, 0.0112, 0.016, 0.0224, 0.032, 0.045, 0.064)
SYNCHRONOUS = "synchronous"
#: MT-DAO's recipe in proportion: QUICK for 128 steps, then a slow momentum from nothing at twice the rate.
TRANSITION = [
    "strategy=mtdao",
    QUICK,
    "optimizer.weights=[1.0]",
    "+transition.step=128",
    "+transition.zero=[exp_avg]",
    "+transition.optimizer.betas=[0.99,0.99]",
    "+transition.optimizer.weights=[0.9]",
    "+transition.lr_scale=2.0",
]
#: A byte for each value of a moment. Whole numbers would do for the first, but make zeros of the second.
E5M2 = "link.states=[{_target_:photon.link.codecs.Float8,dtype:float8_e5m2}]"
LOWRANK = ["strategy=lordo", QUICK]
#: The share of the momentum that LoRDO's paper has for its local variant.
LOCAL = [*LOWRANK, "optimizer.projection=local", "optimizer.weight=0.94"]
ADAMS = {
    "Local Adam": ["strategy=local-adam", QUICK],
    "DES-LOC 3x, 6x": ["strategy=desloc", QUICK],
    "MT-DAO, switched": TRANSITION,
    "FedAvg": ["strategy=photon", QUICK],
    SYNCHRONOUS: ["strategy=centralized", QUICK],
}
GLOBAL_BASES = {f"LoRDO, global, rank {rank}": [*LOWRANK, f"optimizer.rank={rank}"] for rank in (16, 8)}
LOCAL_BASES = {f"LoRDO, local, rank {rank}": [*LOCAL, f"optimizer.rank={rank}"] for rank in (16, 8)}
DILOCO = {
    "DiLoCo, outer 0.7": ["strategy=diloco", QUICK],
    "DiLoCo, outer 0.2": ["strategy=diloco", "outer.lr=0.2", QUICK],
    "Streaming DiLoCo, outer 0.2": [
        "strategy=streaming-diloco",
        "strategy.fragments=2",
        "outer.lr=0.2",
        QUICK,
    ],
}
#: The same with less of the first moment on the wire, or none.
FEWER_BYTES = {
    "Local Adam, moments in e5m2": ["strategy=local-adam", QUICK, E5M2],
    "DES-LOC 1x, 6x, moments in e5m2": [
        "strategy=desloc",
        "strategy.sync.exp_avg=${local_steps}",
        QUICK,
        E5M2,
    ],
    "FedAvg, moment refreshed": ["strategy=photon", "optimizer=refreshed-adamw", QUICK],
}
#: Methods whose best rates are near each other.
NEAR = {
    0.008: {**ADAMS, **LOCAL_BASES, "DiLoCo, outer 0.2": DILOCO["DiLoCo, outer 0.2"]},
    0.016: {**GLOBAL_BASES, "Muon": MUON},
    0.0028: {"DiLoCo, outer 0.7": DILOCO["DiLoCo, outer 0.7"]},
    0.0056: {"Streaming DiLoCo, outer 0.2": DILOCO["Streaming DiLoCo, outer 0.2"]},
}
#: The best rates of Local Adam, for what saves bytes against it.
LOCAL_ADAM = {(STEPS, 16): 0.008, (STEPS, 64): 0.0056, (LONG, 16): 0.008, (LONG, 64): 0.0056}


def short(local_steps: int) -> list[Cell]:
    return [
        *(Cell(local_steps, 4, seed) for seed in (0, 1, 2)),
        *(Cell(local_steps, 8, seed) for seed in (0, 1)),
    ]


def long(local_steps: int) -> list[Cell]:
    return [Cell(local_steps, 4, seed, LONG) for seed in (0, 1, 2)]


def around(rate: float) -> Sequence[float]:
    return RATES[RATES.index(rate) - 3 : RATES.index(rate) + 4]


PARTS = [
    *(
        Part(
            "Short runs",
            [Cell(local_steps, 4, seed) for seed in seeds],
            around(rate),
            methods,
            short(local_steps),
        )
        for local_steps, seeds in ((16, (0,)), (64, (0, 1)))
        for rate, methods in NEAR.items()
    ),
    *(
        Part(
            "Short runs, fewer bytes",
            [Cell(local_steps, 4, 0)],
            (LOCAL_ADAM[STEPS, local_steps],),
            FEWER_BYTES,
            short(local_steps),
        )
        for local_steps in (16, 64)
    ),
    *(
        Part("Long runs", [Cell(local_steps, 4, 0, LONG)], rates, methods, long(local_steps))
        for local_steps in (16, 64)
        for rates, methods in (
            ((0.0056, 0.008), ADAMS),
            ((LOCAL_ADAM[LONG, local_steps],), FEWER_BYTES),
            ((0.0112, 0.016), {"Muon": MUON, **GLOBAL_BASES}),
        )
    ),
]
#: Of which there are tables.
CELLS = [
    Cell(local_steps, clients, 0, steps)
    for steps in (STEPS, LONG)
    for local_steps in (16, 64)
    for clients in (4, 8)
]
#: Of the table of a cell.
COLUMNS = [
    "Method",
    "Rate",
    "Perplexity",
    "Seeds 0, 1, …",
    "Bytes up per silo",
    "Tokens to it",
    "Bytes to it",
]
METHODS = {method: overrides for part in PARTS for method, overrides in part.methods.items()}


# --- runs -------------------------------------------------------------------------------------------


def run_asked(runs: Runs, arguments: argparse.Namespace) -> None:
    if arguments.overrides:
        cell = Cell(arguments.local_steps, arguments.clients, arguments.seed, arguments.steps)
        run_once(runs, arguments.data, arguments.overrides, cell, arguments.rate)
    else:
        run_missing(runs, arguments.data)


def run_missing(runs: Runs, data: Path) -> None:
    for part in PARTS:
        for method, overrides in part.methods.items():
            for _ in part.rates:
                rate = untried(runs.results(), method, part)
                if rate is None:
                    break
                for cell in part.tuning:
                    run_once(runs, data, overrides, cell, rate, method)
        for cell in part.cells:
            for method, overrides in part.methods.items():
                best = tuned(runs.results(), method, part)
                if best is not None:
                    run_once(runs, data, overrides, cell, best, method)


def run_once(
    runs: Runs, data: Path, overrides: Sequence[str], cell: Cell, rate: float, method: str | None = None
) -> None:
    """Do one run, of a method or, if it is none, of a try that is known by its overrides."""
    known = method or f"try-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:12]}"
    where = f"H{cell.local_steps}-N{cell.clients}-seed{cell.seed}-lr{rate:g}-T{cell.steps}"
    text = partial(dealt_evenly, data, cell.clients)
    runs.once(f"{known}-{where}", partial(train, text, method or " ".join(overrides), overrides, cell, rate))


def train(text: Callable[[], Path], method: str, overrides: Sequence[str], cell: Cell, rate: float) -> Result:
    """Do one run on the prepared text whose folder ``text`` returns."""
    from photon.telemetry.events import Evaluated, RunStarted, SiloFinished
    from photon.telemetry.log import read_events

    settings = [
        *SETTINGS,
        f"optimizer.lr={rate}",
        f"data.path={text()}",
        f"cohort={cell.clients}",
        f"local_steps={cell.local_steps}",
        f"rounds={cell.steps // cell.local_steps}",
        f"evaluation.every={max(1, EVALUATION // cell.local_steps)}",
        f"seed={cell.seed}",
        *overrides,
    ]
    with temporary_folder() as run_dir:
        summary = federate(settings, run_dir)
        events = list(read_events(run_dir / "events.jsonl"))
    parameters = next(event.parameters for event in events if isinstance(event, RunStarted))
    curve, up, tokens = [], 0, 0
    for event in events:
        if isinstance(event, SiloFinished):
            up += event.bytes_up
            tokens += event.tokens
        elif isinstance(event, Evaluated):
            curve.append({"tokens": tokens, "bytes_up": up / cell.clients, "perplexity": event.perplexity})
    if method.startswith(SYNCHRONOUS):
        per_step = SEQUENCE_LENGTH * BATCH * cell.clients
        curve = [{**point, "bytes_up": 4 * parameters * point["tokens"] / per_step} for point in curve]
    return {
        "method": method,
        **asdict(cell),
        "rate": rate,
        "parameters": parameters,
        "perplexity": None if summary is None else curve[-1]["perplexity"],
        "curve": curve,
    }


# --- the page ---------------------------------------------------------------------------------------


def of_cell(results: Results, method: str, cell: Cell) -> Iterator[Any]:
    """Return the results of a method in a cell, of all seeds."""
    at = (method, cell.steps, cell.local_steps, cell.clients)
    return (one for one in results if (one["method"], one["steps"], one["local_steps"], one["clients"]) == at)


def tried(results: Results, method: str, part: Part) -> dict[float, float]:
    """Return by rate the mean perplexity where rates are tuned, infinite where a run diverged."""
    found: dict[float, list[float]] = {}
    for one in of_cell(results, method, part.tuning[0]):
        if one["seed"] in [cell.seed for cell in part.tuning] and one["rate"] in part.rates:
            found.setdefault(one["rate"], []).append(one["perplexity"] or math.inf)
    return {rate: statistics.fmean(each) for rate, each in found.items() if len(each) == len(part.tuning)}


def untried(results: Results, method: str, part: Part) -> float | None:
    """Return the rate to try next: one of the middle three, then a neighbour of the best; None if all are."""
    missing = untried_rates(tried(results, method, part), part.rates)
    return missing[0] if missing else None


def tuned(results: Results, method: str, part: Part) -> float | None:
    """Return the rate with the lowest perplexity; None as long as one has to be tried."""
    return tuned_rate(tried(results, method, part), part.rates)


def reached(curve: Sequence[dict[str, float]], target: float, what: str) -> float | None:
    """Return tokens or bytes at which a curve first comes down to a perplexity, between two evaluations."""
    for before, after in itertools.pairwise(curve):
        if after["perplexity"] <= target:
            high, low = math.log(before["perplexity"]), math.log(after["perplexity"])
            share = 1.0 if high <= low else min(1.0, (high - math.log(target)) / (high - low))
            return before[what] + max(0.0, share) * (after[what] - before[what])
    return None


def sections(results: Results) -> Iterator[str]:
    yield "## Tuning: perplexity by peak learning rate (4 silos)"
    yield ""
    tuned_parts = (part for part in PARTS if len(part.rates) > 1)
    for _, parts in itertools.groupby(tuned_parts, key=lambda part: (part.title, part.tuning)):
        yield from rates_table(results, list(parts))
    for cell in CELLS:
        yield from cell_table(results, cell)
    yield from tries_table(results)


def in_cell(results: Results, cell: Cell) -> dict[str, list[Result]]:
    """Return the runs in a cell, of all seeds, by method, of those that are tuned."""
    found = {}
    for part in PARTS:
        at = {replace(each, seed=cell.seed) for each in (*part.tuning, *part.cells)}
        for method in part.methods if cell in at else ():
            best = tuned(results, method, part)
            runs = [one for one in of_cell(results, method, cell) if one["rate"] == best]
            if runs := [one for one in runs if one["perplexity"] is not None]:
                found[method] = runs
    return found


def rates_table(results: Results, parts: Sequence[Part]) -> Iterator[str]:
    """Give a row to each method of parts that are tuned in the same cells."""
    methods = {method: part for part in parts for method in part.methods}
    known = {method: row for method, part in methods.items() if (row := tried(results, method, part))}
    if not known:
        return
    cells = parts[0].tuning
    rates = [rate for rate in RATES if any(rate in row for row in known.values())]
    yield (
        f"### {parts[0].title}: {cells[0].steps} steps, H = {cells[0].local_steps}, "
        f"{'seed' if len(cells) == 1 else 'mean of seeds'} {', '.join(str(cell.seed) for cell in cells)}"
    )
    yield ""
    rows = []
    for method, row in known.items():
        texts = {rate: perplexity(value) for rate, value in row.items()}
        rows.append([method, *by_rate(texts, rates, tuned(results, method, methods[method]))])
    yield from table(["Method", *(f"{rate:g}" for rate in rates)], rows)


def cell_table(results: Results, cell: Cell) -> Iterator[str]:
    chosen = in_cell(results, cell)
    if not chosen:
        return
    means = {method: statistics.fmean(one["perplexity"] for one in runs) for method, runs in chosen.items()}
    target = max(one["perplexity"] for runs in chosen.values() for one in runs)
    yield f"## {cell.steps} steps, H = {cell.local_steps}, {cell.clients} silos"
    yield ""
    yield f"Tokens and bytes up per silo to perplexity {target:.1f}, the last that all runs reach."
    yield ""
    rows = []
    for method, runs in sorted(chosen.items(), key=lambda item: means[item[0]]):
        every = ", ".join(f"{one['perplexity']:.1f}" for one in sorted(runs, key=lambda one: one["seed"]))
        total = statistics.fmean(one["curve"][-1]["bytes_up"] for one in runs)
        cells = [f"{runs[0]['rate']:g}", f"{means[method]:.2f}", every, f"{total / 1e6:.1f} MB"]
        for what, scale, unit in (("tokens", 1e3, "k"), ("bytes_up", 1e6, "MB")):
            found = [reached(one["curve"], target, what) for one in runs]
            known = [value for value in found if value is not None]
            cells.append(f"{statistics.fmean(known) / scale:.1f} {unit}" if len(known) == len(runs) else "–")
        rows.append([method, *cells])
    yield from table(COLUMNS, rows, left=(0, 3))


def tries_table(results: Results) -> Iterator[str]:
    """List what no other table has."""
    shown = [one for cell in CELLS for runs in in_cell(results, cell).values() for one in runs]
    for part in PARTS:
        runs = [one for method in part.methods for one in of_cell(results, method, part.tuning[0])]
        seeds = [cell.seed for cell in part.tuning]
        shown += [one for one in runs if one["seed"] in seeds and one["rate"] in part.rates]
    tries = [one for one in results if one not in shown]
    yield "## Single tries"
    yield ""
    yield "Of `python scripts/studies/convergence.py run` with these overrides and `--steps`, `--rate` etc."
    yield ""
    rows = []
    for one in sorted(tries, key=lambda one: (one["steps"], one["local_steps"], one["method"], one["rate"])):
        where = [str(one[key]) for key in ("steps", "local_steps", "clients", "seed")]
        label = one["method"] if one["method"] in METHODS else f"`{one['method']}`"
        rows.append([label, *where, f"{one['rate']:g}", perplexity(one["perplexity"], 2)])
    columns = ["Method or overrides", "Steps", "H", "Silos", "Seed", "Rate", "Perplexity"]
    yield from table(columns, rows)


def plot(results: Results, path: Path) -> None:
    """Draw perplexity by tokens and by bytes, a row for long runs and one for the short ones."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    rows = (replace(TUNING, steps=LONG), TUNING)
    for axes, cell in zip(figure.subplots(2, 2, sharey="row"), rows, strict=True):
        for number, method in enumerate(METHODS):
            for one in in_cell(results, cell).get(method, []):
                if one["seed"] != cell.seed:
                    continue
                points = one["curve"][1:]
                line = ("-", "--", ":")[number // 10]
                style = {"color": f"C{number % 10}", "linestyle": line, "label": method}
                heights = [point["perplexity"] for point in points]
                axes[0].plot([point["tokens"] / 1e3 for point in points], heights, **style)
                axes[1].plot([point["bytes_up"] / 1e6 for point in points], heights, **style)
        for axis, label in zip(axes, ("tokens (thousands)", "bytes up per silo (MB)"), strict=True):
            axis.set_xlabel(label)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
            axis.grid(alpha=0.3)
        axes[0].set_title(
            f"{cell.steps} steps, H = {cell.local_steps}, {cell.clients} silos, seed {cell.seed}"
        )
        axes[0].set_ylabel("validation perplexity")
        axes[1].set_xscale("log")
        if axes[0].lines:
            axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    save_figure(figure, path)


def add_options(run: argparse.ArgumentParser) -> None:
    add_data(run)
    run.add_argument("overrides", nargs="*", help="do one run with these instead, which the page lists")
    run.add_argument("--rate", type=float, default=0.008, help="its peak learning rate")
    for name, value in asdict(TUNING).items():
        run.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="of its cell")


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/convergence.md",
    title="Convergence: the figures",
    about=lambda _: "What they mean is in [low communication](low-communication.md).",
    run=run_asked,
    sections=sections,
    options=add_options,
    plot=plot,
)

if __name__ == "__main__":
    STUDY.main()
