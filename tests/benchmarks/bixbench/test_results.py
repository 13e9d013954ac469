"""Grades, tables and pages of runs that are there."""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from photon.benchmarks.bixbench import table
from photon.benchmarks.bixbench.judge import ModelJudge, rubric_hash
from photon.benchmarks.bixbench.page import write_report
from photon.benchmarks.bixbench.predictions import grade_predictions, read_predictions
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.records import Answer, Folder
from photon.benchmarks.bixbench.results import grade_run, read_grades
from photon.benchmarks.bixbench.rollout import Rollout
from photon.benchmarks.bixbench.settings import GradeSettings, RunSettings, read_settings
from photon.benchmarks.notebook.document import Notebook
from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.errors import PhotonError
from tests.endpoints.server import completion, say, serving

QUESTIONS = [
    Question("q1", "c1", "Which?", "a", ("b", "c", "d"), "llm_verifier", None, ("X",), "1.5"),
    Question("q2", "c1", "How much?", "(1,2)", ("(3,4)",), "range_verifier", None, ("X", "Y"), "1.5"),
    Question("q3", "c2", "What?", "e", ("f",), "magic", None, (), "1.5"),
]
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>\ud800"


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(backoff=0.01) as client:
        yield client


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    """A run of three questions and two replicas, one of which is missing."""
    folder = Folder(tmp_path / "run")
    folder.path.mkdir()
    identity = {"settings": RunSettings().identity(), "solver": {}, "version": "1.5"}
    about = {"name": "m", "replicas": 2, "regimes": ["open", "mcq-refusal"], "questions": 3}
    folder.begin({"identity": identity, "run": about}, QUESTIONS)
    for answer in (
        Answer("q1", 0, "open", predicted="an a", end="answered"),
        Answer("q1", 1, "open", predicted=HTML, end="answered"),
        Answer("q2", 0, "open", predicted="1.5", end="answered", faults={"unknown tool": 2}),
        Answer("q2", 1, "open", failed="endpoint: timeout", detail="no answer within 3 s"),
        Answer("q3", 0, "open", predicted="e", end="answered"),
        Answer("q1", 0, "mcq-refusal", predicted="B", target="B", refusal="C"),
        Answer("q1", 1, "mcq-refusal", predicted="C", target="B", refusal="C"),
        Answer(
            "q2", 0, "mcq-refusal", predicted=None, target="A", refusal="C", end="no answer in what was said"
        ),
    ):
        folder.add(answer)
    return folder


def test_what_is_missing_counts_as_wrong(run: Folder) -> None:
    found = grade_run(run, GradeSettings(), None)["regimes"]["open"]
    assert (found["total"], found["correct"], found["missing"], found["ungraded"]) == (6, 1, 2, 3)
    assert found["by"] == {
        "no judge": 2,
        "range": 1,
        "endpoint: timeout": 1,
        "unknown verifier magic": 1,
        "not made": 1,
    }
    assert found["accuracy"] == pytest.approx(1 / 6)
    assert found["categories"]["Y"]["accuracy"] == 0.5
    choice = grade_run(run, GradeSettings(), None)["regimes"]["mcq-refusal"]
    assert (choice["total"], choice["correct"], choice["refused"], choice["missing"]) == (6, 1, 1, 3)
    assert choice["coverage"] == pytest.approx(5 / 6)
    answered = grade_run(run, GradeSettings(denominator="answered"), None)["regimes"]["mcq-refusal"]
    assert (answered["total"], answered["correct"], answered["missing"]) == (2, 1, 3)


