"""Photon's recipe at equal tokens: the schedule and its peak rate, silos a round, and how unlike they are.

    python scripts/studies/recipe.py run --minutes 45       # go on with what is missing
    python scripts/studies/recipe.py table                  # docs/results/recipe.md

The recipe takes the peak rate of a large batch, gives each silo a small one, and stretches the schedule by
the ratio of the two. Here the large batch has 32 sequences, a silo's has 4, and there are 8 silos. Every run
is a whole federation in this process, and trains as many tokens in all as 192 steps of the large batch. Its
rate is tuned where it is trained, on one participant: three rates a factor √2 apart, then the neighbours of
the best.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from results import Result, Results, Runs, tuned_rate, untried_rates
from study import Study
from tables import by_rate, percent, perplexity, table
from text import (
    BATCH,
    QUICK,
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

SILOS = 8
LOCAL_STEPS = 16
#: Sequences of the large batch, and its steps: the tokens of every run.
LARGE, STEPS = 32, 192
WARMUP = 16
RATES = (0.004, 0.0056, 0.008, 0.0112, 0.016)
SEEDS = (0, 1, 2)
#: Silos of a round, of eight.
COHORTS = (4, 2, 1)
TEXTS = {"iid": "dealt out evenly", "domain": "one domain each"}
CENTRAL = "large batch"
#: Length of the cosine: the large batch's steps times the ratio of the batches, these steps, or the run's.
#: The run's has the stretched warm-up, but where the name says otherwise.
SCHEDULES = {
    CENTRAL: ["schedule.steps=null"],
    "stretched": [f"schedule.tuned_batch_size={LARGE}", f"schedule.steps={STEPS}"],
    "unstretched": [f"schedule.tuned_batch_size={BATCH}", f"schedule.steps={STEPS}"],
    "of the run": ["schedule.steps=null", f"schedule.warmup_steps={WARMUP * LARGE // BATCH}"],
    "of the run, short warm-up": ["schedule.steps=null"],
}
#: Where schedules and rates are compared, and those whose own best rate is looked for.
COMPARED = 2
TUNED = ("stretched", "of the run")


@dataclass(frozen=True)
class Case:
    """What one run does; a cohort of 0 is the large batch, on one participant."""

    schedule: str
    cohort: int
    text: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return f"{self.schedule}-K{self.cohort}-{self.text}-lr{self.rate:g}-seed{self.seed}"


def train(data: Path, case: Case) -> Result:
    from photon.telemetry.events import Evaluated
    from photon.telemetry.log import read_events

    rounds = rounds_of(case)
    settings = [
        *SETTINGS,
        QUICK,
        "strategy=photon" if case.cohort else "strategy=centralized",
        f"cohort={case.cohort or SILOS}",
        f"data.path={text_of(data, case.text)}",
        f"local_steps={LOCAL_STEPS}",
        f"rounds={rounds}",
        f"evaluation.every={max(1, rounds // 4)}",
        f"schedule.warmup_steps={WARMUP}",
        *SCHEDULES[case.schedule],
        f"optimizer.lr={case.rate:g}",
        f"seed={case.seed}",
    ]
    with temporary_folder() as run_dir:
        summary = federate(settings, run_dir)
        events = list(read_events(run_dir / "events.jsonl"))
    curve = [event.perplexity for event in events if isinstance(event, Evaluated)]
    tokens = None if summary is None else summary["tokens"]
    return {**asdict(case), "tokens": tokens, "curve": curve, "perplexity": summary and curve[-1]}


def rounds_of(case: Case) -> int:
    """Return the rounds that take the tokens of all; the large batch is that of eight silos."""
    return STEPS * (SILOS // case.cohort if case.cohort else 1) // LOCAL_STEPS


def text_of(data: Path, text: str) -> Path:
    """Return the text of eight silos: dealt out evenly, or two to each domain."""
    if text == "iid":
        return dealt_evenly(data, SILOS)
    return prepared(data / "by-domain-8", VOCABULARY, SEQUENCE_LENGTH, deal=halved)


def halved(documents: "Mapping[str, list[Document]]") -> "dict[str, list[Document]]":
    """Make two silos of each domain, of every second document."""
    return {
        f"{domain}-{half + 1}": each[half::2]
        for domain, each in documents.items()
        for half in range(SILOS // len(documents))
    }


# --- what is run -----------------------------------------------------------------------------------


def run_missing(runs: Runs, arguments: Namespace) -> None:
    """Do what the plan has and has no line, and plan again with what it has found."""
    done = -1
    while len(results := runs.results()) > done:
        done = len(results)
        for case in plan(results):
            runs.once(case.name, partial(train, arguments.data, case))


def plan(results: Results) -> Iterator[Case]:
    """Yield what there is to run, by worth, as far as it is known."""
    yield from search(results, CENTRAL, 0)
    rate = tuned(results, CENTRAL, 0)
    if rate is None:
        return
    for seed in SEEDS:
        for cohort in COHORTS:
            for text in TEXTS if seed == 0 else ("iid",):
                for schedule in TUNED:
                    yield Case(schedule, cohort, text, rate, seed)
        for schedule in ("unstretched", "of the run, short warm-up"):
            yield Case(schedule, COMPARED, "iid", rate, seed)
        if seed == 0:
            for schedule in TUNED:
                yield from search(results, schedule, COMPARED)
        for schedule, cohort in ((CENTRAL, 0), *((schedule, COMPARED) for schedule in TUNED)):
            own = tuned(results, schedule, cohort)
            if own is not None:
                yield Case(schedule, cohort, "iid", own, seed)


def tried(results: Results, schedule: str, cohort: int) -> dict[float, float]:
    """Return the perplexity by rate where rates are tuned, infinite where the run diverged."""
    return {
        one["rate"]: one["perplexity"] or math.inf
        for one in results
        if (one["schedule"], one["cohort"], one["text"], one["seed"]) == (schedule, cohort, "iid", 0)
    }


def search(results: Results, schedule: str, cohort: int) -> Iterator[Case]:
    """Yield the middle three rates, then those beside the best."""
    for rate in untried_rates(tried(results, schedule, cohort), RATES):
        yield Case(schedule, cohort, "iid", rate, 0)


def tuned(results: Results, schedule: str, cohort: int) -> float | None:
    """Return the best rate; None as long as one beside it has to be tried."""
    return tuned_rate(tried(results, schedule, cohort), RATES)


# --- the page --------------------------------------------------------------------------------------


def sections(results: Results) -> Iterator[str]:
    yield from rates_table(results)
    yield from schedules_table(results)
    yield from silos_table(results)


def rates_table(results: Results) -> Iterator[str]:
    """Give a row to each schedule whose rate is tuned."""
    rows = []
    rates = sorted({one["rate"] for one in results})
    for schedule, cohort in ((CENTRAL, 0), *((schedule, COMPARED) for schedule in TUNED)):
        if known := tried(results, schedule, cohort):
            texts = {rate: perplexity(value) for rate, value in known.items()}
            best = min(known, key=lambda rate: known[rate])
            label = schedule if not cohort else f"{cohort} of {SILOS} silos, {schedule}"
            rows.append([label, *by_rate(texts, rates, best)])
    if rows:
        yield "## Tuning: perplexity by peak rate, text dealt out evenly, seed 0"
        yield ""
        yield from table(["Schedule", *(f"{rate:g}" for rate in rates)], rows)


def runs_of(results: Results, schedule: str, cohort: int, text: str, rate: float) -> list[Result]:
    at = (schedule, cohort, text, rate)
    found = [one for one in results if (one["schedule"], one["cohort"], one["text"], one["rate"]) == at]
    return sorted((one for one in found if one["perplexity"]), key=lambda one: one["seed"])


def figures(runs: Sequence[Result]) -> str:
    """Return the mean, and what each seed has."""
    if not runs:
        return "–"
    mean = statistics.fmean(one["perplexity"] for one in runs)
    each = ", ".join(perplexity(one["perplexity"]) for one in runs)
    return f"{mean:.1f} ({each})" if len(runs) > 1 else f"{mean:.1f}"


def schedules_table(results: Results) -> Iterator[str]:
    """Compare schedules at the large batch's rate, and at their own."""
    central = tuned(results, CENTRAL, 0)
    if central is None:
        return
    rows = [[CENTRAL, f"{central:g}", figures(runs_of(results, CENTRAL, 0, "iid", central))]]
    for schedule in ("stretched", "of the run", "of the run, short warm-up", "unstretched"):
        rates = {central}
        if schedule in TUNED and (own := tuned(results, schedule, COMPARED)) is not None:
            rates.add(own)
        for rate in sorted(rates):
            rows.append([schedule, f"{rate:g}", figures(runs_of(results, schedule, COMPARED, "iid", rate))])
    yield f"## {COMPARED} of {SILOS} silos a round, by schedule"
    yield ""
    columns = ["Schedule", "Peak rate", "Perplexity (seeds 0, 1, …)"]
    yield from table(columns, rows, left=(0, 2))


def silos_table(results: Results) -> Iterator[str]:
    """Compare how many silos take part, on text that is alike and that is not."""
    central = tuned(results, CENTRAL, 0)
    if central is None:
        return
    rows = []
    for schedule in TUNED:
        for cohort in COHORTS:
            cells = [runs_of(results, schedule, cohort, text, central) for text in TEXTS]
            if any(cells):
                first = [runs[0]["perplexity"] for runs in cells if runs]
                change = percent(first[1] / first[0] - 1, 1, "+") if len(first) > 1 else "–"
                rows.append([schedule, f"1/{SILOS // cohort}", *map(figures, cells), change])
    if rows:
        yield f"## Silos of a round, at the large batch's rate of {central:g}"
        yield ""
        columns = ["Schedule", "Of the silos", *(f"Text {how}" for how in TEXTS.values()), "Seed 0"]
        yield from table(columns, rows, left=(0, 2, 3))


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/recipe.md",
    title="The Photon recipe: the figures",
    about=lambda _: "What they mean is in [recipes](../recipes.md#what-the-recipe-came-to).",
    run=run_missing,
    sections=sections,
    options=add_data,
)

if __name__ == "__main__":
    STUDY.main()
