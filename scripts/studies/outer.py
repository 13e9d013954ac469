"""DiLoCo, Streaming DiLoCo and MuLoCo, each tuned in outer momentum, outer rate and local rate alike.

    python scripts/studies/outer.py run --minutes 45       # go on with what is missing
    python scripts/studies/outer.py table                  # docs/results/outer.md

Every run is a whole federation in this process, as those of `convergence.py` are. A method's search begins at
one point of a grid and tries the neighbours of the best known point: one step of an axis, or one step up of
one with one down of another. It ends when all twelve are worse; the grid is the same for all. The two best
points of a search, which has seed 0, are run with two other seeds, since a rate may suit one seed and not the
next, and the better mean counts; its neighbours are tried, too. It is then run with 8 silos, on silos of one
domain each, at other periods, and with a larger model.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from convergence import Cell, reached, train
from results import Result, Results, Runs
from study import Study
from tables import by_rate, percent, perplexity, table
from text import MUON, QUICK, SEQUENCE_LENGTH, VOCABULARY, add_data, dealt_evenly, prepared

RATES = (0.001, 0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008, 0.0112, 0.016, 0.0224, 0.032, 0.045, 0.064)
MOMENTA = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
OUTER = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
AXES: tuple[tuple[float, ...], ...] = (RATES, MOMENTA, OUTER)
#: Steps along the axes to a point's neighbours.
MOVES = (
    *((-1, 0, 0), (1, 0, 0), (0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0)),
    *((0, -1, 1), (0, 1, -1), (-1, 0, 1), (1, 0, -1), (-1, 1, 0), (1, -1, 0)),
)
TUNING = Cell(16, 4, 0)


@dataclass(frozen=True)
class Point:
    """Where a method is run: the peak local rate, and momentum and rate of the outer step if it has one."""

    rate: float
    momentum: float | None = None
    outer: float | None = None

    @property
    def name(self) -> str:
        """How lines and tables call it."""
        step = "" if self.momentum is None else f"m{self.momentum:g}-o{self.outer:g}-"
        return f"{step}lr{self.rate:g}"

    def overrides(self) -> list[str]:
        """Return the outer step's; the local rate is given by itself."""
        if self.momentum is None:
            return []
        nesterov = [] if self.momentum else ["outer.nesterov=false"]
        return [f"outer.momentum={self.momentum:g}", f"outer.lr={self.outer:g}", *nesterov]


@dataclass(frozen=True)
class Method:
    """Overrides of a method, and where its search begins."""

    overrides: Sequence[str]
    start: Point


@dataclass(frozen=True)
class Place:
    """What tuned methods are compared at: a cell of which the seed is any, the text, and more overrides."""

    title: str
    cell: Cell
    seeds: Sequence[int]
    text: str = "iid"
    overrides: Sequence[str] = ()


DILOCO = ["strategy=diloco", QUICK]
MULOCO = ["strategy=diloco", *MUON[1:]]
#: What is averaged with the parameters, and a schedule and decay that suit it.
AVERAGED = [
    *MULOCO,
    "strategy.local_state=sync",
    "optimizer.momentum=0.8",
    "schedule.final_fraction=0.3",
]
TWO_BITS = ["link=int4", "link.uplink=[{_target_: photon.link.codecs.TwoBit}]"]
SEARCHED = {
    "DiLoCo": Method(DILOCO, Point(0.0056, 0.5, 0.7)),
    "MuLoCo": Method(MULOCO, Point(0.016, 0.5, 0.7)),
    "MuLoCo, averaged": Method(AVERAGED, Point(0.016, 0.5, 0.7)),
    "Streaming DiLoCo, 2 fragments": Method(
        ["strategy=streaming-diloco", "strategy.fragments=2", QUICK], Point(0.0056, 0.7, 0.7)
    ),
    "synchronous Muon": Method(["strategy=centralized", *MUON[1:]], Point(0.016)),
}
#: Plain averaging at the rate that `convergence.py` has found.
METHODS = {**SEARCHED, "FedAvg": Method(["strategy=photon", QUICK], Point(0.008))}
PLACES = {
    "iid": Place("4 silos, the text dealt out evenly", TUNING, (0, 1, 2)),
    "iid-8": Place("8 silos, the text dealt out evenly", Cell(16, 8, 0), (0,)),
    "domains": Place("4 silos, one domain each", TUNING, (0, 1, 2), "domains"),
    "period-8": Place("4 silos, the text dealt out evenly, H = 8", Cell(8, 4, 0), (0,)),
    "period-64": Place("4 silos, the text dealt out evenly, H = 64", Cell(64, 4, 0), (0,)),
    "half": Place("4 silos, the text dealt out evenly, 192 steps", Cell(16, 4, 0, 192), (0,)),
    "large": Place(
        "4 silos, 2.6 million parameters, 192 steps",
        Cell(16, 4, 0, 192),
        (0,),
        overrides=[
            "model.architecture.n_layer=4",
            "model.architecture.n_embd=224",
            "model.architecture.n_head=4",
        ],
    ),
}
#: At the tuned point with seed 0, in place of what the method has.
VARIATIONS = {
    "MuLoCo": [
        [QUICK],
        ["optimizer.momentum=0.95"],
        ["schedule.final_fraction=0.0"],
        ["strategy.local_state=sync"],
        ["strategy.local_state=sync", "optimizer.momentum=0.95"],
        ["strategy.local_state=sync", "optimizer.momentum=0.8"],
        ["strategy.local_state=sync", "schedule.final_fraction=0.3"],
        ["strategy.local_state=sync", "schedule.final_fraction=0.5"],
        ["schedule.final_fraction=0.3"],
        TWO_BITS,
    ],
    "MuLoCo, averaged": [
        [QUICK],
        ["model.recipe.warmup_steps=16"],
        ["optimizer.weight_decay=0.1"],
        TWO_BITS,
        ["optimizer.momentum=0.7"],
        ["optimizer.momentum=0.9"],
        ["schedule.final_fraction=0.2"],
        # Synchronous until the rate has warmed up, and longer.
        ["transition=synchronous", "transition.step=32", "rounds=54"],
        ["transition=synchronous", "transition.step=96", "rounds=114"],
        ["transition=synchronous", "transition.step=96", "transition.local_steps=4", "rounds=42"],
    ],
    "DiLoCo": [["schedule.final_fraction=0.3"], ["strategy.local_state=sync"]],
    "synchronous Muon": [["optimizer.momentum=0.8", "schedule.final_fraction=0.3"]],
}


