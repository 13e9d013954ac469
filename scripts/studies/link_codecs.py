"""Validation perplexity over every preset of the link, at equal tokens, against that without codecs.

    python scripts/studies/link_codecs.py run --minutes 30    # go on with what is missing
    python scripts/studies/link_codecs.py table               # what there is, as a page of docs/results

Every run is a whole federation in this process, on text that the installation brings, dealt
out evenly. Its result is a line of a file; a run that has one is not done again, so the script may be stopped
at any time. The same seed draws the same weights and the same text, so that runs are compared in pairs. At a
high learning rate the smallest difference grows until a pair is as far apart as two seeds; the rate of
``--rate`` is low enough that it does not.
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

from results import Result, Results, Runs
from study import Study
from tables import table
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

#: The decays of the DES-LOC paper.
ADAM = "optimizer.betas=[0.95,0.95]"
TOPK = "link.uplink=[{{_target_: photon.link.codecs.TopK, k: {}, chunk: {}}}, {{_target_: {}}}]"
TWO_BIT = "photon.link.codecs.TwoBit"
SIGN = "photon.link.codecs.Sign"
#: Overrides by name: the presets, and what was tried in their place.
LINKS = {
    "dense": ["link=dense"],
    "int8": ["link=int8"],
    "int4": ["link=int4"],
    "e3m0": ["link=e3m0"],
    "e3m0, blocks of 256": ["link=e3m0", "link.uplink=[{_target_: photon.link.codecs.E3M0, block: 256}]"],
    "sparseloco": ["link=sparseloco"],
    "top64of4096": ["link=top64of4096"],
    "two-bit": ["link=two-bit"],
    "top1of32": ["link=top1of32"],
    "hundredth": ["link=topk-100x"],
    "1 of 24, two bits": ["link=top1of32", TOPK.format(1, 24, TWO_BIT)],
    "1 of 16, sign": ["link=top1of32", TOPK.format(1, 16, SIGN)],
    "1 of 16, sign, one scale": ["link=top1of32", TOPK.format(1, 16, f"{SIGN}, block: 1048576")],
    "1 of 4 drawn, sign": [
        "link=top1of32",
        "link.uplink=[{_target_: photon.link.codecs.RandomK, stride: 4, scaled: false},"
        " {_target_: photon.link.codecs.Sign, block: 512}]",
    ],
    "bf16": ["link=bf16"],
    "fp8": ["link=fp8"],
    "topk": ["link=topk"],
    "sign": ["link=sign"],
    "powersgd": ["link=powersgd"],
}
#: The second is what DiLoCo's outer optimizer serves best with in so few rounds.
RECIPES = {
    "Photon": ["strategy=photon", ADAM],
    "DiLoCo": ["strategy=diloco", "outer.lr=0.4", ADAM],
    "DiLoCo, outer 0.7": ["strategy=diloco", ADAM],
    "DiLoCo, outer 0.2": ["strategy=diloco", "outer.lr=0.2", ADAM],
    "DiLoCo, outer 0.1": ["strategy=diloco", "outer.lr=0.1", ADAM],
    "Photon, β 0.8 / 0.99": ["strategy=photon", QUICK],
    "Photon, Muon": MUON,
    # What might help sparse updates to keep up.
    "Photon, rate to zero": ["strategy=photon", ADAM, "schedule.final_fraction=0.0"],
    "Photon, outer 1.3": ["strategy=photon", ADAM, "outer.lr=1.3"],
    "Photon, outer momentum 0.3": ["strategy=photon", ADAM, "outer=fedmom", "outer.momentum=0.3"],
}
#: So many that the same model's perplexity would hardly be another with other ones.
EVALUATED = 768
#: Figures that tell runs apart in which the codec and the seed alone differ.
CELL = ("recipe", "rate", "steps", "local_steps", "silos", "batch")
COLUMNS = [
    "`link=`",
    "Seeds",
    "Perplexity",
    "Against dense",
    "Worst seed",
    "Bits a parameter up",
    "Payload, of float32",
    "Bytes up",
]


def run_missing(runs: Runs, arguments: argparse.Namespace) -> None:
    for seed, recipe, local_steps, link in itertools.product(
        arguments.seeds, arguments.recipes, arguments.local_steps, arguments.links
    ):
        run = Run(
            recipe, link, arguments.rate, arguments.steps, local_steps, seed, arguments.silos, arguments.batch
        )
        runs.once(run.name, partial(train, run, arguments.data))


@dataclass(frozen=True)
class Run:
    """What one run does; ``steps`` are those of a silo in all, ``local_steps`` those of a round.

    ``batch`` counts the sequences of a step.
    """

    recipe: str
    link: str
    rate: float
    steps: int
    local_steps: int
    seed: int
    silos: int
    batch: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return (
            f"{self.recipe}-{self.link}-lr{self.rate:g}-{self.steps}-H{self.local_steps}"
            f"-N{self.silos}-B{self.batch}-seed{self.seed}"
        )


def train(run: Run, data: Path) -> Result:
    rounds = run.steps // run.local_steps
    overrides = [
        *SETTINGS,
        *RECIPES[run.recipe],
        *LINKS[run.link],
        f"optimizer.lr={run.rate}",
        f"data.path={dealt_evenly(data, run.silos)}",
        f"cohort={run.silos}",
        f"local_steps={run.local_steps}",
        f"training.batch_size={run.batch}",
        f"rounds={rounds}",
        f"evaluation.every={rounds}",
        f"evaluation.sequences={EVALUATED}",
        f"seed={run.seed}",
    ]
    with temporary_folder() as run_dir:
        summary = federate(overrides, run_dir)
    replies = rounds * run.silos
    result: Result = {**asdict(run), "perplexity": summary and summary["perplexity"]["final"]}
    if summary:
        sent = summary["bytes"]
        result["parameters"] = summary["parameters"]
        result["payload_up"] = sent["per_group"]["params"]["up"] / replies
        result["bytes_up"] = sum(one["up"] for one in sent["per_silo"].values()) / replies
        result["bytes_down"] = sum(one["down"] for one in sent["per_silo"].values()) / replies
    return result


# --- the page ---------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[str]:
    cells: dict[tuple[Any, ...], list[Result]] = {}
    for one in results:
        cells.setdefault(tuple(one[key] for key in CELL), []).append(one)
    for cell in sorted(cells, key=lambda cell: (*cell[1:], list(RECIPES).index(cell[0]))):
        yield from cell_table(cells[cell])


def cell_table(results: Results) -> Iterator[str]:
    """Give a row to each link; the results differ in that and the seed alone."""
    dense = {one["seed"]: one["perplexity"] for one in results if one["link"] == "dense"}
    recipe, rate, steps, local_steps, silos, batch = (results[0][key] for key in CELL)
    yield (
        f"## {recipe}, {silos} silos, H = {local_steps}, {steps // local_steps} rounds, "
        f"batch {batch} × {SEQUENCE_LENGTH}, peak rate {rate:g}"
    )
    yield ""
    rows = []
    for link in LINKS:
        runs = [one for one in results if one["link"] == link and (one["seed"] in dense or not dense)]
        if not runs:
            continue
        row = [link, str(len(runs))]
        if all(one["perplexity"] for one in runs):
            bits = 8 * runs[0]["payload_up"] / runs[0]["parameters"]
            row += [
                f"{statistics.geometric_mean(one['perplexity'] for one in runs):.2f}",
                *against([math.log(one["perplexity"] / dense[one["seed"]]) for one in runs if dense]),
                f"{bits:.3f}",
                f"1/{32 / bits:.1f}",
                f"{runs[0]['bytes_up']:,.0f}",
            ]
        else:
            row += ["diverged", *[""] * 5]
        rows.append(row)
    yield from table(COLUMNS, rows)


def against(ratios: Sequence[float]) -> tuple[str, str]:
    """Return the mean of log-ratios with its standard error, and the largest, as changes in percent."""
    if not any(ratios):
        return "", ""
    mean, error = math.exp(statistics.fmean(ratios)), ""
    if len(ratios) > 1:
        error = f" ± {100 * mean * statistics.stdev(ratios) / math.sqrt(len(ratios)):.2f}"
    return f"{100 * (mean - 1):+.2f}{error} %", f"{100 * math.expm1(max(ratios)):+.2f} %"


def add_options(run: argparse.ArgumentParser) -> None:
    add_data(run)
    run.add_argument("--links", nargs="+", choices=list(LINKS), default=list(LINKS))
    run.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES)[:2])
    run.add_argument("--rate", type=float, default=0.002, help="peak learning rate")
    run.add_argument("--steps", type=int, default=256, help="local steps of each silo in a run")
    run.add_argument("--local-steps", nargs="+", type=int, default=[16, 64], help="of a round")
    run.add_argument("--silos", type=int, default=2)
    run.add_argument("--batch", type=int, default=BATCH, help="sequences of a local step")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])


ABOUT = (
    "*Against dense* is the perplexity divided by that of `link=dense` with the same seed, less one: the "
    "geometric mean over seeds with its standard error, and the worst seed. Bytes are those of one reply; "
    "the payload is what the tensors take, the rest are names, encodings, request and report. What they mean "
    "is in [the link](../link.md#on-text)."
)
STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/link.md",
    title="Codecs on text: the figures",
    about=lambda _: ABOUT,
    run=run_missing,
    sections=sections,
    options=add_options,
)

if __name__ == "__main__":
    STUDY.main()
