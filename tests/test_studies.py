"""The studies keep what was measured: a run is done once, and a page never loses a figure."""

import importlib
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from photon.errors import PhotonError
from photon.link import BODY
from photon.link.messages import TrainReport, TrainRequest, pack, unpack
from photon.link.records import decode_groups, encode_groups

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "scripts" / "studies"
RESULTS = ROOT / "docs" / "results"
PAGES = {
    "abbie": "abbie.md",
    "attacks": "attacks.md",
    "bixbench": "bixbench.md",
    "convergence": "convergence.md",
    "instruct": "instruct.md",
    "link_codecs": "link.md",
    "orchestration": "orchestration.md",
    "outer": "outer.md",
    "recipe": "recipe.md",
    "sparse_images": "sparsity-images.md",
    "sparse_text": "sparsity.md",
    "trees": "worldlm-figures.md",
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], ModuleType]:
    """Import a module of the studies by its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # it would be set for good
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module


@pytest.fixture
def runs(module: Callable[[str], ModuleType]) -> ModuleType:
    return module("results")


def write_lines(file: Path, *results: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in results))


# --- runs -----------------------------------------------------------------------------------------------


def test_a_run_that_has_a_line_is_not_done_again(runs: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results" / "runs.jsonl"
    one, done = runs.Runs(file, minutes=1), []

    def train(name: str) -> dict[str, Any]:
        done.append(name)
        return {"perplexity": len(name), "method": "MT-DAO, τ = 1"}

    for name in ("long", "a", "long"):
        one.once(name, partial(train, name))
    runs.Runs(file, minutes=1).once("a", partial(train, "a"))
    assert done == ["long", "a"]
    assert [(one["run"], one["perplexity"]) for one in runs.load(file)] == [("a", 1), ("long", 4)]
    assert len(file.read_text().splitlines()) == 2
    runs.Runs(file, minutes=0).once("late", partial(train, "late"))
    assert done == ["long", "a"]


def test_processes_share_the_runs_and_a_failed_one_can_be_done_again(
    runs: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "runs.jsonl"
    one, other = runs.Runs(file, minutes=1), runs.Runs(file, minutes=1)

    def train() -> dict[str, Any]:
        # The other process comes to this run while it is under way, and goes on to the next.
        other.once("first", pytest.fail)
        other.once("second", lambda: {"perplexity": 2.0})
        return {"perplexity": 1.0}

    one.once("first", train)
    assert [result["perplexity"] for result in one.results()] == [1.0, 2.0]

    def fail() -> dict[str, Any]:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        one.once("third", fail)
    other.once("third", lambda: {"perplexity": 3.0})
    assert len(other.results()) == 3


def test_a_run_with_an_earlier_figure_is_done_and_its_line_takes_the_place(
    runs: ModuleType, tmp_path: Path
) -> None:
    write_lines(
        tmp_path / "runs-earlier.jsonl", {"run": "a", "perplexity": 9.1}, {"run": "b", "perplexity": 8.2}
    )
    one = runs.Runs(tmp_path / "runs.jsonl", minutes=1)
    assert [result["perplexity"] for result in one.results()] == [9.1, 8.2]
    one.once("b", lambda: {"perplexity": 8.19})
    assert [(result["run"], result["perplexity"], runs.has_line(result)) for result in one.results()] == [
        ("b", 8.19, True),
        ("a", 9.1, False),
    ]


# --- pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_repository_is_what_its_lines_make(
    module: Callable[[str], ModuleType], tmp_path: Path, name: str
) -> None:
    committed = RESULTS / PAGES[name]
    study = module(name).STUDY
    assert study.page == f"docs/results/{PAGES[name]}"
    page = tmp_path / PAGES[name]
    study.main(["table", "--output", str(page), "--results", str(committed.with_suffix(".jsonl"))])
    assert page.read_text() == committed.read_text(), f"run: python scripts/studies/{name}.py table"
    assert page.with_suffix(".svg").exists() == committed.with_suffix(".svg").exists()


@pytest.mark.parametrize("name", PAGES)
def test_nothing_leaves_the_page_as_it_is(
    module: Callable[[str], ModuleType], tmp_path: Path, name: str
) -> None:
    page, results = tmp_path / PAGES[name], tmp_path / "none.jsonl"
    page.write_text("# Figures\n")
    page.with_suffix(".svg").write_text("<svg/>")
    for _ in ("no file", "an empty one"):
        with pytest.raises(SystemExit, match=r"no run has a line, so .* stays as it is"):
            module(name).STUDY.main(["table", "--output", str(page), "--results", str(results)])
        assert page.read_text() == "# Figures\n"
        assert page.with_suffix(".svg").read_text() == "<svg/>"
        results.touch()


def test_the_command_that_leaves_a_page_fails_with_one_line(tmp_path: Path) -> None:
    page = tmp_path / "sparsity.md"
    page.write_text("# Figures\n")
    command = [sys.executable, str(STUDIES / "sparse_text.py"), "table", "--output", str(page)]
    done = subprocess.run(
        [*command, "--results", str(tmp_path / "none.jsonl")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    assert page.read_text() == "# Figures\n"


def test_a_section_without_lines_stays_at_its_place_and_so_does_the_plot(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    page, results = tmp_path / "page.md", tmp_path / "page.jsonl"
    study = module("study").Study(
        script="some.py",
        description="",
        page="page.md",
        title="Page",
        about=lambda _: "About.",
        run=lambda *_: None,
        sections=lambda found: [line for one in found for line in (f"## {one['run']}", "", "new", "")],
        plot=lambda _, path: path.write_text("new"),
    )
    words = ["table", "--output", str(page), "--results", str(results)]
    page.write_text("# Page\n\n## a\n\nold\n\n## b\n\nold\n\n### b2\n\nold\n\n## c\n\nold\n")
    page.with_suffix(".svg").write_text("old")
    write_lines(results, {"run": "a"}, {"run": "c"}, {"run": "d"})
    with pytest.raises(SystemExit, match=r"2 sections .*: ## b; ### b2$"):
        study.main(words)
    head = "# Page\n\nWritten by `python scripts/studies/some.py table` from 3 runs. About.\n\n"
    assert page.read_text() == (
        f"{head}## a\n\nnew\n\n## b\n\nold\n\n### b2\n\nold\n\n## c\n\nnew\n\n## d\n\nnew\n"
    )
    assert page.with_suffix(".svg").read_text() == "old"
    # What should go is deleted by hand.
    page.write_text(page.read_text().replace("## b\n\nold\n\n### b2\n\nold\n\n", ""))
    study.main(words)
    assert page.read_text() == f"{head}## a\n\nnew\n\n## c\n\nnew\n\n## d\n\nnew\n"
    assert page.with_suffix(".svg").read_text() == "new"


def sparse_run(method: str, sparsity: float, seed: int, rate: float, perplexity: float) -> dict[str, Any]:
    figures = {"density/all": 0.5, "mask_iou/all": 0.9, "regrown/mean": 0.0}
    return {
        "run": f"{method}-{sparsity}-{seed}",
        "method": method,
        "sparsity": sparsity,
        "split": "iid",
        "seed": seed,
        "rate": rate,
        "perplexity": perplexity,
        "rounds": [figures, figures] if sparsity else [],
        "bytes": {"up": 1000.0 if sparsity else 2000.0, "down": 1500.0},
    }


def test_a_figure_without_a_line_is_marked(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    page, results = tmp_path / "sparsity.md", tmp_path / "sparsity.jsonl"
    write_lines(results, sparse_run("dense", 0.0, 0, 0.008, 70.0), sparse_run("Top-K", 0.9, 0, 0.008, 77.0))
    write_lines(
        tmp_path / "sparsity-earlier.jsonl",
        sparse_run("Top-K", 0.9, 0, 0.008, 99.0),  # has a line by now
        sparse_run("dense", 0.0, 1, 0.008, 60.0),
        sparse_run("Top-K", 0.9, 1, 0.008, 90.0),
        {**sparse_run("dense", 0.0, 0, 0.004, 80.0), "run": "other rate"},
        {**sparse_run("Top-K", 0.9, 0, 0.004, 88.0), "run": "another rate"},
        sparse_run("Top-K", 0.5, 0, 0.008, 72.5),
    )
    module("sparse_text").STUDY.main(["table", "--output", str(page), "--results", str(results)])
    text = page.read_text()
    assert "from 2 runs" in text
    assert "† No line in the repository" in text
    for row in (
        "| dense | 0 % | 80.0† | **70.0** |",
        "| Top-K | 50 % | – | **72.5†** |",
        "| Top-K | 90 % | 88.0† | **77.0** |",
        # A ratio has a mark if either side has; a mean over seeds is of those that have lines, if one has.
        "| dense | 0 % | 0.008 | 70.0, 60.0† | +0.0 %, +0.0 %† | 1 | – | – | 2.0 kB | 1/1.00 | 1.5 kB |",
        "| Top-K | 50 % | 0.008 | 72.5† | +3.6 %† | 0.500 → 0.500† | 0.90 → 0.90† | 0.00 %† "
        "| 1.0 kB† | 1/2.00† | 1.5 kB† |",
        "| Top-K | 90 % | 0.008 | 77.0, 90.0† | +10.0 %, +50.0 %† | 0.500 → 0.500 | 0.90 → 0.90 | 0.00 % "
        "| 1.0 kB | 1/2.00 | 1.5 kB |",
    ):
        assert row in text.splitlines()


def test_the_search_of_an_outer_step_ends_at_a_point_with_worse_ones_on_all_sides(
    module: Callable[[str], ModuleType],
) -> None:
    """From its start to a minimum that lies along a diagonal, where effective steps are equal."""
    outer = module("outer")
    lines: list[dict[str, Any]] = []
    while (run := next(iter(outer.plan(lines)))).name not in {line["run"] for line in lines}:
        assert (run.method, run.variation, run.place, run.seed) == ("DiLoCo", (), "iid", 0)
        assert outer.tuned(lines, "DiLoCo") is None
        rate, momentum, step = run.point.rate, run.point.momentum, run.point.outer
        along, across = momentum - 0.8, math.log(step / (1 - momentum) / 3.5)
        far = math.log(rate / 0.004) ** 2 + across**2 + 10 * along**2
        lines.append(
            {
                "run": run.name,
                "method": run.method,
                "variation": [],
                "place": "iid",
                "seed": 0,
                "rate": rate,
                "momentum": momentum,
                "outer": step,
                "perplexity": None if far > 5 else 40 + far,
            }
        )
    best = outer.tuned(lines, "DiLoCo")
    assert (best.rate, best.momentum, best.outer) == (0.004, 0.8, 0.7)
    known = outer.tried(lines, "DiLoCo")
    beside = list(outer.neighbours(best))
    assert len(beside) == len(outer.MOVES)
    assert all(known[point] > known[best] for point in beside)
    assert len(known) < 40, "the whole grid has 546 points"


def test_a_point_at_the_edge_of_the_grid_has_fewer_neighbours(module: Callable[[str], ModuleType]) -> None:
    outer = module("outer")
    corner = outer.Point(0.001, 0.0, 0.2)
    assert {(p.rate, p.momentum, p.outer) for p in outer.neighbours(corner)} == {
        (0.0014, 0.0, 0.2),
        (0.001, 0.3, 0.2),
        (0.001, 0.0, 0.35),
    }
    assert {(p.rate, p.momentum, p.outer) for p in outer.neighbours(outer.Point(0.002))} == {
        (0.0014, None, None),
        (0.0028, None, None),
    }
    assert outer.Point(0.002, 0.0, 1.0).overrides() == [
        "outer.momentum=0",
        "outer.lr=1",
        "outer.nesterov=false",
    ]


def test_the_recipe_is_compared_at_equal_tokens(module: Callable[[str], ModuleType]) -> None:
    """The plan goes on as far as rates are known; all its runs take the tokens of the large batch."""
    recipe = module("recipe")
    lines: list[dict[str, Any]] = []
    for _ in range(9):
        for case in recipe.plan(lines):
            if case.name not in {line["run"] for line in lines}:
                far = math.log(case.rate / (0.016 if case.cohort else 0.008)) ** 2
                lines.append({"run": case.name, **vars(case), "perplexity": 50 + far})
    assert recipe.tuned(lines, recipe.CENTRAL, 0) == 0.008
    tokens = {
        (case.cohort or 1) * steps_of(recipe, case) * (1 if case.cohort else 8) for case in recipe.plan(lines)
    }
    assert tokens == {8 * recipe.STEPS}
    assert {(line["cohort"], line["text"]) for line in lines if line["schedule"] == "stretched"} == {
        (cohort, text) for cohort in recipe.COHORTS for text in recipe.TEXTS
    }


def steps_of(recipe: ModuleType, case: Any) -> int:
    return int(recipe.rounds_of(case)) * int(recipe.LOCAL_STEPS)


def test_pages_of_results_name_scripts_that_exist() -> None:
    named = {
        name
        for page in RESULTS.glob("*.md")
        for name in re.findall(r"\bscripts/[\w./-]+\.(?:py|sh)\b", page.read_text())
    }
    assert len(named) >= len(PAGES)
    assert [name for name in named if not (ROOT / name).exists()] == []


# --- attacks --------------------------------------------------------------------------------------------


def test_liars_send_what_the_attack_says_and_report_its_norm(module: Callable[[str], ModuleType]) -> None:
    attacks = module("attacks")
    start = {"params": {"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor(1.0)}}
    update = {"w": torch.tensor([2.0, -1.0, 0.5]), "b": torch.tensor(-2.0)}

    def answer(message_type: str, content: RecordDict, node_config: Any) -> RecordDict:
        silo = unpack(content, TrainRequest).silo
        scale = 1.0 if silo == "y" else 2.0
        records = encode_groups({"params": {k: start["params"][k] + scale * update[k] for k in update}})
        records[BODY] = pack(
            TrainReport(
                round=1,
                silo=silo,
                steps=1,
                tokens=1,
                position=0,
                update_norm=1.0,
                seconds={"load": 0.0, "training": 1.0, "save": 0.0, "total": 1.0},
                state_lost=False,
            )
        )
        return records

    def sent(attack: str, silo: str) -> dict[str, torch.Tensor]:
        content = encode_groups(start)
        content[BODY] = pack(
            TrainRequest(
                run_id="run",
                model_id="model",
                round=1,
                silo=silo,
                members=[silo],
                global_step=0,
                steps=1,
                batch_size=1,
                last_round=0,
                position=0,
                cohort=3,
            )
        )
        reply = liars[attack]("train", content, {})
        params = decode_groups(reply)["params"]
        moved = {key: params[key] - start["params"][key] for key in update}
        norm = math.hypot(*(float(one.norm()) for one in moved.values()))
        if silo != "honest":
            assert unpack(reply, TrainReport).update_norm == pytest.approx(norm, rel=1e-5)
        return moved

    liars = {one: attacks.Liars(["y", "z"], one, 0, answer) for one in attacks.ATTACKS}
    for attack, silo, factor in (
        ("reversed × 10", "y", -10.0),
        ("scaled × 30", "z", 60.0),
        ("equal, reversed", "y", -1.0),
        ("equal, reversed", "z", -1.0),  # as the first one, whose update is half as long
        ("reversed × 10", "honest", 2.0),
    ):
        for key, moved in sent(attack, silo).items():
            torch.testing.assert_close(moved, factor * update[key], rtol=1e-5, atol=1e-5)
    noise, other = sent("noise × 10", "y"), sent("noise × 10", "z")
    assert math.hypot(*map(torch.linalg.vector_norm, noise.values())) == pytest.approx(
        10 * 9.25**0.5, rel=1e-4
    )
    assert not torch.allclose(2 * noise["w"], other["w"])
    with pytest.raises(PhotonError, match="away"):
        sent("liars away", "z")


def abbie_run(
    model: str, seed: int, rate: float, perplexity: float, method: str = "Photon"
) -> dict[str, Any]:
    iterates = model.startswith("AbbIE")
    sweep = {str(r): perplexity * (1 + 0.01 * abs(r - 2) * (seed + 1)) for r in (1, 2, 4, 8)}
    return {
        "run": f"{model}; {method}-lr{rate}-seed{seed}",
        "model": model,
        "method": method,
        "rate": rate,
        "seed": seed,
        "operations_per_token": 2e6 if iterates else 1e6,
        "parameters": 1000,
        "tokens": 3_000_000,
        "bytes_up": 5e6,
        "perplexity": perplexity,
        "sweep": sweep if iterates else {},
        "angles": {str(r): 1 / r for r in (1, 2, 4, 8)} if iterates else {},
    }


def test_models_that_iterate_are_compared_at_their_best_rates(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    study, page, results = module("abbie"), tmp_path / "abbie.md", tmp_path / "abbie.jsonl"
    plain = "plain, equal parameters"
    lines = [
        abbie_run(model, 0, rate, perplexity)
        for model in ("AbbIE-D", plain)
        for rate, perplexity in ((0.004, 60.0), (0.0056, 50.0), (0.008, 55.0))
    ]
    assert next(study.search(lines[:2], "AbbIE-D", "Photon")).rate == 0.008
    assert study.tuned(lines, "AbbIE-D", "Photon") == 0.0056
    assert [case.seed for case in study.plan(lines) if case.model == plain and case.method == "Photon"] == [
        1,
        2,
    ]
    write_lines(results, *lines, abbie_run("AbbIE-D", 1, 0.0056, 52.0))
    study.STUDY.main(["table", "--output", str(page), "--results", str(results)])
    text = page.read_text()
    assert "| AbbIE-D | Photon | 60.0 | **50.0** | 55.0 |" in text
    assert "| AbbIE-D | 0.0056 | 51.00 | 50.0, 52.0 | 1,000 | 3,000,000 | 6.00 | 5.0 MB |" in text
    assert f"| {plain} | 0.0056 | 50.00 | 50.0 | 1,000 | 3,000,000 | 3.00 | 5.0 MB |" in text
    # By hand: (50 · 1.02 + 52 · 1.04) / 2 at r = 4; and that is 2 % and 4 % more than at r = 2.
    assert "| AbbIE-D | 51.77 | 51.00 | 52.54 | 55.62 | +2.0 % … +4.0 % | +6.0 % … +12.0 % |" in text
    assert "| AbbIE-D | 1.000 | 0.500 | 0.250 | 0.125 |" in text


def test_equal_operations_and_equal_depth_are_what_they_are_called(
    module: Callable[[str], ModuleType],
) -> None:
    study = module("abbie")
    iterating, plain, longer, deeper = (
        study.operations(model) * study.steps_of(model)
        for model in ("AbbIE-D", "plain, equal parameters", "plain, equal operations", "plain, equal depth")
    )
    assert plain < 0.8 * iterating
    assert longer == pytest.approx(iterating, rel=0.02)
    assert deeper == iterating


# --- instruct -------------------------------------------------------------------------------------------


@pytest.fixture
def known_functions(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kinds of conversations, without a look at what is installed."""
    chats = module("chats")
    words = [f"word{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(200)]
    told = [(f"do_{word}", f"Return {word} of a text.") for word in words]
    monkeypatch.setattr(chats, "documented", lambda: iter(told))
    return chats


def test_answers_are_right_and_no_question_is_both_learnt_and_asked(
    known_functions: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "qa.jsonl").write_text(
        "".join(
            json.dumps({"query": f"Question: Is {n} odd?\nAnswer:", "choices": ["no", "yes"], "gold": n % 2})
            + "\n"
            for n in range(200)
        )
    )
    assert set(known_functions.kinds_of(None)) == {"sums", "order", "last", "functions"}
    kinds = known_functions.write_all(tmp_path, 90, 30, tmp_path / "qa.jsonl")
    assert kinds == ["sums", "last", "functions", "qa"]
    right = {
        "sums": lambda a, b: f"{int(a) + int(b)}.",
        "last": lambda *words: f"{words[-1]}.",
        "qa": lambda n: "yes" if int(n) % 2 else "no",
    }
    asked_by = {
        "sums": r"What is (\d+) plus (\d+)\?",
        "last": r"Which word is the last: (\w+) (\w+) (\w+) (\w+)\?",
        "qa": r"Is (\d+) odd\?",
    }
    for kind in kinds:
        rows = (tmp_path / "chats" / f"{kind}.jsonl").read_text().splitlines()
        turns = [message for row in rows for message in json.loads(row)["messages"]]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 90
        learnt = {turns[n]["content"]: turns[n + 1]["content"] for n in range(0, 180, 2)}
        tasks = [json.loads(row) for row in (tmp_path / "tasks" / f"{kind}.jsonl").read_text().splitlines()]
        asked = {task["query"]: task["choices"][task["gold"]] for task in tasks}
        assert len(learnt) == 90
        assert len(asked) == 30
        assert not set(learnt) & set(asked)
        assert all(len(set(task["choices"])) == len(task["choices"]) for task in tasks)
        for question, answer in {**learnt, **asked}.items():
            if kind in right:
                found = re.fullmatch(asked_by[kind], question)
                assert found is not None
                assert answer == right[kind](*found.groups())
    # The same again, so that two machines have the same.
    known_functions.write_all(tmp_path / "again", 90, 30, tmp_path / "qa.jsonl")
    for file in (tmp_path / "again").rglob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / file.relative_to(tmp_path / "again")).read_bytes()


