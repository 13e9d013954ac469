"""The capsules of scripts/bixbench: what builds them, and from end to end what they are for."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from photon.benchmarks.bixbench.choices import choices_of
from photon.benchmarks.bixbench.metrics import Figures
from photon.benchmarks.bixbench.paper import ROWS
from photon.benchmarks.bixbench.questions import read_questions
from photon.benchmarks.bixbench.records import Folder
from photon.benchmarks.bixbench.results import grade_run
from photon.benchmarks.bixbench.run import BenchmarkRun
from photon.benchmarks.bixbench.settings import GradeSettings, RunSettings
from photon.benchmarks.bixbench.solvers import ScriptedSolver
from photon.benchmarks.bixbench.source import Source
from photon.benchmarks.notebook.sandbox import Shut

SCRIPTS = Path(__file__).parents[3] / "scripts" / "bixbench"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """Import a script by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
        yield importlib.import_module


def test_there_are_thirty_questions_with_five_on_each_capsule(scripts: Any) -> None:
    questions = scripts("capsule_questions").QUESTIONS
    assert Counter(asked.capsule for asked in questions) == dict.fromkeys(scripts("capsule_data").CAPSULES, 5)
    assert len({asked.text for asked in questions}) == 30
    # No second way is the first one by another name, or another question's.
    assert len({asked.other for asked in questions}) == 30


@pytest.mark.parametrize(
    ("printed", "other", "same"),
    [
        ("310", 310, True),
        ("310", 311, False),
        ("0.409", 0.40924, True),
        ("0.409", 0.4098, False),
        ("1.2e-05", 1.24e-05, True),
        ("1.2e-05", 1.3e-05, False),
        ("CD79A", "CD79A", True),
        ("CD79A", "CD74", False),
        ("-0.05", -0.0549, True),
        ("845", 845.4, True),
        ("845", 846.4, False),
    ],
)
def test_both_ways_must_agree_to_the_last_digit(scripts: Any, printed: str, other: Any, same: bool) -> None:
    assert scripts("build").agree(printed, other) is same


def test_what_differs_is_not_built(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, questions, data = scripts("build"), scripts("capsule_questions"), scripts("capsule_data")

    def write(folder: Path) -> None:
        (folder / "x.csv").write_text("x\n1\n2\n")

    monkeypatch.setattr(build, "CAPSULES", {"toy": (write, "Toys")})
    monkeypatch.setattr(data, "CAPSULES", build.CAPSULES)
    asked = questions.Asked("toy", "Lines?", "print(len(open('x.csv').readlines()))", lambda folder: 3)
    monkeypatch.setattr(build, "QUESTIONS", (asked,))
    assert build.build(tmp_path) == 1
    (question,) = read_questions(tmp_path / "BixBench.jsonl").questions
    assert (question.ideal, question.categories, question.archive) == (
        "3",
        ("Toys",),
        "CapsuleFolder-toy.zip",
    )
    assert json.loads((tmp_path / "reference.json").read_text()) == {question.id: [asked.cell]}
    first = (tmp_path / "CapsuleFolder-toy.zip").read_bytes()
    build.build(tmp_path)
    assert (tmp_path / "CapsuleFolder-toy.zip").read_bytes() == first
    monkeypatch.setattr(build, "QUESTIONS", (questions.Asked("toy", "Lines?", asked.cell, lambda folder: 4),))
    with pytest.raises(SystemExit, match="one way says 3, the other 4"):
        build.build(tmp_path)


def test_the_papers_rows_are_the_counts_that_grading_again_gives(scripts: Any) -> None:
    rows = {(row.version, row.model): row.accuracy for row in ROWS if row.mode == "zero-shot"}
    for name, (total, correct, refused) in scripts("regrade").COUNTS.items():
        model = "gpt-4o" if "gpt-4o" in name else "Claude 3.5 Sonnet"
        version, regime = ("1.5" if total == 205 else "1.0"), ("mcq-refusal" if refused else "mcq")
        assert rows[version, model][regime] == Figures(total, correct, refused).accuracy


def test_grading_again_compares_every_row(scripts: Any, tmp_path: Path) -> None:
    regrade: ModuleType = scripts("regrade")
    head = "uuid,question,predicted,target,unsure,evaluation_mode,grade,correct,sure\n"
    (tmp_path / "a.csv").write_text(
        head + "1,Q,B,B,C,,1,True,False\n2,Q,C,A,C,,0,False,True\n3,Q,D,A,C,,1,True,False\n"
    )
    assert regrade.choices(tmp_path / "a.csv") == ((3, 1, 1), 1)
    (tmp_path / "b.csv").write_text(
        head + "1,Q,5,4.25,,str_verifier,1,True,False\n2,Q,x,y,,llm_verifier,0,False,False\n"
        '3,Q,9,"(1,2)",,range_verifier,1,True,False\n'
    )
    assert regrade.opened(tmp_path / "b.csv") == (2, 1)


@pytest.mark.slow
def test_the_reference_is_right_everywhere(scripts: Any, tmp_path: Path, shut: Shut) -> None:
    """All capsules, all questions, all regimes: data, sandbox, kernel, tools and graders together."""
    assert scripts("build").build(tmp_path / "capsules") == 30
    source = Source(str(tmp_path / "capsules"))
    cells = json.loads((tmp_path / "capsules" / "reference.json").read_text())
    asked = source.questions()
    assert asked.left_out == []
    for question in asked.questions:
        choices = choices_of(question, refusal=True)
        assert choices is not None
        assert len(choices.options) == 5
    folder = Folder(tmp_path / "out")
    done = BenchmarkRun(source, ScriptedSolver(cells), RunSettings(replicas=1), folder, shut).make(asked)
    assert done.failed == {}
    results = grade_run(folder, GradeSettings(), None)["regimes"]
    assert {name: (one["correct"], one["total"]) for name, one in results.items()} == {
        "open": (30, 30),
        "mcq-refusal": (30, 30),
        "mcq": (30, 30),
    }
