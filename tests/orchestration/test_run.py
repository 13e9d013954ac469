"""A run can be stopped at any time and asks for what is missing alone; the command says what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from photon.commands.app import app
from photon.errors import PhotonError, RunError
from photon.orchestration.answer import Orchestra
from photon.orchestration.encoder import NGrams
from photon.orchestration.method import Method
from photon.orchestration.questions import Question
from photon.orchestration.run import ANSWERS, GIVE_UP, answer_all, folder_of, read_answers, settings_of
from photon.orchestration.who import who_of
from tests.endpoints.server import Handler, Server, completion, send, serving
from tests.orchestration.stub import Says, Stub, agents

QUESTIONS = [Question(id=f"q{n}", question=f"How much is {n} + 1?", answer=str(n + 1)) for n in range(6)]
PARALLEL = who_of("parallel", Method())


def run(folder: Path, says: Says, questions: list[Question] = QUESTIONS) -> tuple[Counter[str], Stub]:
    stub = Stub(says)
    players = Orchestra(stub.client, agents(2), NGrams(64), Method())
    settings = settings_of(questions, players.agents, PARALLEL)
    with folder_of(folder, settings) as lines:
        there = {line.id for line in lines}
        missing = [one for one in questions if one.id not in there]
        return answer_all(missing, players, PARALLEL, folder, lambda done, failed: None), stub


def right(name: str, asked: str, draw: int) -> str:
    return f"Answer: {int(asked.split()[3]) + 1}"


def test_what_failed_is_asked_for_again_and_nothing_else(tmp_path: Path) -> None:
    failed, _ = run(
        tmp_path / "run", lambda name, asked, draw: None if "2 +" in asked else right(name, asked, draw)
    )
    assert failed == {"timeout": 1}
    assert len(read_answers(tmp_path / "run")) == 5
    failed, stub = run(tmp_path / "run", right)
    assert not failed
    assert [asked.split("?")[0] for _, asked in stub.asked] == ["How much is 2 + 1"] * 2
    lines = read_answers(tmp_path / "run")
    assert sorted(line.id for line in lines) == [f"q{n}" for n in range(6)]
    assert all(line.right and line.parallel_right and line.calls == 2 for line in lines)
    assert run(tmp_path / "run", right)[1].asked == []


def test_a_torn_line_is_cut_off_and_its_question_asked_again(tmp_path: Path) -> None:
    run(tmp_path / "run", right)
    file = tmp_path / "run" / ANSWERS
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    _, stub = run(tmp_path / "run", right)
    assert len({asked for _, asked in stub.asked}) == 1
    assert sorted(file.read_bytes().splitlines()) == sorted(whole.splitlines())
    file.write_bytes(b'{"id": 5}\n' + whole)
    with pytest.raises(PhotonError, match=f"{ANSWERS}, line 1: no answer of this version"):
        run(tmp_path / "run", right)


def test_other_settings_and_other_owners_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, right)
    with pytest.raises(PhotonError, match=r"begun with other settings \(questions\)"):
        run(folder, right, QUESTIONS[:2])
    other = settings_of(QUESTIONS, agents(3), who_of("full", Method(psi_clip=None)))
    with pytest.raises(PhotonError, match=r"\(agents, policy, method\)"), folder_of(folder, other):
        pass
    mine = settings_of(QUESTIONS, agents(2), PARALLEL)
    with (
        folder_of(folder, mine),
        pytest.raises(PhotonError, match="another process is at work"),
        folder_of(folder, mine),
    ):
        pass
    (folder / "settings.json").write_text("{")
    with pytest.raises(PhotonError, match=r"settings.json: cannot be read"):
        run(folder, right)
    (folder / "settings.json").unlink()
    with pytest.raises(PhotonError, match=r"has answers and no settings.json"):
        run(folder, right)
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError, match="cannot be written"):
        run(tmp_path / "file", right)


def test_a_run_gives_up_when_nobody_answers(tmp_path: Path) -> None:
    many = [Question(id=str(n), question=f"How much is {n} + 1?") for n in range(50)]
    stub = Stub(lambda name, asked, draw: None)
    players = Orchestra(stub.client, agents(1), NGrams(64), Method())
    with (
        folder_of(tmp_path, settings_of(many, players.agents, PARALLEL)),
        pytest.raises(RunError, match=f"the last {GIVE_UP} questions have no answer: agent a0: no answer"),
    ):
        answer_all(many, players, PARALLEL, tmp_path, lambda done, failed: None)
    assert len(stub.asked) < 40


# --- the command ----------------------------------------------------------------------------------------


def invoke(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["orchestrate", *map(str, words)], standalone_mode=False)
    error = result.exception
    if error is not None and not isinstance(error, PhotonError | RunError):
        raise error
    return (0 if error is None else 2 if isinstance(error, PhotonError) else 1), result.output + str(
        error or ""
    )


def answering(handler: Handler, asked: dict[str, Any]) -> None:
    """Be wrong where the temperature is 1, but know a right answer when one is shown."""
    prompt = asked["messages"][-1]["content"]
    number = int(prompt.split()[3])
    knows = asked["temperature"] == 0 or f"Answer: {number + 1}" in prompt
    send(handler, json.dumps(completion(f"Answer: {number + 1 if knows else number}")).encode())


def serve_sums(seconds: float = 0.0) -> Any:
    def act(handler: Handler, number: int) -> None:
        time.sleep(seconds)
        answering(handler, asked_of(number))

    server: list[Server] = []

    def asked_of(number: int) -> dict[str, Any]:
        return server[0].requests[number]

    manager = serving(act)

    class Serving:
        def __enter__(self) -> Server:
            server.append(manager.__enter__())
            return server[0]

        def __exit__(self, *error: Any) -> None:
            manager.__exit__(*error)

    return Serving()


def files(folder: Path, server: Server, number: int = 6) -> tuple[Path, Path]:
    asked = [Question(id=f"q{n}", question=f"How much is {n} + 1?", answer=str(n + 1)) for n in range(number)]
    (folder / "sums.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in asked))
    (folder / "agents.yaml").write_text(
        f"defaults: {{endpoint: '{server.url}', model: m, retries: 0}}\n"
        "agents:\n  weak: {temperature: 1, copies: 2}\n  strong: {temperature: 0, copies: 1}\n"
    )
    return folder / "sums.jsonl", folder / "agents.yaml"


def test_policies_side_by_side_and_a_second_start(tmp_path: Path) -> None:
    with serve_sums() as server:
        sums, players = files(tmp_path, server)
        base = ("--agents", players, "--cache", tmp_path / "replies")
        code, said = invoke(sums, *base, "--policy", "parallel", "--output", tmp_path / "parallel")
        assert code == 0
        assert "accuracy:                 0.0% ±0.0% of 6" in said
        assert len(server.requests) == 18
        code, said = invoke(sums, *base, "--policy", "rule", "--output", tmp_path / "rule")
        # Drafts come from the cache; the third agent reads the first two, whom it knows better than.
        assert len(server.requests) == 24
        assert "edges per question:       2.00" in said
        # A second start asks for nothing.
        assert invoke(sums, *base, "--policy", "rule", "--output", tmp_path / "rule")[0] == 0
        assert len(server.requests) == 24
    figures = json.loads((tmp_path / "rule" / "summary.json").read_text())
    assert figures["calls"] == 4
    assert figures["prompt_tokens"] == 6 * 4 * 7
    # Everything can be done again without the server, from what was answered.
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(file.read_text() for file in (tmp_path / "replies").glob("*/*.json")))
    players.write_text(players.read_text().replace(server.url, "recorded:trace.jsonl"))
    code, _ = invoke(sums, "--agents", players, "--policy", "rule", "--output", tmp_path / "again")
    assert code == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert {**again, "last_start": 0} == {**figures, "last_start": 0}


def test_a_policy_is_trained_and_used(tmp_path: Path) -> None:
    with serve_sums() as server:
        sums, players = files(tmp_path, server)
        method = tmp_path / "method.yaml"
        method.write_text(
            "encoder: {size: 32}\npolicy: {logits: asymmetric, logit_bias: 0.0, dropout: 0.0}\n"
            "training: {updates: 20, batch: 4, graphs: 4, lr: 1e-2, lambda_sp: 0.1}\n"
        )
        policy = tmp_path / "policy.safetensors"
        words = ("train", sums, "--agents", players, "--method", method, "--output", policy)
        code, said = invoke(*words)
        assert code == 0
        assert "update 20: reward" in said
        first, asked = policy.read_bytes(), len(server.requests)
        # The same updates again, and nothing is asked for.
        assert invoke(*words)[0] == 0
        assert policy.read_bytes() == first
        assert len(server.requests) == asked
        code, said = invoke(
            sums,
            "--agents",
            players,
            "--policy",
            f"nexa:{policy}",
            "--output",
            tmp_path / "nexa",
            "--cache",
            tmp_path / "replies",
        )
        assert code == 0
        assert "policy:                   nexa:" in said
        (tmp_path / "more.jsonl").write_text(sums.read_text().replace("q", "r", 1).replace("rue", "que"))
        code, said = invoke("train", sums, tmp_path / "more.jsonl", *words[2:], "--rounds", 4)
        assert code == 0
        assert "round 4: sums reward" in said
        assert policy.read_bytes() != first


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with serve_sums() as server:
        sums, players = files(tmp_path, server)
        run_it = (sums, "--agents", players, "--output", tmp_path / "out", "--policy")
        for words, why in (
            ((*run_it, "paralel"), "did you mean 'parallel'"),
            ((*run_it, f"nexa:{tmp_path}/none"), "cannot read the policy"),
            ((*run_it, f"nexa:{sums}", "--method", sums), "has its own settings"),
            ((*run_it, "full", "--method", tmp_path / "none"), "cannot be read"),
            ((tmp_path / "none", *run_it[1:], "full"), "cannot read the questions"),
            (
                ("train", sums, "--agents", players, "--output", tmp_path / "p", "--rounds", 999),
                "--rounds=999",
            ),
            (("train", sums, sums, "--agents", players, "--output", tmp_path / "p"), "have the same name"),
            (("train", sums, "--agents", players, "--output", tmp_path), "is a folder; name a file in it"),
            (
                ("train", sums, "--agents", players, "--output", sums / "new" / "p"),
                f"{sums} is no folder",
            ),
        ):
            code, said = invoke(*words)
            assert (code, why in said) == (2, True), said
        unknown = tmp_path / "unknown.jsonl"
        unknown.write_text('{"question": "?"}\n{"question": "??"}\n')
        code, said = invoke("train", unknown, "--agents", players, "--output", tmp_path / "p")
        assert (code, "has no `answer`" in said) == (2, True)
        assert not server.requests
        assert not (tmp_path / "out").exists()
        players.write_text("agents: {one: {endpoint: 'http://127.0.0.1:1/v1', model: m, retries: 0}}")
        code, said = invoke("train", sums, "--agents", players, "--output", tmp_path / "p")
        assert (code, "one agent has nobody to read" in said) == (2, True)
        # Nobody listens there: all six fail, and it says how to go on.
        code, said = invoke(*run_it, "parallel")
        assert code == 1
        assert (
            "6 of 6 questions have no answer (unreachable 6); the same command asks for these alone" in said
        )


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed in the middle, then started again: each question has one line, and none is asked twice."""
    with serve_sums(0.03) as server:
        sums, players = files(tmp_path, server, 120)
        words = [sums, "--agents", players, "--policy", "parallel", "--output", tmp_path / "out"]
        command = [sys.executable, "-m", "photon.cli", "orchestrate", *map(str, words)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        answers = tmp_path / "out" / ANSWERS
        end = time.monotonic() + 60
        while not answers.exists() or answers.read_bytes().count(b"\n") < 10:
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before, asked = answers.read_bytes(), len(server.requests)
        assert before.count(b"\n") < 120
        code, said = invoke(*words)
        assert code == 0
        lines = [json.loads(line)["id"] for line in answers.read_bytes().splitlines()]
        assert sorted(lines) == sorted(f"q{n}" for n in range(120))
        assert "questions answered:       120" in said
        # What was on its way when it was killed is asked for again: no more than a few at once.
        assert len(server.requests) - 3 * 120 <= 8 + 8
        assert asked < 360


@pytest.fixture
def hears_interrupts() -> Iterator[None]:
    """As in a terminal: who runs tests in the background of a script ignores Ctrl-C, and hands it down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupted_run_ends_at_once_and_without_a_traceback(tmp_path: Path) -> None:
    with serve_sums(60.0) as server:
        sums, players = files(tmp_path, server, 20)
        words = [sums, "--agents", players, "--policy", "parallel", "--output", tmp_path / "out"]
        command = [sys.executable, "-m", "photon.cli", "orchestrate", *map(str, words)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not server.requests:
            assert time.monotonic() < end
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert time.monotonic() - began < 20
        assert process.returncode == 1
        assert b"Traceback" not in said
