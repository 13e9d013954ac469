"""Tuning on conversations: together with all weights, together with LoRA, alone, and on one pile.

    python scripts/studies/instruct.py run --minutes 45                  # go on with what is missing
    python scripts/studies/instruct.py run --smollm2 models/smollm2      # SmolLM2 as well, as imported
    python scripts/studies/instruct.py table                             # docs/results/instruct.md

Four silos have conversations of one kind each (`chats.py`). They start from a model that a federation has
trained on the installation's own text, as the quickstart's does, or from SmolLM2-135M-Instruct. Every method
takes as many steps on as many conversations, and has rates of its own from a grid of equal length. `--qa
FILE` puts questions of a file in the place of one kind, and has lines of its own.
"""

import math
import shutil
import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from chats import kinds_of, write_all
from results import Result, Results, Runs, tuned_rate, untried_rates
from study import Study
from tables import by_rate, percent, perplexity, table
from text import federate, prepared, temporary_folder

SEEDS = (0, 1, 2)
CHATS, QUESTIONS = 600, 100


@dataclass(frozen=True)
class Base:
    """Where tuning starts, and how much of it there is.

    Attributes
    ----------
    length, batch, rounds, local_steps
        Tokens of a window, windows of a silo's step, rounds, and steps of a round.
    rates
        Peak rates to try, ascending, for all weights.
    windows, asked
        Windows of each silo and questions of each task by which a model is judged, at most.
    """

    length: int
    batch: int
    rounds: int
    local_steps: int
    rates: tuple[float, ...]
    windows: int
    asked: int


@dataclass(frozen=True)
class Method:
    """Overrides of a method, and how much higher its rates are than those for all weights."""

    overrides: Sequence[str]
    higher: float = 1.0


def _around(rate: float) -> tuple[float, ...]:
    return tuple(rate * 2.0**step for step in range(-4, 5))


BASES = {
    "Photon": Base(128, 4, 3, 16, _around(0.002), 32, QUESTIONS),
    "SmolLM2": Base(96, 2, 2, 4, _around(0.0002), 8, 20),
}
METHODS = {
    "federated": Method(["strategy=photon"]),
    "federated, LoRA": Method(["strategy=photon", "adapter=lora"], higher=8.0),
    "local only": Method(["strategy=photon"]),
    "centralised": Method(["strategy=centralized"]),
}
UNTUNED = "untuned"


@dataclass(frozen=True)
class Case:
    """What one run does.

    Attributes
    ----------
    text
        "own", or the name of the file of which one kind was made.
    """

    base: str
    text: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its line."""
        return f"{self.base}; {self.text}; {self.method}-lr{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Place:
    """What lies on this machine.

    Attributes
    ----------
    folder
        Where text and base models are kept.
    smollm2
        SmolLM2 as `photon import` writes it; None: it is left out.
    qa
        Task file in the place of one kind.
    """

    folder: Path
    smollm2: Path | None
    qa: Path | None

    @property
    def text(self) -> str:
        return "own" if self.qa is None else self.qa.name.partition(".")[0]

    @property
    def kinds(self) -> list[str]:
        return list(kinds_of(self.qa))

    def base(self, name: str) -> Path:
        """Return the folder of a base model, trained now if it is Photon's and not there."""
        from photon.evaluation.export import export_run

        if name == "SmolLM2":
            assert self.smollm2 is not None
            return self.smollm2
        folder = self.folder / "base"
        if not folder.is_dir():
            text = prepared(self.folder / "embedded", 8192, 128)
            with temporary_folder() as run_dir:
                summary = federate([f"data.path={text}", "rounds=4", "evaluation.every=4"], run_dir)
                assert summary is not None, "the base model diverged"
                export_run(run_dir, folder)
        return folder

    def questions(self) -> Path:
        """Return the folder of conversations and tasks."""
        from photon.files.atomic import atomic_directory

        folder = self.folder / f"instruct-{self.text}"
        if not folder.is_dir():
            with atomic_directory(folder) as made:
                write_all(made, CHATS, QUESTIONS, self.qa)
        return folder

    def chats(self, base: str, kinds: Sequence[str]) -> Path:
        """Return prepared conversations of some kinds, a silo each."""
        from photon.data.prepare import prepare
        from photon.data.prepared import is_prepared

        path = self.folder / f"chats-{base}-{self.text}-{'-'.join(kinds)}"
        if not is_prepared(path):
            prepare(
                {kind: [self.questions() / "chats" / f"{kind}.jsonl"] for kind in kinds},
                path,
                tokenizer=self.base(base),
                sequence_length=BASES[base].length,
                validation_fraction=0.2,
                near_duplicates="none",
                kind="chat",
            )
        return path


