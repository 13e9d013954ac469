"""Forgetting: LUNAR beside gradient ascent, gradient difference, NPO, and training anew without the data.

    python scripts/studies/unlearning.py run --export runs/quickstart/export --data DIR
    python scripts/studies/unlearning.py run --smollm2 models/smollm2 --data DIR --sets PISTOL
    python scripts/studies/unlearning.py table

DIR has `unlearning-lunar-pistol` with PISTOL's first sample and its unverifiable questions, and
`unlearning-tofu` with TOFU's questions. SmolLM2-135M-Instruct, as `photon import` writes it, learns the
questions in a federation of four silos, and then takes the place of the quickstart's model.
"""

import copy
import json
import math
import random
import shutil
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results import Result, Results, Runs
from study import Study
from tables import table
from text import federate, temporary_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from photon.unlearning.questions import Encoded, Question, Sets
    from photon.unlearning.request import Request
    from photon.unlearning.scan import Exam, Found

SEEDS = (0, 1, 2)
REFUSAL = "I do not have that information."
UNKNOWN, HELD_OUT = 80, 40
#: Of the tuning on questions and answers.
EPOCHS, BATCH, RATE = {"PISTOL": 16, "TOFU": 24}, 8, 1e-3
#: Of the methods that train: rates, after which epochs the model is asked, and questions of a step.
RATES = {"Photon": (3e-5, 1e-4, 3e-4), "SmolLM2": (1e-5, 3e-5, 1e-4)}
ASKED_AFTER, STEP = (1, 2, 4, 8, 16), 4
BETA = 0.1
#: Of the federation in which SmolLM2 learns the questions.
SILOS, ROUNDS, LOCAL_STEPS, FEDERATED_RATE = "abcd", 6, 12, 3e-4
TUNED, ANEW = "tuned", "trained anew without it"
CLOSED, RELEASED = LUNARS = ("LUNAR, closed form", "LUNAR, released recipe")
FIGURES = ("R_f", "R_r", "DS", "refuses forgotten", "refuses retained", "refuses unknown", "ES_f")


# --- the questions ---------------------------------------------------------------------------------


def sets_of(folder: Path, data: str) -> tuple["Sets", list["Question"]]:
    """Return what is forgotten, retained and unknown, and more that is unknown."""
    from photon.unlearning.questions import Question, Sets

    pistol, tofu = folder / "unlearning-lunar-pistol", folder / "unlearning-tofu"
    rows = json.loads((pistol / "unverified.json").read_text())
    strange = [Question(row["instruction"], REFUSAL) for row in rows]
    random.Random(0).shuffle(strange)
    if data == "PISTOL":
        questions = json.loads((pistol / "pistol_sample1.json").read_text())
        by_edge = {
            edge: [Question(**row) for row in questions if row["edge"] == edge]
            for edge in ("A_B", "E1_F1", "A_m")
        }
        forget, retain = by_edge["A_B"], [*by_edge["E1_F1"], *by_edge["A_m"]]
    else:
        # Twenty questions in a row are on one author.
        forget, retain = (
            [Question(**json.loads(line)) for line in (tofu / name).read_text().splitlines()[:count]]
            for name, count in (("forget10_300.jsonl", 20), ("retain_300.jsonl", 40))
        )
    held = [replace(one, answer=None) for one in strange[UNKNOWN : UNKNOWN + HELD_OUT]]
    return Sets(forget, retain, strange[:UNKNOWN]), held


def fitting(sets: "Sets", encoder: Any) -> "Sets":
    """Return the sets without questions that are longer than the model has positions."""
    from photon.errors import PhotonError
    from photon.unlearning.questions import Sets, encode

    def fits(one: "Question") -> bool:
        try:
            encode([one], encoder)
        except PhotonError:
            return False
        return True

    return Sets(*([one for one in some if fits(one)] for some in (sets.forget, sets.retain, sets.reference)))