def test_a_judge_decides_what_rules_do_not(run: Folder, client: Client) -> None:
    def act(handler: Any, number: int) -> None:
        asked = server.requests[number]["messages"][0]["content"]
        # A grade that the answer itself brings is not the judge's.
        grade = "correct" if "Answer: an a" in asked else "incorrect"
        say(completion(f"It says <grade>refused</grade>, but <grade>{grade}</grade>"))(handler, number)

    with serving(act) as server:
        agent = Agent(name="j", endpoint=server.url, model="x", temperature=0)
        results = grade_run(run, GradeSettings(), ModelJudge(agent, client))
        found = results["regimes"]["open"]
        assert (found["correct"], found["ungraded"], found["by"]["judge"]) == (2, 1, 2)
        assert results["judge"]["rubric"] == rubric_hash()
        assert results["judge"]["temperature"] == 0
        # A number in a range needs none, unless that is asked for.
        assert len(server.requests) == 2
        grade_run(run, GradeSettings(range_grader="judge"), ModelJudge(agent, client))
        assert len(server.requests) == 5
        assert "Range: (1,2)" in str([request["messages"] for request in server.requests])


@pytest.mark.parametrize(
    ("act", "why"),
    [(say(completion("Hm.")), "judge: no grade"), (say({"error": "no"}, 404), "judge: refused")],
)
def test_a_judge_that_gives_no_grade_leaves_it_ungraded(
    run: Folder, client: Client, act: Any, why: str
) -> None:
    with serving(act) as server:
        agent = Agent(name="j", endpoint=server.url, model="x", retries=0)
        found = grade_run(run, GradeSettings(), ModelJudge(agent, client))["regimes"]["open"]
    assert (found["by"][why], found["ungraded"], found["correct"]) == (2, 3, 1)


def test_open_refusals_may_be_counted(run: Folder) -> None:
    run.add(Answer("q1", 0, "open", predicted="I cannot determine this.", end="answered"))
    assert grade_run(run, GradeSettings(), None)["regimes"]["open"]["coverage"] == 1.0
    counted = grade_run(run, GradeSettings(open_refusals="counted"), None)["regimes"]["open"]
    assert (counted["refused"], counted["coverage"]) == (1, pytest.approx(5 / 6))


def test_the_table_has_the_papers_rows_marked(run: Folder) -> None:
    rows = table.rows([grade_run(run, GradeSettings(), None)])
    mine = [row for row in rows if row[0] == "m"]
    assert [row[3:7] for row in mine] == [["open", "6", "1", "0.167"], ["mcq-refusal", "6", "1", "0.167"]]
    paper = {(row[0], row[2], row[3]): row[6] for row in rows if "†" in row[0]}
    assert paper["gpt-4o †", "zero-shot", "mcq-refusal"] == "0.039"
    assert paper["Claude 3.5 Sonnet †‡", "agent", "open"] == "0.218"
    assert {row[1] for row in rows if "†" in row[0]} == {"1.5"}
    assert rows[2][:7] == ["chance", "", "", "mcq-refusal", "", "", "0.200"]
    assert {len(row) for row in rows} == {len(table.COLUMNS)}


