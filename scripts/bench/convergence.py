"""Validation perplexity of the low-communication methods on real text, at equal tokens and equal bytes.

    python scripts/bench/convergence.py run --minutes 45       # go on with what is missing
    python scripts/bench/convergence.py table                  # what there is, as docs/results/convergence.md

Every run is a whole federation in this process, on text that the installation brings, dealt out evenly. Its
result is one JSON file; a run that has one is not done again, so the script may be stopped at any time. The
peak learning rate of a method is tuned on a grid that is the same for all, with H = 16, 4 clients and
seed 0; where the best is at an end of it, one more is tried. The other cells take the best one. Outer
rates of DiLoCo are methods of their own.

Synchronous data-parallel training is one client with the batch of all. Its bytes are not measured but
counted: a gradient of the model's size in each step.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from text_runs import Runs, federate, load, parsers, prepared, save_figure, temporary_folder

ADAM = "optimizer.betas=[0.95,0.95]"
SYNCHRONOUS = "synchronous"
METHODS: dict[str, list[str]] = {
    SYNCHRONOUS: ["strategy=centralized", ADAM],
    "FedAvg": ["strategy=photon", ADAM],
    "DiLoCo, outer 0.7": ["strategy=diloco", ADAM],
    "DiLoCo, outer 0.2": ["strategy=diloco", "outer.lr=0.2", ADAM],
    "Local Adam": ["strategy=local-adam", ADAM],
    "DES-LOC 3x, 6x": ["strategy=desloc", ADAM],
    "MT-DAO, beta 0.99": ["strategy=mtdao", "optimizer.betas=[0.99,0.999]"],
    "LoRDO, global, rank 16": ["strategy=lordo", "optimizer.rank=16", "optimizer.betas=[0.99,0.999]"],
    "LoRDO, local, rank 16": [
        "strategy=lordo",
        "optimizer.rank=16",
        "optimizer.betas=[0.99,0.999]",
        "optimizer.weight=0.94",
        "optimizer.projection=local",
    ],
    "DiLoCo, outer 0.4": ["strategy=diloco", "outer.lr=0.4", ADAM],
    "Streaming DiLoCo, outer 0.2": [
        "strategy=streaming-diloco",
        "strategy.fragments=2",
        "outer.lr=0.2",
        ADAM,
    ],
    "MT-DAO, beta 0.999": ["strategy=mtdao"],
    "LoRDO, global, rank 8": ["strategy=lordo", "optimizer.rank=8", "optimizer.betas=[0.99,0.999]"],
    "Muon": ["strategy=photon", "optimizer=muon", "optimizer.weight_decay=0.0"],
}
#: So many of them are done, cells and all, before the others.
FIRST = 9
GRID = (0.002, 0.004, 0.008)
#: Where the best rate is at an end of the grid, the next one is tried as well.
BEYOND = {GRID[0]: 0.001, GRID[-1]: 0.016}
STEPS = 384
BATCH = 4
SEQUENCE_LENGTH = 64
VOCABULARY = 512
SETTINGS = [
    "model.architecture.n_layer=2",
    "model.architecture.n_embd=64",
    "model.architecture.n_head=2",
    f"model.sequence_length={SEQUENCE_LENGTH}",
    "model.recipe.warmup_steps=32",
    f"training.batch_size={BATCH}",
    "evaluation.sequences=96",
]
#: How often the model is evaluated, in local steps.
EVALUATION = 64


@dataclass(frozen=True)
class Cell:
    """What a method is compared at."""

    local_steps: int
    clients: int
    seed: int


TUNING = Cell(16, 4, 0)
CELLS = [
    Cell(16, 4, 1),
    Cell(64, 4, 0),
    Cell(16, 8, 0),
    Cell(16, 4, 2),
    Cell(64, 4, 1),
    Cell(64, 8, 0),
    Cell(64, 4, 2),
    Cell(16, 8, 1),
    Cell(64, 8, 1),
]


def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "run":
        run_missing(Runs(arguments.folder, arguments.minutes), arguments.data)
    else:
        write_page(arguments.folder, arguments.output)


# --- runs -------------------------------------------------------------------------------------------


def run_missing(runs: Runs, data: Path) -> None:
    names = list(METHODS)
    for methods in (names[:FIRST], names[FIRST:]):
        for rate in (GRID[1], GRID[0], GRID[2]):
            for method in methods:
                run_once(runs, data, method, TUNING, rate)
        for method in methods:
            best = tuned(runs.results(), method)
            if best in BEYOND:
                run_once(runs, data, method, TUNING, BEYOND[best])
        for cell in CELLS:
            for method in methods:
                best = tuned(runs.results(), method)
                if best is not None:
                    run_once(runs, data, method, cell, best)


def run_once(runs: Runs, data: Path, method: str, cell: Cell, rate: float) -> None:
    name = f"{method}-H{cell.local_steps}-N{cell.clients}-seed{cell.seed}-lr{rate:g}"
    runs.once(name, partial(train, data, method, cell, rate))


def train(data: Path, method: str, cell: Cell, rate: float) -> dict[str, Any]:
    from photon.telemetry.events import ClientFinished, Evaluated, RunStarted
    from photon.telemetry.log import read_events

    overrides = [
        *SETTINGS,
        *METHODS[method],
        f"optimizer.lr={rate}",
        f"data.path={dealt_evenly(data, cell.clients)}",
        f"cohort={cell.clients}",
        f"local_steps={cell.local_steps}",
        f"rounds={STEPS // cell.local_steps}",
        f"evaluation.every={max(1, EVALUATION // cell.local_steps)}",
        f"seed={cell.seed}",
    ]
    with temporary_folder() as run_dir:
        summary = federate(overrides, run_dir)
        events = list(read_events(run_dir / "events.jsonl"))
    parameters = next(event.parameters for event in events if isinstance(event, RunStarted))
    curve, up, tokens = [], 0, 0
    for event in events:
        if isinstance(event, ClientFinished):
            up += event.bytes_up
            tokens += event.tokens
        elif isinstance(event, Evaluated):
            curve.append({"tokens": tokens, "bytes_up": up / cell.clients, "perplexity": event.perplexity})
    if method == SYNCHRONOUS:
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


def dealt_evenly(folder: Path, clients: int) -> Path:
    """Return the installation's text dealt out evenly over some silos."""
    path, partition = folder / f"iid-{clients}", f"iid:{clients}"
    return prepared(path, VOCABULARY, SEQUENCE_LENGTH, partition=partition)