@dataclass
class Place:
    """Where a study finds and keeps things; ``base`` is the name of what is in ``export``."""

    export: Path
    data: Path
    work: Path
    base: str = "Photon"

    @property
    def positions(self) -> int:
        """Tokens that a question and its answer may have."""
        from photon.models.pretrained import read_model_config

        return int(read_model_config(self.export).get("n_positions", 1024))

    def sets(self, data: str) -> tuple["Sets", list["Question"]]:
        from photon.data.tokenizer import load_tokenizer
        from photon.unlearning.questions import encoder_of

        sets, held = sets_of(self.data, data)
        encoder = encoder_of(self.export, load_tokenizer(self.export), self.positions)
        return fitting(sets, encoder), held

    def request(self, data: str) -> "Request":
        from photon.unlearning.request import Request

        sets, held = self.sets(data)
        return Request(sets, "the study", unknown=held, attacks=True)

    def tuned(self, data: str, seed: int, *, anew: bool = False) -> Path:
        """Return an export that was tuned on all questions, or on all but those to be forgotten."""
        from photon.files.atomic import atomic_directory

        folder = self.work / f"{data}-{seed}{'-anew' if anew else ''}"
        if not folder.is_dir():
            sets, _ = self.sets(data)
            known = [*([] if anew else sets.forget), *sets.retain, *sets.reference]
            with atomic_directory(folder) as made:
                if self.base == "Photon":
                    self._tune(known, EPOCHS[data], seed, made)
                else:
                    self._federate(known, seed, made)
        return folder

    def _tune(self, known: Sequence["Question"], epochs: int, seed: int, made: Path) -> None:
        from photon.data.tokenizer import load_tokenizer
        from photon.evaluation.load import open_trained
        from photon.unlearning.questions import encode, encoder_of

        model = open_trained(self.export).model
        encoder = encoder_of(self.export, load_tokenizer(self.export), self.positions)
        tune(model, encode(known, encoder), epochs, seed)
        shutil.copytree(self.export, made, dirs_exist_ok=True)
        model.save_pretrained(made)
        encoder.template.save(made)

    def _federate(self, known: Sequence["Question"], seed: int, made: Path) -> None:
        """Let a federation learn the answers: the questions are dealt out, and no silo has another's."""
        from photon.data.prepare import prepare
        from photon.evaluation.export import export_run

        with temporary_folder() as folder:
            for number, silo in enumerate(SILOS):
                write_chats(known[number :: len(SILOS)], folder / f"{silo}.jsonl")
            prepare(
                {silo: [folder / f"{silo}.jsonl"] for silo in SILOS},
                folder / "chats",
                tokenizer=self.export,
                sequence_length=128,
                near_duplicates="none",
                kind="chat",
                seed=seed,
            )
            settings = [
                *("objective=sft", "model=custom", f"model.warm_start={self.export}", "cohort=null"),
                *("model.sequence_length=128", "training.batch_size=4", "training.precision=bf16"),
                *(f"data.path={folder / 'chats'}", f"rounds={ROUNDS}", f"local_steps={LOCAL_STEPS}"),
                *(f"optimizer.lr={FEDERATED_RATE:g}", "optimizer.weight_decay=0.0", "strategy=photon"),
                *("schedule.warmup_steps=6", f"seed={seed}"),
                *(f"evaluation.every={ROUNDS}", "evaluation.sequences=2", "checkpoint.keep=1"),
            ]
            assert federate(settings, folder / "run") is not None, "the tuning diverged"
            export_run(folder / "run", folder / "export")
            shutil.copytree(folder / "export", made, dirs_exist_ok=True)


def write_chats(known: Sequence["Question"], path: Path) -> None:
    """Write each question alone, and each with the next, so that none is in the validation text alone."""

    def chat(some: Sequence["Question"]) -> str:
        turns = [
            {"role": role, "content": text}
            for one in some
            for role, text in (("user", one.question), ("assistant", one.answer))
        ]
        return json.dumps({"messages": turns})

    following = [*known[1:], known[0]]
    alone, pairs = ([one] for one in known), ([*two] for two in zip(known, following, strict=True))
    path.write_text("\n".join(map(chat, [*alone, *pairs])) + "\n")