def test_pages_hold_what_models_wrote_as_text_alone(run: Folder, tmp_path: Path) -> None:
    notebook = Notebook()
    notebook.put("1", None)
    steps = [
        {"tool": HTML, "arguments": {"contents": HTML}, "said": HTML, "observation": HTML, "fault": HTML}
    ]
    rollout = Rollout("answered", HTML, steps)
    run.keep(replace(QUESTIONS[0], text=HTML), 0, rollout, notebook, {"model": HTML, "name": HTML}, None)
    grade_run(run, GradeSettings(), None)
    results = json.loads((run.path / "results.json").read_text())
    results["name"] = HTML
    (run.path / "results.json").write_text(json.dumps(results))
    assert write_report([run.path, run.path], tmp_path / "r.html") == 4
    pages = [tmp_path / "r.html", *(tmp_path / "r-questions").iterdir()]
    assert len(pages) == 4
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<(script|img)", text)
        assert "default-src 'none'" in text
    told = (tmp_path / "r-questions" / "q1.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in told
    overview = (tmp_path / "r.html").read_text()
    assert 'href="r-questions/q1.html"' in overview
    assert "endpoint: timeout: 1 missing" in overview
    assert "unknown tool: 2" in overview


def test_a_report_needs_grades(run: Folder, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no results; `photon bench bixbench grade` makes them"):
        write_report([run.path], tmp_path / "r.html")
    assert read_grades(run.path) == []


# --- recorded predictions -------------------------------------------------------------------------------

#: Of our own making, in the form of the authors' files: right, refused, wrong, right.
CHOSEN = [("B", "B", "C"), ("C", "A", "C"), ("d", "A", "C"), ("(a)", "A", "B")]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        made = csv.DictWriter(file, rows[0].keys())
        made.writeheader()
        made.writerows(rows)
    return path


def test_recorded_choices_are_graded_again(tmp_path: Path) -> None:
    rows = [
        {
            "uuid": f"u{n}",
            "question": "Which,\nof these?",
            "predicted": predicted,
            "target": target,
            "unsure": unsure,
        }
        for n, (predicted, target, unsure) in enumerate(CHOSEN)
    ]
    found = grade_predictions(read_predictions(write(tmp_path / "p.csv", rows)), GradeSettings(), None)
    assert [verdict.state for verdict in found] == ["correct", "refused", "incorrect", "correct"]
    empty = [{**row, "unsure": "empty"} for row in rows]
    found = grade_predictions(read_predictions(write(tmp_path / "p.csv", empty)), GradeSettings(), None)
    assert [verdict.state for verdict in found] == ["correct", "incorrect", "incorrect", "correct"]


def test_open_answers_are_graded_by_what_each_row_asks_for(tmp_path: Path) -> None:
    unsure = "It is impossible to say; insufficient data"
    given = [("3E-1", "0.3", "str_verifier"), ("5", "(1,2)", "range_verifier"), (unsure, "x", "llm_verifier")]
    rows = [
        {"uuid": f"u{n}", "question": "Q?", "predicted": a, "target": b, "unsure": "", "evaluation_mode": c}
        for n, (a, b, c) in enumerate(given, 1)
    ]
    verdicts = grade_predictions(read_predictions(write(tmp_path / "p.csv", rows)), GradeSettings(), None)
    assert [verdict.state for verdict in verdicts] == ["correct", "incorrect", "refused"]


def test_a_table_without_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no column target"):
        read_predictions(write(tmp_path / "p.csv", [{"question": "", "predicted": ""}]))
    with pytest.raises(PhotonError, match="cannot read the predictions"):
        read_predictions(tmp_path / "none.csv")


# --- settings -------------------------------------------------------------------------------------------


def test_settings_are_read_changed_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("max_steps: 40\nlimits: {cell_seconds: 600}\n")
    made = read_settings(RunSettings, file, ["replicas=2", "limits.memory_mib=1024", "regimes=[open]"])
    assert (made.max_steps, made.replicas, made.regimes) == (40, 2, ["open"])
    assert (made.limits.limits().cell_seconds, made.limits.limits().memory) == (600, 1 << 30)
    for change, told in (
        ("max_step=3", "max_step: unknown key; did you mean 'max_steps'"),
        ("limits.memory=3", "limits.memory: unknown key"),
        ("max_steps=none", "max_steps"),
        ("max_steps", "expected KEY=VALUE"),
        ("replicas.x=3", "replicas"),
        ("mode=agents", "mode"),
    ):
        with pytest.raises(PhotonError, match=re.escape(told)):
            read_settings(RunSettings, file, ["replicas=2", change])
    with pytest.raises(PhotonError, match="cannot be read"):
        read_settings(GradeSettings, tmp_path / "none.yaml", [])


def test_compat_is_as_upstream() -> None:
    made = read_settings(GradeSettings, None, ["compat=true"]).effective()
    assert (made.range_grader, made.partial_match, made.denominator) == ("judge", "upstream", "answered")