# --- the page ---------------------------------------------------------------------------------------


def of_cell(results: Sequence[dict[str, Any]], method: str, local_steps: int, clients: int) -> Iterator[Any]:
    return (
        one
        for one in results
        if (one["method"], one["local_steps"], one["clients"]) == (method, local_steps, clients)
    )


def tuned(results: Sequence[dict[str, Any]], method: str) -> float | None:
    """Return the rate with the lowest perplexity; None as long as the grid is not done."""
    runs = [one for one in of_cell(results, method, 16, 4) if one["seed"] == 0]
    if not {one["rate"] for one in runs} >= set(GRID):
        return None
    trained = [one for one in runs if one["perplexity"] is not None]
    return float(min(trained, key=lambda one: one["perplexity"])["rate"]) if trained else None


def reached(curve: Sequence[dict[str, float]], target: float, what: str) -> float | None:
    """Return tokens or bytes at which a curve first comes down to a perplexity, between two evaluations."""
    for before, after in itertools.pairwise(curve):
        if after["perplexity"] <= target:
            high, low = math.log(before["perplexity"]), math.log(after["perplexity"])
            share = 1.0 if high <= low else min(1.0, (high - math.log(target)) / (high - low))
            return before[what] + max(0.0, share) * (after[what] - before[what])
    return None