def tune(model: "PreTrainedModel", known: Sequence["Encoded"], epochs: int, seed: int) -> None:
    """Train on the answers."""
    import torch

    from photon.unlearning.attacks import answer_loss

    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(epochs):
        for some in shuffled(known, BATCH, draw):
            descend(model, optimizer, answer_loss(model, some))
    model.eval()


def shuffled(known: Sequence["Encoded"], size: int, draw: random.Random) -> Iterator[list["Encoded"]]:
    order = draw.sample(list(known), len(known))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def descend(model: "PreTrainedModel", optimizer: Any, loss: "Tensor") -> None:
    import torch

    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


# --- the methods -----------------------------------------------------------------------------------


def gradient_ascent(model: "PreTrainedModel", reference: Any, forget: Any, retain: Any) -> "Tensor":
    """−L_f."""
    from photon.unlearning.attacks import answer_loss

    return -answer_loss(model, forget)


def gradient_difference(model: "PreTrainedModel", reference: Any, forget: Any, retain: Any) -> "Tensor":
    """L_r − L_f."""
    from photon.unlearning.attacks import answer_loss

    return answer_loss(model, retain) - answer_loss(model, forget)


def npo(model: "PreTrainedModel", reference: Any, forget: Any, retain: Any) -> "Tensor":
    """Negative preference optimisation: (2/β) E log(1 + (π / π_ref)^β) of whole answers."""
    import torch

    from photon.unlearning.attacks import answer_losses

    with torch.no_grad():
        before = answer_losses(reference, forget)[0]
    ratio = before - answer_losses(model, forget)[0]
    return 2 / BETA * torch.nn.functional.softplus(BETA * ratio).mean()


def npo_and_retain(model: "PreTrainedModel", reference: Any, forget: Any, retain: Any) -> "Tensor":
    """NPO, and L_r."""
    from photon.unlearning.attacks import answer_loss

    return npo(model, reference, forget, retain) + answer_loss(model, retain)


LOSSES: dict[str, Callable[..., "Tensor"]] = {
    "gradient ascent": gradient_ascent,
    "gradient difference": gradient_difference,
    "NPO": npo,
    "NPO and retain": npo_and_retain,
}
METHODS = (TUNED, *LUNARS, *LOSSES, ANEW)


def trained(
    model: "PreTrainedModel",
    exam: "Exam",
    loss: Callable[..., "Tensor"],
    rates: Sequence[float],
    seed: int,
) -> tuple["PreTrainedModel", dict[str, float]]:
    """Return the model with the lowest Deviation Score among rates and epochs, and which it was."""
    import torch

    from photon.unlearning.answers import score_of

    forget, retain = exam.sets["forget"].encoded, exam.sets["retain"].encoded
    best: tuple[float, Any, dict[str, float]] = (math.inf, model, {})
    for rate in rates:
        now, draw = copy.deepcopy(model), random.Random(seed)
        optimizer = torch.optim.AdamW(now.parameters(), lr=rate, weight_decay=0.0)
        for epoch in range(1, max(ASKED_AFTER) + 1):
            for some in shuffled(forget, STEP, draw):
                descend(now, optimizer, loss(now, model, some, draw.sample(list(retain), STEP)))
            if epoch in ASKED_AFTER:
                score = score_of(
                    {name: exam.figures(now, name, exam.sets[name]) for name in ("forget", "retain")}
                )
                if score < best[0]:
                    best = (score, copy.deepcopy(now), {"rate": rate, "epochs": epoch})
    return best[1], best[2]