# --- a run -----------------------------------------------------------------------------------------


def train(place: Place, case: Case) -> Result:
    """Tune, and judge what has come of it: each silo's model by its own kind if they were alone."""
    done: Result = {**asdict(case), "bytes": {"up": 0.0, "down": 0.0}}
    alone = case.method == "local only"
    parts = [[kind] for kind in place.kinds] if alone else [place.kinds]
    losses: dict[str, float] = {}
    elsewhere: list[float] = []
    accuracies: dict[str, float] = {}
    for kinds in parts:
        with temporary_folder() as folder:
            model = folder / "model"
            if not made(place, case, kinds, model, done):
                return {**done, "perplexity": None}
            found = judged(place, case.base, model, place.kinds)
            losses |= {kind: found[kind] for kind in kinds}
            elsewhere += [found[kind] for kind in place.kinds if kind not in kinds]
            accuracies |= asked(place, case.base, model, kinds)
    return {
        **done,
        "perplexity": round(math.exp(statistics.fmean(losses.values())), 4),
        "perplexities": {kind: round(math.exp(loss), 4) for kind, loss in losses.items()},
        "elsewhere": round(math.exp(statistics.fmean(elsewhere)), 4) if elsewhere else None,
        "accuracy": round(statistics.fmean(accuracies.values()), 4),
        "accuracies": accuracies,
    }


def made(place: Place, case: Case, kinds: Sequence[str], model: Path, done: Result) -> bool:
    """Write the tuned model, and count its bytes; return whether it has not diverged."""
    from photon.evaluation.export import export_run

    base, method = BASES[case.base], METHODS.get(case.method)
    start, data = place.base(case.base), place.chats(case.base, kinds)
    if method is None:
        # The base model, with the template by which it is asked.
        shutil.copytree(start, model)
        shutil.copyfile(data / "tokenizer" / "chat_template.jinja", model / "chat_template.jinja")
        return True
    settings = [
        *(
            "objective=sft",
            "model=custom",
            f"model.warm_start={start}",
            f"model.sequence_length={base.length}",
        ),
        *(f"data.path={data}", "cohort=null", f"rounds={base.rounds}", f"local_steps={base.local_steps}"),
        *(f"training.batch_size={base.batch}", f"optimizer.lr={case.rate:g}", "optimizer.weight_decay=0.0"),
        *(f"schedule.steps={base.rounds * base.local_steps}", "schedule.warmup_steps=4", f"seed={case.seed}"),
        *(f"evaluation.every={base.rounds}", "evaluation.sequences=2", "checkpoint.keep=1"),
        *("checkpoint.keep_best=false", *method.overrides),
    ]
    with temporary_folder() as run_dir:
        summary = federate(settings, run_dir)
        if summary is None:
            return False
        export_run(run_dir, model)
    done["bytes"] = {way: done["bytes"][way] + summary["bytes"][way] for way in ("up", "down")}
    return True


def judged(place: Place, base: str, model: Path, kinds: Sequence[str]) -> dict[str, float]:
    """Return the loss of each kind's held-out conversations, in nats per token of an answer."""
    from photon.data.prepared import PreparedData
    from photon.evaluation.load import open_trained
    from photon.evaluation.perplexity import evaluate_data

    data = PreparedData.open(place.chats(base, kinds))
    trained = open_trained(model).model
    most = BASES[base].windows
    scores = evaluate_data(trained, data, batch_size=8, device="cpu", precision="fp32", limit=most)
    return {kind: score.loss for kind, score in scores.items()}


