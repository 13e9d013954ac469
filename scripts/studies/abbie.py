"""AbbIE against plain models on real text: trained at two iterations, tried at one, two, four and eight.

    python scripts/studies/abbie.py run --minutes 45       # go on with what is missing
    python scripts/studies/abbie.py table                  # docs/results/abbie.md

Every run is a whole federation in this process, on text that the installation brings, dealt out evenly. The
models that iterate have four blocks, of which the middle two are the body. The plain ones have as many
parameters (the same blocks), operations (the same blocks, trained on more text) or applied blocks (two more).
The peak learning rate of each is tuned on seed 0: the middle three of a row of rates a factor √2 apart, then
the neighbours of the best until the best has a worse one on both sides.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import Result, Results, Runs, tuned_rate, untried_rates
from study import Study
from tables import by_rate, percent, perplexity, table
from text import (
    QUICK,
    SEQUENCE_LENGTH,
    SETTINGS,
    VOCABULARY,
    add_data,
    dealt_evenly,
    federate,
    temporary_folder,
)

if TYPE_CHECKING:
    from photon.config.schema import ModelSection

SILOS = 4
LOCAL_STEPS = 16
STEPS = 384
SEEDS = (0, 1, 2)
RATES = (0.0014, 0.002, 0.0028, 0.004, 0.0056, 0.008, 0.0112, 0.016, 0.0224)
ITERATIONS = (1, 2, 4, 8)
BLOCKS, BODY = 4, 2
#: Sequences of each silo's validation text, as of all studies.
SEQUENCES = 96


def iterating(variant: str, mode: str = "inter") -> list[str]:
    parts = f"head_blocks: 1, body_blocks: {BODY}, tail_blocks: 1"
    return [f"model.abbie={{{parts}, variant: {variant}, residual_mode: {mode}}}"]


#: Model to overrides.
MODELS = {
    "AbbIE-D": iterating("D"),
    "AbbIE-D, post": iterating("D", "post"),
    "AbbIE-D, input": iterating("D", "input"),
    "AbbIE-C": iterating("C"),
    "plain, equal parameters": [],
    "plain, equal operations": [],
    "plain, equal depth": [f"model.architecture.n_layer={BLOCKS + BODY}"],
}
#: How they are trained, and which of them.
SPARSE_BODY = [
    "strategy=sparsyfed",
    "strategy.sparsity=0.8",
    f"strategy.layers=['\\.h\\.({'|'.join(str(1 + block) for block in range(BODY))})\\.(attn|mlp)']",
]
METHODS = {
    "Photon": ["strategy=photon"],
    "DiLoCo": ["strategy=diloco", "outer.momentum=0.5"],
    "SparsyFed on the body": SPARSE_BODY,
}
#: Those that are trained by every method.
FEDERATED = ("AbbIE-D", "plain, equal parameters")


@dataclass(frozen=True)
class Case:
    """What one run does."""

    model: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return f"{self.model}; {self.method}-lr{self.rate:g}-seed{self.seed}"


def settings_of(case: Case) -> list[str]:
    """Return the overrides of a run, but for its text, its steps and its length."""
    own = [
        *SETTINGS,
        f"model.architecture.n_layer={BLOCKS}",
        *MODELS[case.model],
        QUICK,
        *METHODS[case.method],
    ]
    # The last of several values of a key counts.
    own = list({override.partition("=")[0]: override for override in own}.values())
    return [*own, f"optimizer.lr={case.rate:g}", f"seed={case.seed}"]


def train(data: Path, case: Case) -> Result:
    from photon.evaluation.load import open_trained
    from photon.models.build import parameter_count

    path = dealt_evenly(data, SILOS)
    steps = steps_of(case.model)
    settings = [
        *settings_of(case),
        f"data.path={path}",
        f"cohort={SILOS}",
        f"local_steps={LOCAL_STEPS}",
        f"rounds={steps // LOCAL_STEPS}",
        f"evaluation.every={steps // LOCAL_STEPS}",
        f"schedule.steps={steps}",
    ]
    done: Result = {**asdict(case), "steps": steps, "operations_per_token": operations(case.model)}
    with temporary_folder() as run_dir:
        summary = federate(settings, run_dir)
        if summary is None:
            return {**done, "perplexity": None, "sweep": {}, "angles": {}}
        model = open_trained(run_dir).model
    return {
        **done,
        "parameters": parameter_count(model),
        "tokens": summary["tokens"],
        "bytes_up": summary["bytes"]["up"],
        "perplexity": summary["perplexity"]["final"],
        **swept(model, path),
    }


def swept(model: Any, path: Path) -> dict[str, dict[str, float]]:
    """Return the perplexity, and the angle of the last pass, by iterations; nothing of a plain model."""
    from photon.data.prepared import PreparedData
    from photon.evaluation.iterations import evaluate_iterations
    from photon.evaluation.perplexity import overall
    from photon.models.abbie import body_of

    if not body_of(model):
        return {"sweep": {}, "angles": {}}
    found = evaluate_iterations(
        model,
        PreparedData.open(path),
        ITERATIONS,
        batch_size=32,
        device="cpu",
        precision="fp32",
        limit=SEQUENCES,
    )
    return {
        "sweep": {str(r): overall(one.scores).perplexity for r, one in found.items()},
        "angles": {str(r): one.angle for r, one in found.items()},
    }


def steps_of(model: str) -> int:
    """Return the local steps of a run: where operations are equal, those that they allow."""
    if model != "plain, equal operations":
        return STEPS
    share = operations("AbbIE-D") / operations(model)
    return round(STEPS * share / LOCAL_STEPS) * LOCAL_STEPS


def operations(model: str) -> float:
    """Return the floating-point operations of training on one token."""
    from photon.models.build import build_model
    from photon.models.flops import model_flops_per_token

    built = build_model(section_of(model), VOCABULARY, seed=0, device="meta")
    return model_flops_per_token(built, SEQUENCE_LENGTH)


def section_of(model: str) -> "ModelSection":
    from photon.config.compose import compose

    return compose(settings_of(Case(model, "Photon", RATES[0], 0))).model


# --- what is run -----------------------------------------------------------------------------------


def run_missing(runs: Runs, arguments: Namespace) -> None:
    """Do what the plan has and has no line, and plan again with what it has found."""
    done = -1
    while len(results := runs.results()) > done:
        done = len(results)
        for case in plan(results):
            runs.once(case.name, partial(train, arguments.data, case))


def pairs() -> Iterator[tuple[str, str]]:
    """Yield what is tuned: each model under Photon, and some under every method."""
    for method in METHODS:
        for model in MODELS:
            if method == "Photon" or model in FEDERATED:
                yield model, method


def plan(results: Results) -> Iterator[Case]:
    """Yield what there is to run, by worth, as far as it is known."""
    for model, method in pairs():
        yield from search(results, model, method)
    for seed in SEEDS[1:]:
        for model, method in pairs():
            rate = tuned(results, model, method)
            if rate is not None:
                yield Case(model, method, rate, seed)


def tried(results: Results, model: str, method: str) -> dict[float, float]:
    """Return the perplexity by rate where rates are tuned, infinite where the run diverged."""
    return {
        one["rate"]: one["perplexity"] or math.inf
        for one in results
        if (one["model"], one["method"], one["seed"]) == (model, method, SEEDS[0])
    }


def search(results: Results, model: str, method: str) -> Iterator[Case]:
    """Yield the middle three rates, then those beside the best."""
    for rate in untried_rates(tried(results, model, method), RATES):
        yield Case(model, method, rate, SEEDS[0])


def tuned(results: Results, model: str, method: str) -> float | None:
    """Return the best rate; None as long as one beside it has to be tried."""
    return tuned_rate(tried(results, model, method), RATES)


# --- the page --------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[str]:
    yield from rates_table(results)
    for method in METHODS:
        yield from models_table(results, method)
        yield from iterations_table(results, method)
    yield from angles_table(results)


def runs_of(results: Results, model: str, method: str) -> list[Result]:
    """Return the runs at the best rate, by seed."""
    rate = tuned(results, model, method)
    found = [one for one in results if (one["model"], one["method"], one["rate"]) == (model, method, rate)]
    return sorted((one for one in found if one["perplexity"]), key=lambda one: one["seed"])


def rates_table(results: Results) -> Iterator[str]:
    """Give a row to each model and method."""
    rates = sorted({one["rate"] for one in results})
    rows = []
    for model, method in pairs():
        if known := tried(results, model, method):
            texts = {rate: perplexity(value) for rate, value in known.items()}
            best = min(known, key=lambda rate: known[rate])
            rows.append([model, method, *by_rate(texts, rates, best)])
    yield f"## Tuning: perplexity by peak rate, seed {SEEDS[0]}"
    yield ""
    yield from table(["Model", "Method", *(f"{rate:g}" for rate in rates)], rows, left=(0, 1))


def models_table(results: Results, method: str) -> Iterator[str]:
    """Compare the models of a method, each at its best rate and at its own number of iterations."""
    rows = []
    for model in MODELS:
        if runs := runs_of(results, model, method):
            each = ", ".join(perplexity(one["perplexity"]) for one in runs)
            cost = sum(one["operations_per_token"] * one["tokens"] for one in runs) / len(runs)
            mean = statistics.fmean(one["perplexity"] for one in runs)
            cells = [f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}", f"{cost / 1e12:.2f}"]
            up = f"{runs[0]['bytes_up'] / 1e6:.1f} MB"
            rows.append([model, f"{runs[0]['rate']:g}", f"{mean:.2f}", each, *cells, up])
    if rows:
        yield f"## {method}: as trained"
        yield ""
        columns = [
            "Model",
            "Rate",
            "Perplexity",
            "Seeds 0, 1, …",
            "Parameters",
            "Tokens",
            "Teraflop",
            "Bytes up",
        ]
        yield from table(columns, rows, left=(0, 3))


def iterations_table(results: Results, method: str) -> Iterator[str]:
    """Say what more or fewer iterations than in training come to."""
    rows = []
    for model in MODELS:
        runs = [one for one in runs_of(results, model, method) if one["sweep"]]
        if runs:
            changes = changes_of(runs)
            rows.append([model, *(f"{mean:.2f}" for mean in means(runs, "sweep").values()), *changes])
    if rows:
        yield f"## {method}: perplexity by iterations"
        yield ""
        yield "Means over the seeds; the change from r = 2 is of each seed, smallest and largest."
        yield ""
        changed = [f"r = 2 to {r}" for r in ITERATIONS if r > 2]
        yield from table(["Model", *(f"r = {r}" for r in ITERATIONS), *changed], rows)


def means(runs: Sequence[Result], what: str) -> dict[int, float]:
    return {r: statistics.fmean(one[what][str(r)] for one in runs) for r in ITERATIONS}


def changes_of(runs: Sequence[Result]) -> list[str]:
    """Return by how much iterations beyond two change the perplexity of each seed, from … to …."""
    told = []
    for r in ITERATIONS:
        if r > 2:
            changes = [one["sweep"][str(r)] / one["sweep"]["2"] - 1 for one in runs]
            told.append(f"{percent(min(changes), 1, '+')} … {percent(max(changes), 1, '+')}")
    return told


def angles_table(results: Results) -> Iterator[str]:
    """Say how the state turns in the last pass."""
    rows = []
    for model in MODELS:
        runs = [one for one in runs_of(results, model, "Photon") if one["angles"]]
        if runs:
            rows.append([model, *(f"{mean:.3f}" for mean in means(runs, "angles").values())])
    if rows:
        yield "## Photon: angle of the last pass, in radians"
        yield ""
        yield from table(["Model", *(f"r = {r}" for r in ITERATIONS)], rows)


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/abbie.md",
    title="AbbIE: the figures",
    about=lambda _: "What AbbIE is, and what the figures mean, is in [AbbIE](../abbie.md).",
    run=run_missing,
    sections=sections,
    options=add_data,
)

if __name__ == "__main__":
    STUDY.main()