def attacked(model: "PreTrainedModel", exam: "Exam") -> dict[str, float]:
    """Return R_f after the attacks that need no vector."""
    from photon.evaluation.unlearn import RELEARNED
    from photon.unlearning.attacks import quantised, relearned
    from photon.unlearning.scan import Asked

    asked = exam.sets["forget"]
    found = {"4-bit weights": exam.figures(quantised(model), "forget", asked)["rouge1"]}
    for count in RELEARNED:
        rest = Asked(asked.questions[count:], asked.encoded[count:])
        made = relearned(model, asked.encoded[:count])
        found[f"relearn {count} answer{'s' if count > 1 else ''}"] = exam.figures(made, "forget", rest)[
            "rouge1"
        ]
    return found


def figures_of(found: "Found") -> dict[str, float]:
    from photon.unlearning.answers import score_of

    forget, retain, unknown = found["forget"], found["retain"], found["unknown"]
    values = (
        forget["rouge1"],
        retain["rouge1"],
        score_of(dict(found)),
        forget["refused"],
        retain["refused"],
        unknown["refused"],
        forget["extraction"],
    )
    return {name: round(value, 4) for name, value in zip(FIGURES, values, strict=True)}


def measure(place: Place, data: str, method: str, seed: int) -> Result:
    """Apply one method to one tuned model, ask it, and attack it."""
    import torch

    from photon.evaluation.load import open_trained
    from photon.evaluation.unlearn import unlearn
    from photon.unlearning.problem import Method
    from photon.unlearning.request import exam_of

    request = place.request(data)
    folder = place.tuned(data, seed, anew=method == ANEW)
    # Products of the larger model are in bfloat16: in float32 it takes nearly twice the time.
    torch.set_float32_matmul_precision("medium" if place.base == "SmolLM2" else "highest")
    done: Result = {"base": place.base, "data": data, "method": method, "seed": seed}
    began = time.process_time()
    if method in LUNARS:
        asked = replace(request, method=Method(), coefficients=(0.5, 1.0, 2.0))
        if method == RELEASED:
            released = Method(solver="adamw", positions="all")
            asked = replace(request, method=released, coefficients=(1.0, 2.0))
        with temporary_folder() as made:
            try:
                outcome = unlearn(folder, made / "out", asked)
            except Exception as error:  # that nothing was found is a result
                if "candidates none refuses" not in str(error):
                    raise
                return {**done, "nothing": str(error), "DS": None}
        chosen = outcome.chosen[0]._asdict()
        recovered = {name: round(found["rouge1"], 4) for name, found in outcome.attacks.items()}
        return {**done, **figures_of(outcome.after), "chosen": chosen, "attacks": recovered}
    model = open_trained(folder).model.eval()
    exam, _ = exam_of(folder, model, request)
    if method in LOSSES:
        model, done["chosen"] = trained(model, exam, LOSSES[method], RATES[place.base], seed)
    done |= figures_of(exam.take(model))
    done["seconds"] = round(time.process_time() - began, 1)
    return {**done, "attacks": {name: round(value, 4) for name, value in attacked(model, exam).items()}}


# --- what is run, and the page ---------------------------------------------------------------------


def options(run: ArgumentParser) -> None:
    run.add_argument("--export", type=Path, default=Path("runs/quickstart/export"), help="the base model")
    run.add_argument("--data", type=Path, required=True, help="folder of the two sets of questions")
    run.add_argument(
        "--smollm2", type=Path, help="SmolLM2-135M-Instruct in its place, as `photon import` writes it"
    )
    run.add_argument("--work", type=Path, default=Path(".photon/unlearning"), help="where models are kept")
    run.add_argument("--sets", nargs="+", default=["PISTOL", "TOFU"], choices=["PISTOL", "TOFU"])
    run.add_argument("--seeds", nargs="+", type=int, default=SEEDS, choices=SEEDS)


