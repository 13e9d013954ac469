"""BixBench's harness on six capsules of our own: is who must be right, and does who guesses score so?

    python scripts/bixbench/build.py capsules
    python scripts/studies/bixbench.py run --capsules capsules            # go on with what is missing
    python scripts/studies/bixbench.py run --capsules capsules --agents agents.yaml --agent NAME
    python scripts/studies/bixbench.py run --capsules capsules --published DIR
    python scripts/studies/bixbench.py table                              # docs/results/bixbench.md

With `--agents`, a model at an endpoint answers too, without data: by choice, of four options, once each. With
`--published`, the predictions that the authors publish are graded again (`scripts/bixbench/regrade.py`).
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results import Result, Results, Runs
from study import Study, paragraph
from tables import table

#: Name to who answers, how, and how often.
USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "reference, with a notebook": ("reference", {"mode": "agent", "replicas": 1}),
    "refusing, without data": ("refusing", {"mode": "zero-shot", "replicas": 40}),
    "random, without data": ("random", {"mode": "zero-shot", "replicas": 40}),
}
MODEL: dict[str, Any] = {"mode": "zero-shot", "replicas": 1, "regimes": ["mcq"], "parallel": 1}
CHANCE = {"open": "", "mcq-refusal": "0.200", "mcq": "0.250"}


def run(runs: Runs, arguments: Namespace) -> None:
    """Do what is missing."""
    for name, (solver, settings) in USUAL.items():
        code = arguments.capsules / "reference.json" if solver == "reference" else None
        runs.once(name, partial(_measure, arguments.capsules, solver, settings, code=code))
    if arguments.published is not None:
        runs.once("published predictions", partial(_regrade, arguments.published))
    if arguments.agents is not None:
        name = f"{arguments.agent}, without data"
        runs.once(name, partial(_measure, arguments.capsules, "model", MODEL, **_model(arguments)))


def _regrade(data: Path) -> Result:
    """Grade the published predictions again; return the counts, and how many grades differ."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "bixbench"))
    import regrade

    files: dict[str, Any] = {}
    for name in regrade.COUNTS:
        (total, correct, refused), differing = regrade.choices(data / f"{name}.csv")
        files[name] = {"total": total, "correct": correct, "refused": refused, "differing": differing}
    for name in regrade.OPEN:
        for part in ("upstream", "words"):
            decided, differing = regrade.opened(data / f"{name}.csv", part)
            files[f"{name}, {part}"] = {"total": decided, "differing": differing}
    same = 1 - sum(one["differing"] for one in files.values()) / sum(one["total"] for one in files.values())
    return {"files": files, "accuracy": round(same, 4)}


def _model(arguments: Namespace) -> dict[str, Any]:
    return {"agents": arguments.agents, "agent": arguments.agent, "cache": arguments.cache}


def _measure(
    capsules: Path,
    solver: str,
    settings: dict[str, Any],
    *,
    code: Path | None = None,
    agents: Path | None = None,
    agent: str | None = None,
    cache: Path | None = None,
) -> Result:
    """Run one solver and grade it; return what the table is made of."""
    from photon.benchmarks.bixbench.named import solver_named
    from photon.benchmarks.bixbench.records import Folder
    from photon.benchmarks.bixbench.results import grade_run
    from photon.benchmarks.bixbench.run import BenchmarkRun
    from photon.benchmarks.bixbench.settings import GradeSettings, RunSettings
    from photon.benchmarks.bixbench.source import Source
    from photon.benchmarks.notebook.sandbox import Shut

    chosen, source = RunSettings.model_validate(settings), Source(str(capsules))
    asked = source.questions()
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        answers = solver_named(stack, solver, chosen, agents=agents, agent=agent, code=code, cache=cache)
        folder = Folder(Path(scratch))
        done = BenchmarkRun(source, answers, chosen, folder, Shut()).make(asked)
        results = grade_run(folder, GradeSettings(), None)
        cost = json.loads(json.dumps(results["cost"]))
    kept = ("total", "correct", "accuracy", "wilson", "clustered", "precision", "coverage", "missing")
    regimes = {
        regime: {
            **{key: _rounded(figures[key]) for key in kept},
            "no_answer": sum(number for end, number in figures["ends"].items() if end != "answered"),
        }
        for regime, figures in results["regimes"].items()
    }
    first = next(iter(regimes.values()))
    made = {
        "solver": answers.name,
        "mode": chosen.mode,
        "replicas": chosen.replicas,
        "version": asked.version,
    }
    return {
        **made,
        "questions": len(asked.questions),
        "regimes": regimes,
        "tokens": cost["prompt_tokens"] + cost["completion_tokens"],
        "failed": sum(done.failed.values()),
        "accuracy": first["accuracy"],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(one, 4) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def sections(results: Results) -> Iterable[str]:
    """Return the tables: a row for each run and regime, and one for each published file."""
    rows = []
    for one in (one for one in results if "regimes" in one):
        for regime, figures in one["regimes"].items():
            rows.append(
                [
                    one["run"],
                    regime,
                    str(figures["total"]),
                    str(figures["correct"]),
                    f"{figures['accuracy']:.3f}",
                    _interval(figures["wilson"]),
                    _interval(figures["clustered"]),
                    f"{figures['coverage']:.3f}",
                    str(figures["no_answer"]),
                    CHANCE[regime],
                ]
            )
    head = ["Who", "regime", "answers", "correct", "accuracy", "95 % (Wilson)", "95 % (capsules)"]
    yield from ["## Own capsules", ""]
    yield from table([*head, "coverage", "no answer", "guessing"], rows, left=(0, 1))
    for one in (one for one in results if "files" in one):
        yield from ["## Published predictions, graded again", ""]
        yield from paragraph(_PUBLISHED)
        yield ""
        files = [
            [name, *(str(figures.get(key, "")) for key in ("total", "correct", "refused", "differing"))]
            for name, figures in one["files"].items()
        ]
        yield from table(["File", "graded", "correct", "refused", "unlike the record"], files)


_PUBLISHED = (
    "Of files of choices every answer is graded. Of open answers there are only those that a rule decides: "
    "where any part of the right text counts, as upstream, and where whole words do."
)


def _interval(bounds: list[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"


def about(results: Results) -> str:
    """Return what the page says of the figures."""
    questions = max(one.get("questions", 0) for one in results)
    return (
        f"{questions} questions on six capsules of real biomedical data, built by "
        "`scripts/bixbench/build.py`; they are not the paper's, and no figure here can be compared with one "
        "of its. The reference runs code that was written for each question through the same sandbox, tools "
        "and graders as a model's, so less than 1 would be a fault of the harness. The last interval takes "
        "into account that questions of a capsule depend on each other; where all answers are alike it "
        "cannot be estimated. Without an answer are replies that have none in the form that was asked for."
    )


def options(parser: ArgumentParser) -> None:
    """Add the options of ``run``."""
    parser.add_argument("--capsules", type=Path, required=True, help="folder that build.py made")
    parser.add_argument("--agents", type=Path, help="file of agents, for a model")
    parser.add_argument("--agent", help="name of one of them")
    parser.add_argument("--published", type=Path, help="folder of the authors' files of predictions")
    parser.add_argument("--cache", type=Path, help="folder of what the model has answered")


STUDY = Study(
    script=__file__,
    description=__doc__,
    page="docs/results/bixbench.md",
    title="The harness of BixBench",
    about=about,
    run=run,
    sections=sections,
    options=options,
    figure="accuracy",
)

if __name__ == "__main__":
    STUDY.main()