def begun(steps: int, local_steps: int) -> list[str]:
    """Return what gives shorter rounds to the first steps of a run at half of the steps."""
    cell = PLACES["half"].cell
    rounds = steps // local_steps + (cell.steps - steps) // cell.local_steps
    settings = [f"transition.step={steps}", f"transition.local_steps={local_steps}", f"rounds={rounds}"]
    return [QUICK, "transition=synchronous", *settings]


#: At half of the steps: what is to end where DiLoCo does with all of them, at the best point of those tried.
HALF = [begun(96, 4), begun(96, 2), begun(128, 4)]
HALF_POINT = Point(0.0224, 0.7, 0.7)


# --- what is run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run: a method or one of its variations, and where it is run."""

    method: str
    variation: tuple[str, ...]
    place: str
    seed: int
    point: Point

    @property
    def name(self) -> str:
        """Name of its line."""
        cell = PLACES[self.place].cell
        where = f"H{cell.local_steps}-N{cell.clients}-seed{self.seed}-T{cell.steps}-{self.place}"
        return f"{'; '.join([self.method, *self.variation])}-{self.point.name}-{where}"

    def train(self, data: Path) -> Result:
        """Do it."""
        place = PLACES[self.place]
        overrides = [*METHODS[self.method].overrides, *self.variation, *place.overrides]
        done = train(
            partial(text_of, data, place),
            self.method,
            [*overrides, *self.point.overrides()],
            replace(place.cell, seed=self.seed),
            self.point.rate,
        )
        return {**done, **asdict(self.point), "variation": list(self.variation), "place": self.place}


def text_of(data: Path, place: Place) -> Path:
    """Return the place's text: dealt out evenly, or one domain to a silo."""
    if place.text == "domains":
        return prepared(data / "by-source", VOCABULARY, SEQUENCE_LENGTH)
    return dealt_evenly(data, place.cell.clients)


def run_missing(runs: Runs, arguments: Namespace) -> None:
    """Do what the plan has and has no line, and plan again with what it has found."""
    done = -1
    while len(results := runs.results()) > done:
        done = len(results)
        for run in plan(results):
            runs.once(run.name, partial(run.train, arguments.data))


def plan(results: Results) -> Iterator[Run]:
    """Yield what there is to run, by worth, as far as it is known: searches first."""
    for method in SEARCHED:
        yield Run(method, (), "iid", 0, next_point(results, method))
    points = {method: point for method in METHODS if (point := tuned(results, method))}
    for method in points:
        yield from confirm(results, method)
    for method, variations in VARIATIONS.items():
        for variation in variations if method in points else ():
            yield Run(method, tuple(variation), "iid", 0, points[method])
    for variation in HALF:
        for seed in PLACES["iid"].seeds:
            yield Run("MuLoCo, averaged", tuple(variation), "half", seed, HALF_POINT)
    for seeds in zip_longest(*(place.seeds for place in PLACES.values())):
        for name, seed in zip(PLACES, seeds, strict=True):
            for method in points if seed is not None else ():
                best = winner(results, method)
                if best is None:
                    continue
                for rate in rates_of(name, best.rate):
                    yield Run(method, (), name, seed, replace(best, rate=rate))