def run_missing(runs: Runs, arguments: Namespace) -> None:
    """Do all runs, by worth: LUNAR with all seeds comes first."""
    import torch

    torch.set_num_threads(1)
    place = Place(arguments.export, arguments.data, arguments.work)
    if arguments.smollm2 is not None:
        place = Place(arguments.smollm2, arguments.data, arguments.work / "smollm2", "SmolLM2")
    named = "" if place.base == "Photon" else f"{place.base}, "
    first = (TUNED, CLOSED)
    for methods in (first, [method for method in METHODS if method not in first]):
        for data in arguments.sets:
            for seed in arguments.seeds:
                for method in methods:
                    name = f"{named}{data}, {method}, seed {seed}"
                    runs.once(name, partial(measure, place, data, method, seed))


def sections(results: Results) -> Iterator[str]:
    # Lines of before SmolLM2 took part do not name their model.
    for base, data in sorted({(one.get("base", "Photon"), one["data"]) for one in results}):
        found = [one for one in results if (one.get("base", "Photon"), one["data"]) == (base, data)]
        name = data if base == "Photon" else f"{base}, {data}"
        yield f"## {name}: what is forgotten, and what stays"
        yield ""
        rows = []
        for method in METHODS:
            runs = [one for one in found if one["method"] == method and one["DS"] is not None]
            if runs:
                failed = sum(one["method"] == method and one["DS"] is None for one in found)
                seeds = f"{len(runs)}" + (f" (none found: {failed})" if failed else "")
                rows.append([method, *(spread([one[name] for one in runs], name) for name in FIGURES), seeds])
            elif any(one["method"] == method for one in found):
                rows.append([method, *("none found" for _ in FIGURES), "0"])
        yield from table(["Method", *FIGURES, "Seeds"], rows)
        yield from recovered(found, name)


def recovered(found: Results, name: str) -> Iterator[str]:
    """Lay side by side what attacks bring back."""
    names = list(dict.fromkeys(attack for one in found for attack in one.get("attacks", {})))
    names.sort(key=lambda attack: ("relearn" in attack, attack))
    rows = []
    for method in METHODS:
        runs = [one for one in found if one["method"] == method and "attacks" in one]
        if runs:
            cells = [
                spread([one["attacks"][attack] for one in runs if attack in one["attacks"]], attack)
                for attack in names
            ]
            rows.append([method, spread([one["R_f"] for one in runs], "R_f"), *cells])
    yield f"## {name}: R_f after an attack"
    yield ""
    yield from table(["Method", "none", *names], rows)


def spread(values: Sequence[float], name: str) -> str:
    """Return the mean, with the least and the largest where they differ."""
    if not values:
        return "–"
    digits = 1 if name == "DS" else 2
    mean, low, high = (f"{one:.{digits}f}" for one in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def about(_: Results) -> str:
    return ABOUT


ABOUT = (
    "The quickstart's model was tuned on the answers to 60 questions of which 20 are to be forgotten "
    "(PISTOL: the contract A_B, beside E1_F1 and A_m; TOFU: one author, beside two; questions that do not "
    "fit into 128 tokens are left out), and on 80 questions about things that do not exist, answered with a "
    "refusal. R_f and R_r are ROUGE-1 recall of what is to be forgotten and of what stays, DS is the "
    "Deviation Score, lower is better, and ES_f the extraction strength of what is to be forgotten. Unknown "
    "are 40 other questions about things that do not exist. A cell has the mean over the seeds of the "
    "tuning, with the least and the largest. LUNAR chooses layer, ridge and coefficient by its scan; the "
    "methods that train choose rate and epochs by the Deviation Score, among "
    f"{', '.join(f'{rate:g}' for rate in RATES['Photon'])} "
    f"and {', '.join(map(str, ASKED_AFTER))}. All choose on the questions that the table is of. Trained anew "
    "is the same tuning without what is to be forgotten, which is what deletion would be. Attacks: c·r is "
    "taken away from what the changed block gives, the block is skipped, weights are rounded to 4 bits, and "
    "the model is tuned for 10 steps on 1 or 5 of the forgotten answers and asked for the others."
)

STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/unlearning.md",
    title="Forgetting",
    about=about,
    run=run_missing,
    sections=sections,
    options=options,
    figure="DS",
)

if __name__ == "__main__":
    STUDY.main()