def asked(place: Place, base: str, model: Path, kinds: Sequence[str]) -> dict[str, float]:
    """Return the share of each kind's questions of which the right answer is the likeliest."""
    import torch

    from photon.evaluation.suites import asked_tasks
    from photon.evaluation.tasks import evaluate_tasks

    found: dict[str, Any] = evaluate_tasks(
        model,
        asked_tasks(",".join(kinds), None),
        task_data=place.questions() / "tasks",
        limit=BASES[base].asked,
        batch_size=16,
        device=torch.device("cpu"),
        chat=True,
    )
    return {kind: round(found["tasks"][kind]["metrics"]["acc"], 4) for kind in kinds}


# --- what is run -----------------------------------------------------------------------------------


def options(run: ArgumentParser) -> None:
    run.add_argument(
        "--data", type=Path, default=Path(".photon/instruct"), help="folder of text and base models"
    )
    run.add_argument("--smollm2", type=Path, help="SmolLM2-135M-Instruct, as `photon import` writes it")
    run.add_argument("--qa", type=Path, help="task file in the place of one kind")
    run.add_argument(
        "--bases", nargs="+", default=list(BASES), choices=BASES, help="base models to start from"
    )


def run_missing(runs: Runs, arguments: Namespace) -> None:
    """Do what the plan has and has no line, and plan again with what it has found."""
    place = Place(arguments.data, arguments.smollm2, arguments.qa)
    bases = [name for name in arguments.bases if name != "SmolLM2" or place.smollm2 is not None]
    done = -1
    while len(results := runs.results()) > done:
        done = len(results)
        for base in bases:
            for case in plan(results, base, place.text):
                runs.once(case.name, partial(train, place, case))


def methods() -> list[str]:
    """Return the methods that this version has."""
    from photon.config.folders import conf_dir

    return [
        name for name in METHODS if "LoRA" not in name or (conf_dir() / "adapter" / "lora.yaml").is_file()
    ]


def plan(results: Results, base: str, text: str) -> Iterator[Case]:
    """Yield what there is to run, by worth, as far as it is known."""
    yield Case(base, text, UNTUNED, 0.0, SEEDS[0])
    for method in methods():
        known = tried(results, base, text, method)
        for rate in untried_rates(known, rates_of(base, method)):
            yield Case(base, text, method, rate, SEEDS[0])
    for seed in SEEDS[1:]:
        for method in methods():
            if (best := tuned(results, base, text, method)) is not None:
                yield Case(base, text, method, best, seed)


def rates_of(base: str, method: str) -> list[float]:
    return [rate * METHODS[method].higher for rate in BASES[base].rates]


def tried(results: Results, base: str, text: str, method: str) -> dict[float, float]:
    """Return the perplexity by rate where rates are tuned, infinite where the run diverged."""
    return {
        one["rate"]: one["perplexity"] or math.inf
        for one in results
        if (one["base"], one["text"], one["method"], one["seed"]) == (base, text, method, SEEDS[0])
    }


def tuned(results: Results, base: str, text: str, method: str) -> float | None:
    """Return the best rate; None as long as one beside it has to be tried."""
    return tuned_rate(tried(results, base, text, method), rates_of(base, method))


# --- the page --------------------------------------------------------------------------------------


def runs_of(results: Results, base: str, text: str, method: str) -> list[Result]:
    """Return the runs at the best rate so far, by seed."""
    known = tried(results, base, text, method)
    if not known:
        return []
    best = min(known, key=lambda rate: known[rate])
    key = (base, text, method, best)
    found = [one for one in results if (one["base"], one["text"], one["method"], one["rate"]) == key]
    return sorted((one for one in found if one["perplexity"]), key=lambda one: one["seed"])


def sections(results: Results) -> Iterator[str]:
    for base in BASES:
        for text in sorted(
            {one["text"] for one in results if one["base"] == base}, key=lambda one: one != "own"
        ):
            title = f"{base}" if text == "own" else f"{base}, with {text}"
            yield from compared(results, base, text, title)
            yield from by_kind(results, base, text, title)
            yield from rates_table(results, base, text, title)