def write_page(folder: Path, output: Path) -> None:
    results = load(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Convergence: the figures",
        "",
        f"Written by `python scripts/bench/convergence.py table` from {len(results)} runs. What they mean is",
        "in [low communication](low-communication.md).",
        "",
        *rates_table(results),
    ]
    for local_steps in (16, 64):
        for clients in (4, 8):
            lines += cell_table(results, local_steps, clients)
    output.write_text("\n".join(lines) + "\n")
    plot(results, output.with_suffix(".svg"))
    print(f"{output}, {output.with_suffix('.svg')}: {len(results)} runs")


def rates_table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Tuning: perplexity by peak learning rate (H = 16, 4 clients, seed 0)"
    yield ""
    rates = (BEYOND[GRID[0]], *GRID, BEYOND[GRID[-1]])
    yield "| Method | " + " | ".join(f"{rate:g}" for rate in rates) + " |"
    yield "|---|" + "---:|" * len(rates)
    for method in METHODS:
        runs = {one["rate"]: one for one in of_cell(results, method, 16, 4) if one["seed"] == 0}
        cells = []
        for rate in rates:
            one = runs.get(rate)
            text = "–" if one is None else "diverged" if one["perplexity"] is None else None
            text = text or f"{runs[rate]['perplexity']:.1f}"
            cells.append(f"**{text}**" if rate == tuned(results, method) else text)
        yield f"| {method} | " + " | ".join(cells) + " |"
    yield ""


def cell_table(results: Sequence[dict[str, Any]], local_steps: int, clients: int) -> Iterator[str]:
    chosen = {}
    for method in METHODS:
        best = tuned(results, method)
        runs = [one for one in of_cell(results, method, local_steps, clients) if one["rate"] == best]
        if runs := [one for one in runs if one["perplexity"] is not None]:
            chosen[method] = runs
    if not chosen:
        return
    means = {method: statistics.fmean(one["perplexity"] for one in runs) for method, runs in chosen.items()}
    target = max(one["perplexity"] for runs in chosen.values() for one in runs)
    yield f"## H = {local_steps}, {clients} clients"
    yield ""
    yield f"Tokens and bytes up per client to perplexity {target:.1f}, the last that all runs reach."
    yield ""
    yield "| Method | Rate | Perplexity | Seeds | Bytes up per client | Tokens to it | Bytes to it |"
    yield "|---|---:|---:|---|---:|---:|---:|"
    for method, runs in sorted(chosen.items(), key=lambda item: means[item[0]]):
        every = ", ".join(f"{one['perplexity']:.1f}" for one in runs)
        total = statistics.fmean(one["curve"][-1]["bytes_up"] for one in runs)
        cells = [f"{runs[0]['rate']:g}", f"{means[method]:.2f}", every, f"{total / 1e6:.1f} MB"]
        for what, scale, unit in (("tokens", 1e3, "k"), ("bytes_up", 1e6, "MB")):
            found = [reached(one["curve"], target, what) for one in runs]
            known = [value for value in found if value is not None]
            cells.append(f"{statistics.fmean(known) / scale:.1f} {unit}" if len(known) == len(runs) else "–")
        yield f"| {method} | " + " | ".join(cells) + " |"
    yield ""


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw perplexity by tokens and by bytes for the cell that was tuned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, method in enumerate(METHODS):
        best = tuned(results, method)
        for one in of_cell(results, method, 16, 4):
            if one["rate"] != best or one["seed"] != 0:
                continue
            points = one["curve"][1:]
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--", "label": method}
            heights = [point["perplexity"] for point in points]
            axes[0].plot([point["tokens"] / 1e3 for point in points], heights, **style)
            axes[1].plot([point["bytes_up"] / 1e6 for point in points], heights, **style)
    for axis, label in zip(axes, ("tokens (thousands)", "bytes up per client (MB)"), strict=True):
        axis.set_xlabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[0].set_ylabel("validation perplexity")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def parse_arguments() -> argparse.Namespace:
    made, run = parsers(__doc__, folder="runs/convergence", output="docs/results/convergence.md")
    run.add_argument("--data", type=Path, default=Path(".photon/convergence"), help="folder of the text")
    return made.parse_args()


if __name__ == "__main__":
    main()
