"""Runs from end to end: what fails is counted and named, the rest goes on, a second start does it alone."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from photon.benchmarks.bixbench.metrics import Figures
from photon.benchmarks.bixbench.model_solver import ModelSolver
from photon.benchmarks.bixbench.records import Folder
from photon.benchmarks.bixbench.results import grade_run
from photon.benchmarks.bixbench.run import BenchmarkRun, Done
from photon.benchmarks.bixbench.settings import GradeSettings, RunSettings
from photon.benchmarks.bixbench.solvers import RandomSolver, RefusingSolver, ScriptedSolver, Solver
from photon.benchmarks.bixbench.source import Source
from photon.benchmarks.notebook.sandbox import Shut
from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.errors import PhotonError
from tests.benchmarks.conftest import TOY_CODE
from tests.endpoints.server import completion, say, send, serving

ZERO_SHOT = RunSettings(mode="zero-shot", replicas=1)
FIELDS = {
    "problem_id",
    "agent_answer",
    "ideal_answer",
    "problem",
    "mcq_options",
    "mcq_question",
    "notebook_stats",
    "num_actions",
    "question_format",
    "refusal_option",
    "model",
    "metadata",
    "nb",
    "run_name",
}


def make(toy: Path, solver: Solver, settings: RunSettings, output: Path, how: Shut | None = None) -> Done:
    source = Source(str(toy))
    return BenchmarkRun(source, solver, settings, Folder(output), how or Shut()).make(source.questions())


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(backoff=0.01) as client:
        yield client


def counts(results: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (one["correct"], one["total"]) for name, one in results["regimes"].items()}


def test_the_reference_computes_from_the_data(toy: Path, tmp_path: Path, shut: Shut) -> None:
    settings, out = RunSettings(replicas=1, rerun="cell"), tmp_path / "out"
    done = make(toy, ScriptedSolver(TOY_CODE), settings, out, shut)
    assert (done.made, done.there, done.failed) == (6, 0, {})
    results = grade_run(Folder(out), GradeSettings(), None)
    assert counts(results) == {"open": (2, 2), "mcq-refusal": (2, 2), "mcq": (2, 2)}
    assert results["regimes"]["open"]["categories"]["Means"]["total"] == 1
    assert set(results["regimes"]["open"]["categories"]) == {"Means", "Statistics"}

    # What it leaves is what the authors' tools read, and what Jupyter opens.
    record = json.loads((out / "trajectories" / "toy-1-q1_replica_0.json").read_text())
    assert set(record) == FIELDS
    assert (record["agent_answer"], record["num_actions"]) == ("3.0", 3)
    assert record["metadata"]["distractors"] == ["(1.0,1.1)", "(4,5)", "(7,8)"]
    import nbformat

    notebook = nbformat.read(out / "trajectories" / "toy-1-q1_replica_0.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[1].outputs[0].text == "3.0\n"
    assert len(Folder(out).steps("toy-1-q1", 0)) == 3

    # A second start finds all of it there.
    done = make(toy, ScriptedSolver(TOY_CODE), settings, out, shut)
    assert (done.made, done.there) == (0, 6)

    # Another number in the data is another answer, by the same code.
    (toy / "toy-1" / "values.csv").write_text("x,group\n1,a\n2,a\n12,c\n")
    make(toy, ScriptedSolver(TOY_CODE), settings, tmp_path / "changed", shut)
    results = grade_run(Folder(tmp_path / "changed"), GradeSettings(), None)
    assert results["regimes"]["open"]["correct"] == 0
    answers = {
        key[0]: one.predicted
        for key, one in Folder(tmp_path / "changed").answers().items()
        if key[2] == "open"
    }
    assert answers == {"toy-1-q1": "5.0", "toy-1-q2": "c"}


def test_a_model_solves_a_capsule_in_three_steps(
    toy: Path, tmp_path: Path, shut: Shut, client: Client
) -> None:
    code = (
        "ACTION: edit_cell\n```python\nimport csv\n"
        "v = [float(r['x']) for r in csv.DictReader(open('values.csv'))]\nprint(sum(v) / 3)\n```"
    )

    def act(handler: Any, number: int) -> None:
        said = handler_asked[number]["messages"][-1]["content"]
        if said.startswith("You answer"):
            reply = "ACTION: list_workdir"
        elif "values.csv" in said and "### Output" not in said and "(A)" not in said:
            reply = code
        elif "(A)" in said:
            reply = "<answer>A</answer>"
        else:
            reply = f"<answer>{said.rpartition('```')[0].rpartition('```')[2].strip()}</answer>"
        send(handler, json.dumps(completion(reply)).encode())

    with serving(act) as server:
        handler_asked = server.requests
        agent = Agent(name="m", endpoint=server.url, model="x")
        settings = RunSettings(replicas=1, protocol="text", parallel=1)
        source = Source(str(toy))
        asked = source.questions()
        asked.questions = asked.questions[:1]
        folder = Folder(tmp_path / "out")
        done = BenchmarkRun(source, ModelSolver(agent, client, settings), settings, folder, shut).make(asked)
    assert done.failed == {}
    answer = folder.answers()["toy-1-q1", 0, "open"]
    assert (answer.predicted, answer.end, answer.steps, answer.cost.requests) == ("3.0", "answered", 3, 3)
    assert grade_run(folder, GradeSettings(), None)["cost"]["requests"] == 5


def test_simple_solvers_score_what_they_must(toy: Path, tmp_path: Path) -> None:
    """On many questions: a guesser 1 in 5 and 1 in 4, who refuses nothing, and 1 in 4 where it cannot."""
    lines = (toy / "BixBench.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    many = [json.dumps({**row, "question_id": f"toy-1-q{number}"}) for number in range(1_000)]
    (toy / "BixBench.jsonl").write_text("\n".join(many))
    regimes = {"regimes": ["mcq-refusal", "mcq"]}
    settings = ZERO_SHOT.model_copy(update=regimes)
    make(toy, RandomSolver(), settings, tmp_path / "random")
    found = grade_run(Folder(tmp_path / "random"), GradeSettings(), None)["regimes"]
    # Three standard errors of 1,000.
    assert found["mcq-refusal"]["accuracy"] == pytest.approx(0.2, abs=0.038)
    assert found["mcq"]["accuracy"] == pytest.approx(0.25, abs=0.041)
    make(toy, RefusingSolver(), settings, tmp_path / "refusing")
    found = grade_run(Folder(tmp_path / "refusing"), GradeSettings(), None)["regimes"]
    assert (found["mcq-refusal"]["accuracy"], found["mcq-refusal"]["coverage"]) == (0.0, 0.0)
    assert found["mcq"]["accuracy"] == pytest.approx(0.25, abs=0.041)
    assert found["mcq"]["coverage"] == 1.0


def test_a_guesser_on_ten_thousand_questions() -> None:
    """The formula alone, with the number that three standard errors of 0.012 and 0.013 need."""
    from photon.benchmarks.bixbench.choices import choices_of
    from photon.benchmarks.bixbench.grade import grade_choice
    from photon.benchmarks.bixbench.questions import Question

    solver = RandomSolver()
    for refusal, share, bound in ((True, 0.2, 0.012), (False, 0.25, 0.013)):
        states: Counter[str] = Counter()
        for number in range(10_000):
            question = Question(f"q{number}", "c", "?", "r", ("x", "y", "z"), "str_verifier", None, (), "1.5")
            choices = choices_of(question, refusal=refusal)
            assert choices is not None
            letter = solver.choose(question, choices, None, 0).answer
            states[grade_choice(letter, choices.target, choices.refusal).state] += 1
        assert Figures(10_000, states["correct"], 0).accuracy == pytest.approx(share, abs=bound)


# --- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (None, "endpoint: unreachable"),
        (lambda handler, number: time.sleep(1.5), "endpoint: timeout"),
        (say({"error": {"message": "slow down"}}, 429), "endpoint: rate_limited"),
        (lambda handler, number: send(handler, b"<html>"), "endpoint: not_json"),
        (say({"choices": 3}), "endpoint: malformed"),
        (say({"error": {"message": "no such model"}}, 404), "endpoint: refused"),
    ],
)
def test_an_endpoint_that_fails_leaves_answers_missing(
    toy: Path, tmp_path: Path, client: Client, act: Any, kind: str
) -> None:
    out = tmp_path / "out"
    answering = say(completion("<answer>A</answer>"))
    broken = threading.Event()
    with serving(
        lambda h, n: answering(h, n) if not broken.is_set() and h else (act or answering)(h, n)
    ) as server:
        url = server.url if act else "http://127.0.0.1:9/v1"
        broken.set()
        agent = Agent(name="m", endpoint=url, model="x", retries=0, timeout=0.5)
        done = make(toy, ModelSolver(agent, client, ZERO_SHOT), ZERO_SHOT, out)
        assert done.made == 0
        assert done.failed == {kind: 6}
        assert kind.removeprefix("endpoint: ") in done.examples[kind]
        results = grade_run(Folder(out), GradeSettings(), None)
        assert [one["missing"] for one in results["regimes"].values()] == [2, 2, 2]
        assert [one["total"] for one in results["regimes"].values()] == [2, 2, 2]
        # And when it is well again, these alone are asked.
        broken.clear()
        agent = agent.model_copy(update={"endpoint": server.url})
        before = len(server.requests)
        done = make(toy, ModelSolver(agent, client, ZERO_SHOT), ZERO_SHOT, out)
        assert (done.made, done.there, done.failed) == (6, 0, {})
        assert len(server.requests) - before == 6
        assert make(toy, ModelSolver(agent, client, ZERO_SHOT), ZERO_SHOT, out).there == 6


def test_one_that_fails_now_and_then_loses_that_alone(toy: Path, tmp_path: Path, client: Client) -> None:
    answering, failing = say(completion("<answer>A</answer>")), say({"error": {"message": "no"}}, 404)
    with serving(lambda h, n: failing(h, n) if n in (1, 4) else answering(h, n)) as server:
        agent = Agent(name="m", endpoint=server.url, model="x", retries=0)
        settings = ZERO_SHOT.model_copy(update={"parallel": 1})
        done = make(toy, ModelSolver(agent, client, settings), settings, tmp_path / "out")
        assert (done.made, done.failed) == (4, {"endpoint: refused": 2})
        done = make(toy, ModelSolver(agent, client, settings), settings, tmp_path / "out")
        assert (done.made, done.there, len(server.requests)) == (2, 4, 8)


def test_a_capsule_without_its_archive_is_missing_and_the_rest_goes_on(
    toy: Path, tmp_path: Path, shut: Shut
) -> None:
    row = json.loads((toy / "BixBench.jsonl").read_text().splitlines()[0])
    with (toy / "BixBench.jsonl").open("a") as file:
        file.write(json.dumps({**row, "question_id": "toy-2-q1", "data_folder": "toy-2.zip"}) + "\n")
        file.write(json.dumps({**row, "question_id": "toy-3-q1", "data_folder": None}) + "\nnonsense\n")
    settings = RunSettings(replicas=1, regimes=["open"])
    done = make(toy, RefusingSolver(), settings, tmp_path / "out", shut)
    assert (done.made, done.failed) == (2, {"capsule": 2})
    # Of the two, the one that was looked at first.
    told = done.examples["capsule"]
    assert "the capsule's archive is not there" in told or "names no archive of its capsule" in told
    assert done.left_out == [("line 5", "Expecting value: line 1 column 1 (char 0)")]
    (toy / "toy-1").rename(toy / "toy-2")
    done = make(toy, RefusingSolver(), settings, tmp_path / "out", shut)
    assert (done.made, done.there, done.failed) == (1, 2, {"capsule": 1})


@pytest.mark.slow
def test_choices_that_are_missing_do_not_repeat_the_work(toy: Path, tmp_path: Path, shut: Shut) -> None:
    out, code = tmp_path / "out", {name: ["raise SystemExit"] for name in TOY_CODE}
    make(toy, ScriptedSolver(code), RunSettings(replicas=1, regimes=["open"]), out, shut)
    kept = (out / "trajectories" / "toy-1-q1_replica_0.json").read_bytes()
    done = make(toy, ScriptedSolver(code), RunSettings(replicas=1), out, shut)
    assert (done.made, done.there) == (4, 2)
    assert (out / "trajectories" / "toy-1-q1_replica_0.json").read_bytes() == kept


def test_a_line_that_a_crash_has_torn_counts_as_none(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(toy, RandomSolver(), ZERO_SHOT, out)
    file = out / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    done = make(toy, RandomSolver(), ZERO_SHOT, out)
    assert (done.made, done.there) == (1, 5)
    assert make(toy, RandomSolver(), ZERO_SHOT, out).there == 6


def test_a_folder_holds_one_run(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(toy, RandomSolver(), ZERO_SHOT, out)
    with pytest.raises(PhotonError, match=r"holds answers made otherwise \(solver differ\)"):
        make(toy, RefusingSolver(), ZERO_SHOT, out)
    with pytest.raises(PhotonError, match=r"\(settings differ\)"):
        make(toy, RandomSolver(), ZERO_SHOT.model_copy(update={"shuffle_seed": 1}), out)
    # More replicas of the same are more of the same.
    assert make(toy, RandomSolver(), ZERO_SHOT.model_copy(update={"replicas": 3}), out).made == 12
    with Folder(out).claimed(), pytest.raises(PhotonError, match="another process works here"):
        make(toy, RandomSolver(), ZERO_SHOT, out)
    with pytest.raises(PhotonError, match="no run of this benchmark"):
        grade_run(Folder(tmp_path / "nothing"), GradeSettings(), None)


def test_a_disk_that_takes_nothing_ends_the_run(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from photon.errors import RunError

    def full(self: Folder, answer: Any) -> None:
        raise RunError("an answer cannot be kept (No space left on device)")

    monkeypatch.setattr(Folder, "add", full)
    with pytest.raises(RunError, match="No space left"):
        make(toy, RandomSolver(), ZERO_SHOT, tmp_path / "out")


def test_a_capsule_is_unpacked_once(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two questions of it begin at the same time, and none takes the data from under the other's kernel."""
    from photon.benchmarks.bixbench import run

    unpacked, times = run.unpacked, []

    def slow(archive: Path, home: Path) -> Path:
        times.append(archive)
        time.sleep(0.2)
        return unpacked(archive, home)

    monkeypatch.setattr(run, "unpacked", slow)
    source = Source(str(toy))
    bench = BenchmarkRun(source, RandomSolver(), RunSettings(), Folder(tmp_path / "out"), Shut())
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(bench._capsule, ["toy-1"] * 4))) == 1
    assert times == [toy / "toy-1"]