def compared(results: Results, base: str, text: str, title: str) -> Iterator[str]:
    """Lay the methods side by side, each at its best rate."""
    rows = []
    for method in (UNTUNED, *METHODS):
        if runs := runs_of(results, base, text, method):
            whole = statistics.fmean(one["perplexity"] for one in runs)
            right = statistics.fmean(one["accuracy"] for one in runs)
            ways = [f"{runs[0]['bytes'][way] / 1e6:.1f} MB" for way in ("up", "down")]
            other = [one["elsewhere"] for one in runs if one.get("elsewhere")]
            open_end = (
                "" if method == UNTUNED or tuned(results, base, text, method) else " (search not ended)"
            )
            rows.append(
                [
                    f"{method}{open_end}",
                    "–" if method == UNTUNED else f"{runs[0]['rate']:g}",
                    perplexity(whole, 2),
                    ", ".join(perplexity(one["perplexity"], 2) for one in runs),
                    perplexity(statistics.fmean(other), 1) if other else "–",
                    percent(right, 1),
                    ", ".join(percent(one["accuracy"], 1) for one in runs),
                    *(ways if runs[0]["bytes"]["up"] else ("–", "–")),
                ]
            )
    yield f"## {title}: methods"
    yield ""
    seeds = "Seeds 0, 1, …"
    columns = ["Method", "Rate", "Perplexity", seeds, "Of other kinds", "Right answers", seeds, "Up", "Down"]
    yield from table(columns, rows, left=(0, 3, 6))


def by_kind(results: Results, base: str, text: str, title: str) -> Iterator[str]:
    """Give each kind of conversations a column: perplexity, and the share of right answers."""
    found = {method: runs_of(results, base, text, method) for method in (UNTUNED, *METHODS)}
    kinds = next((list(runs[0]["perplexities"]) for runs in found.values() if runs), [])
    rows = []
    for method, runs in found.items():
        cells = [
            f"{perplexity(statistics.fmean(one['perplexities'][kind] for one in runs))}, "
            f"{percent(statistics.fmean(one['accuracies'][kind] for one in runs))}"
            for kind in kinds
            if runs
        ]
        rows += [[method, *cells]] if runs else []
    yield f"## {title}: perplexity and right answers by kind"
    yield ""
    yield from table(["Method", *kinds], rows)


def rates_table(results: Results, base: str, text: str, title: str) -> Iterator[str]:
    """Give a row to each method."""
    found = {method: tried(results, base, text, method) for method in METHODS}
    rates = sorted({rate for known in found.values() for rate in known})
    rows = []
    for method, known in found.items():
        if known:
            texts = {rate: perplexity(value, 2) for rate, value in known.items()}
            rows.append([method, *by_rate(texts, rates, min(known, key=lambda rate: known[rate]))])
    if rows:
        yield f"## {title}: perplexity by peak rate, seed {SEEDS[0]}"
        yield ""
        yield from table(["Method", *(f"{rate:g}" for rate in rates)], rows)


def about(_: Results) -> str:
    sizes = "; ".join(
        f"{name}: {base.rounds} rounds of {base.local_steps} local steps of {base.batch} windows of "
        f"{base.length} tokens a silo, judged by {base.asked} questions of each kind"
        for name, base in BASES.items()
    )
    return f"{ABOUT} {sizes}. {JUDGED}"


ABOUT = (
    "Four silos have conversations of one kind each, which `scripts/studies/chats.py` makes of the "
    "installation: sums, which of two numbers is larger (guessing is right in 50 %), which of four words "
    "is the last, and what a function does (25 %, as in sums). Photon is the quickstart's model after "
    "four rounds of 64 local steps; SmolLM2 is SmolLM2-135M-Instruct, imported from a GGUF file of four "
    "bits."
)
JUDGED = (
    "Perplexity is that of the held-out answers, the geometric mean over the kinds; base models have "
    "tokenizers of their own, so it is compared within one. A right answer is one that is likelier than "
    "the wrong ones beside it. Local only is a model for each silo, judged by its own kind; of other "
    "kinds is its perplexity on those of the others. Centralised has all conversations in one place and "
    "takes as many steps with as many windows as all silos together. Up and down are bytes between server "
    "and silos in the whole run, evaluation among them."
)

STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/instruct.md",
    title="Tuning on conversations",
    about=about,
    run=run_missing,
    sections=sections,
    options=options,
)

if __name__ == "__main__":
    STUDY.main()