def instruct_run(method: str, rate: float, seed: int, perplexity: float, accuracy: float) -> dict[str, Any]:
    return {
        "run": f"Photon; own; {method}-lr{rate:g}-seed{seed}",
        "base": "Photon",
        "text": "own",
        "method": method,
        "rate": rate,
        "seed": seed,
        "bytes": {"up": 2e6, "down": 3e6} if method != "untuned" else {"up": 0.0, "down": 0.0},
        "perplexity": perplexity,
        "perplexities": {"sums": perplexity, "last": perplexity},
        "elsewhere": 500.0 if method == "local only" else None,
        "accuracy": accuracy,
        "accuracies": {"sums": accuracy, "last": accuracy},
    }


def test_ways_to_tune_are_compared_at_their_best_rates(
    module: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    study, page, results = module("instruct"), tmp_path / "instruct.md", tmp_path / "instruct.jsonl"
    lines = [
        instruct_run("untuned", 0.0, 0, 90.0, 0.25),
        *(
            instruct_run("federated", rate, 0, found, 0.5)
            for rate, found in ((0.001, 9.0), (0.002, 6.0), (0.004, 8.0))
        ),
        *(instruct_run("local only", rate, 0, found, 0.75) for rate, found in ((0.001, 4.0), (0.002, 3.0))),
    ]
    assert study.tuned(lines, "Photon", "own", "federated") == 0.002
    assert study.tuned(lines, "Photon", "own", "local only") is None
    left = [case for case in study.plan(lines, "Photon", "own") if case.method in ("federated", "local only")]
    assert [(case.method, case.rate, case.seed) for case in left] == [
        ("local only", 0.004, 0),
        ("federated", 0.002, 1),
        ("federated", 0.002, 2),
    ]
    # Every method has a grid of one length, wherever its rates lie.
    assert len({len(study.rates_of(base, method)) for base in study.BASES for method in study.METHODS}) == 1
    write_lines(results, *lines, instruct_run("federated", 0.002, 1, 7.0, 0.6))
    study.STUDY.main(["table", "--output", str(page), "--results", str(results)])
    text = page.read_text()
    assert "| untuned | – | 90.00 | 90.00 | – | 25.0 % | 25.0 % | – | – |" in text
    assert "| federated | 0.002 | 6.50 | 6.00, 7.00 | – | 55.0 % | 50.0 %, 60.0 % | 2.0 MB | 3.0 MB |" in text
    assert "| local only (search not ended) | 0.002 | 3.00 | 3.00 | 500.0 | 75.0 %" in text
    assert "| federated | 6.5, 55 % | 6.5, 55 % |" in text
    assert "| federated | 9.00 | **6.00** | 8.00 |" in text