def confirm(results: Results, method: str) -> Iterator[Run]:
    """Yield the finalists of a search with the other seeds, and the neighbours of the one that wins."""
    for point in finalists(results, method):
        for seed in PLACES["iid"].seeds[1:]:
            yield Run(method, (), "iid", seed, point)
    best = winner(results, method)
    for point in neighbours(best) if best and method in SEARCHED else ():
        yield Run(method, (), "iid", 0, point)


def rates_of(place: str, rate: float) -> list[float]:
    """Return the rates to try at a place, by the one that is best where methods are tuned.

    Longer rounds and wider models want lower ones.
    """
    lower = {"large": (0, 2, 4), "period-64": (0, 1)}.get(place, (0,))
    return [RATES[RATES.index(rate) - steps] for steps in lower]


# --- the search ------------------------------------------------------------------------------------


def tried(results: Results, method: str) -> dict[Point, float]:
    """Return the perplexity at each point where a method is tuned, infinite where the run diverged."""
    return {
        point_of(one): one["perplexity"] or math.inf
        for one in results
        if (one["method"], one["variation"], one["place"], one["seed"]) == (method, [], "iid", 0)
    }


def next_point(results: Results, method: str) -> Point:
    """Return the point to try next; when nothing is left to try, the best."""
    known = tried(results, method)
    if not known:
        return METHODS[method].start
    best = min(known, key=lambda point: known[point])
    return next((point for point in neighbours(best) if point not in known), best)


def tuned(results: Results, method: str) -> Point | None:
    """Return the best point of a method; None as long as one of its neighbours has to be tried."""
    if method not in SEARCHED:
        return METHODS[method].start
    point = next_point(results, method)
    return point if point in tried(results, method) else None


def finalists(results: Results, method: str) -> list[Point]:
    """Return the two best points of a method's search."""
    known = tried(results, method) or {METHODS[method].start: math.inf}
    return sorted(known, key=lambda point: known[point])[:2]


def winner(results: Results, method: str) -> Point | None:
    """Return the point whose mean over seeds is best; None as long as one of two has no line of some seed."""
    means = {}
    for point in finalists(results, method):
        found = {
            one["seed"]: one["perplexity"] or math.inf
            for one in results
            if (one["method"], one["variation"], one["place"], point_of(one)) == (method, [], "iid", point)
        }
        if len(found) < len(PLACES["iid"].seeds):
            return None
        means[point] = statistics.fmean(found.values())
    return min(means, key=lambda point: means[point])


def point_of(one: Result) -> Point:
    return Point(one["rate"], one["momentum"], one["outer"])


def neighbours(point: Point) -> Iterator[Point]:
    """Yield the points one move away that lie on the grid; a method without an outer step has rates alone."""
    values = (point.rate, point.momentum, point.outer)
    for move in MOVES:
        moved: list[float | None] = []
        for axis, value, step in zip(AXES, values, move, strict=True):
            place = None if value is None else axis.index(value) + step
            moved.append(axis[place] if place is not None and 0 <= place < len(axis) else None)
        rate, *step_of = moved
        fits = [one is None for one in step_of] == [one is None for one in values[1:]]
        if rate is not None and fits and (found := Point(rate, *step_of)) != point:
            yield found


# --- the page --------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[str]:
    yield "## Tuning: 4 silos, H = 16, 384 steps, seed 0"
    yield ""
    for method in SEARCHED:
        yield from search_table(results, method)
    for name in PLACES:
        if name != "half":
            yield from place_table(results, name)
    yield from half_table(results)
    yield from variations_table(results)


def search_table(results: Results, method: str) -> Iterator[str]:
    """Give a row to each outer step, and a column to each rate."""
    known = tried(results, method)
    if not known:
        return
    best = min(known, key=lambda point: known[point])
    yield f"### {method}"
    yield ""
    if tuned(results, method) is None:
        yield "Not finished: a neighbour of the best point has no line yet."
        yield ""
    rates = sorted({point.rate for point in known})
    rows = []
    for step in sorted({(point.momentum, point.outer) for point in known}, key=str):
        texts = {p.rate: perplexity(known[p]) for p in known if (p.momentum, p.outer) == step}
        own = best.rate if step == (best.momentum, best.outer) else None
        label = "none" if step[0] is None else f"momentum {step[0]:g}, rate {step[1]:g}"
        rows.append([label, *by_rate(texts, rates, own)])
    yield from table(["Outer step", *(f"{rate:g}" for rate in rates)], rows)


def chosen(results: Results, place: str) -> dict[str, list[Result]]:
    """Return by method the runs at a place, of all seeds, at the point of the best mean over most seeds."""
    found: dict[str, list[Result]] = {}
    for method in METHODS:
        points: dict[Point, list[Result]] = {}
        for one in results:
            at = (one["method"], one["place"], one["variation"])
            if at == (method, place, []) and one["perplexity"]:
                points.setdefault(point_of(one), []).append(one)
        if points:
            found[method] = min(points.values(), key=lambda runs: (-len(runs), mean_of(runs)))
    return found


def mean_of(runs: Sequence[Result]) -> float:
    return statistics.fmean(one["perplexity"] for one in runs)


def place_table(results: Results, name: str) -> Iterator[str]:
    """Compare the tuned methods; tokens are those to where DiLoCo ends, as a share of all."""
    found, place = chosen(results, name), PLACES[name]
    if not found:
        return
    yield f"## {place.title}"
    yield ""
    target = mean_of(found["DiLoCo"]) if "DiLoCo" in found else None
    rows = []
    for method, runs in sorted(found.items(), key=lambda item: mean_of(item[1])):
        every = ", ".join(perplexity(one["perplexity"]) for one in sorted(runs, key=lambda one: one["seed"]))
        up = statistics.fmean(one["curve"][-1]["bytes_up"] for one in runs) / 1e6
        at = [step_of(runs[0]), f"{runs[0]['rate']:g}"]
        cells = [method, *at, f"{mean_of(runs):.2f}", every, f"{up:.1f} MB"]
        rows.append([*cells, share_to(target, runs)])
    columns = ["Method", "Momentum, outer rate", "Rate", "Perplexity", "Seeds 0, 1, …", "Bytes up per silo"]
    yield from table([*columns, "Tokens to DiLoCo's"], rows, left=(0, 4))


def share_to(target: float | None, runs: Sequence[Result]) -> str:
    """Return the mean share of a run's tokens after which it is at a perplexity."""
    if target is None:
        return "–"
    needed = [reached(one["curve"], target, "tokens") for one in runs]
    shares = [
        tokens / one["curve"][-1]["tokens"]
        for tokens, one in zip(needed, runs, strict=True)
        if tokens is not None
    ]
    return percent(statistics.fmean(shares)) if len(shares) == len(runs) else "–"


def half_table(results: Results) -> Iterator[str]:
    """List what was tried at half of the steps, the best mean of three seeds first."""
    groups: dict[tuple[str, str, Point], list[Result]] = {}
    for one in results:
        if one["place"] == "half":
            key = (one["method"], " ".join(one["variation"]), point_of(one))
            groups.setdefault(key, []).append(one)
    rows = [
        [
            method,
            f"`{changed}`" if changed else "",
            step_of(runs[0]),
            f"{point.rate:g}",
            f"{mean_of(runs):.2f}",
            ", ".join(perplexity(one["perplexity"]) for one in sorted(runs, key=lambda one: one["seed"])),
            f"{statistics.fmean(one['curve'][-1]['bytes_up'] for one in runs) / 1e6:.1f} MB",
        ]
        for (method, changed, point), runs in sorted(
            groups.items(), key=lambda item: (-len(item[1]), mean_of(item[1]))
        )
    ]
    if rows:
        yield "## Half of the steps: 4 silos, the text dealt out evenly"
        yield ""
        columns = [
            "Method",
            "Changed",
            "Momentum, outer rate",
            "Rate",
            "Perplexity",
            "Seeds",
            "Bytes up per silo",
        ]
        yield from table(columns, rows, left=(0, 1, 5))


def variations_table(results: Results) -> Iterator[str]:
    """List what was changed of a method, and what came of it."""
    rows = [
        [
            one["method"],
            f"`{' '.join(one['variation'])}`",
            step_of(one),
            f"{one['rate']:g}",
            str(one["steps"]),
            str(one["seed"]),
            perplexity(one["perplexity"], 2),
        ]
        for one in sorted(results, key=lambda one: (one["method"], one["variation"], one["run"]))
        if one["variation"] and one["place"] != "half"
    ]
    if rows:
        yield "## Variations: 4 silos, H = 16"
        yield ""
        yield "Options that begin with `+` were tried, and are not in the repository."
        yield ""
        columns = ["Method", "Changed", "Momentum, outer rate", "Rate", "Steps", "Seed", "Perplexity"]
        yield from table(columns, rows, left=(0, 1))


def step_of(one: Result) -> str:
    return "–" if one["momentum"] is None else f"{one['momentum']:g}, {one['outer']:g}"


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/outer.md",
    title="Outer momentum: the figures",
    about=lambda _: "What they mean is in [low communication](low-communication.md).",
    run=run_missing,
    sections=sections,
    options=add_data,
)

if __name__ == "__main__":
    STUDY.main()
