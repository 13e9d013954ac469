"""A model as an agent: both ways of acting, and a conversation that does not grow with the notebook."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from photon.benchmarks.bixbench import prompts
from photon.benchmarks.bixbench.choices import Choices
from photon.benchmarks.bixbench.model_solver import ModelSolver, action_in
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.rollout import StoppedError, roll_out
from photon.benchmarks.bixbench.settings import RunSettings
from photon.benchmarks.bixbench.solvers import Finished
from photon.benchmarks.notebook.document import Shown
from photon.benchmarks.notebook.environment import Observation
from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.endpoints.faults import EndpointError, Fault
from tests.endpoints.server import Server, completion, say, serving

QUESTION = Question("q", "c", "How many?", "3", ("1", "2", "4"), "str_verifier", None, (), "1.5")


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return the body of an answer that calls a tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return completion(None, tool_calls=[{"id": f"id-{name}", "type": "function", "function": function}])


class Desk:
    """An environment without a kernel: it says which state of the notebook it is in."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []
        self.answer: str | None = None

    def call(self, name: str, arguments: Any) -> Observation:
        self.done.append((name, arguments))
        if name == "submit_answer":
            self.answer = arguments["answer"]
            return Observation("taken", done=True)
        if name not in ("edit_cell", "list_workdir"):
            return Observation(f"There is no tool {name}", fault="unknown tool")
        if not isinstance(arguments, dict):
            return Observation("no object", fault="wrong arguments")
        return Observation(f"state {len(self.done)}")


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(backoff=0.01) as client:
        yield client


def rolled(
    client: Client, answers: list[dict[str, Any]], **settings: Any
) -> tuple[Any, Desk, list[dict[str, Any]]]:
    """Let a model that gives these answers, the last one again and again, work on a question."""
    desk, chosen = Desk(), RunSettings.model_validate(settings)
    with serving(lambda handler, n: say(answers[min(n, len(answers) - 1)])(handler, n)) as server:
        agent = Agent(name="m", endpoint=server.url, model="x", retries=0)
        worker = ModelSolver(agent, client, chosen).begin(QUESTION, 0)
        rollout = roll_out(worker, desk, chosen)  # type: ignore[arg-type]
    return rollout, desk, server.requests


def test_an_agent_by_tool_calls(client: Client) -> None:
    answers = [call("list_workdir"), call("edit_cell", contents="1"), call("submit_answer", answer="3")]
    rollout, desk, requests = rolled(client, answers)
    assert (rollout.end, rollout.answer) == ("answered", "3")
    assert desk.done == [
        ("list_workdir", {}),
        ("edit_cell", {"contents": "1"}),
        ("submit_answer", {"answer": "3"}),
    ]
    assert (rollout.cost.requests, rollout.cost.prompt_tokens, rollout.cost.completion_tokens) == (3, 21, 9)
    assert [tool["function"]["name"] for tool in requests[0]["tools"]] == [
        "list_workdir",
        "edit_cell",
        "submit_answer",
    ]
    assert [turn["role"] for turn in requests[2]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert requests[2]["messages"][2] == {
        "role": "tool",
        "tool_call_id": "id-list_workdir",
        "content": "state 1",
    }
    assert [step["tool"] for step in rollout.steps] == ["list_workdir", "edit_cell", "submit_answer"]


def test_earlier_states_of_the_notebook_are_left_out(client: Client) -> None:
    answers = [call("edit_cell", contents=str(n)) for n in range(3)] + [call("submit_answer", answer="3")]
    _, _, requests = rolled(client, answers)
    told = [turn["content"] for turn in requests[3]["messages"] if turn["role"] == "tool"]
    assert told == [prompts.OLD_STATE, prompts.OLD_STATE, "state 3"]
    _, _, requests = rolled(client, answers, hide_old_states=False)
    told = [turn["content"] for turn in requests[3]["messages"] if turn["role"] == "tool"]
    assert told == ["state 1", "state 2", "state 3"]


def test_an_agent_by_text(client: Client) -> None:
    answers = [
        completion("Let me see.\nACTION: list_workdir"),
        completion("ACTION: edit_cell\n```python\nx = 1\n```"),
        completion("ACTION: edit_cell 0\n```python\nx = 2\n```"),
        completion("So it is <answer> 3 </answer>"),
    ]
    rollout, desk, requests = rolled(client, answers, protocol="text")
    assert (rollout.end, rollout.answer) == ("answered", "3")
    assert [arguments for _, arguments in desk.done[1:3]] == [
        {"contents": "x = 1", "idx": None},
        {"contents": "x = 2", "idx": 0},
    ]
    # A model that knows no tools is sent none, and no turns but the user's and its own.
    assert "tools" not in requests[3]
    assert {turn["role"] for turn in requests[3]["messages"]} == {"user", "assistant"}
    assert requests[3]["messages"][4]["content"] == prompts.OLD_STATE


@pytest.mark.parametrize(
    ("text", "tool", "fault"),
    [
        ("```python\nx\n```", "edit_cell", None),
        ("```\nx", "edit_cell", None),
        ("ACTION: run_shell", "run_shell", None),
        ("ACTION: edit_cell", None, "no action"),
        ("I do not know.", None, "no action"),
        ("", None, "no action"),
        ("ACTION: edit_cell\n```python\nprint('<answer>no</answer>')\n```", "edit_cell", None),
    ],
)
def test_actions_in_text(text: str, tool: str | None, fault: str | None) -> None:
    found, _, wrong = action_in(text)
    assert (found, wrong) == (tool, fault)


def test_what_is_no_action_is_told_and_counted(client: Client) -> None:
    broken = completion(
        None,
        tool_calls=[{"id": "x", "type": "function", "function": {"name": "edit_cell", "arguments": "{"}}],
    )
    answers = [completion("Hm."), call("run_shell", command="ls"), broken, call("submit_answer", answer="3")]
    rollout, _, requests = rolled(client, answers)
    assert rollout.end == "answered"
    assert rollout.faults == {"no tool call": 1, "unknown tool": 1, "arguments are no JSON": 1}
    assert requests[1]["messages"][-1] == {"role": "user", "content": prompts.NO_CALL}
    rollout, _, requests = rolled(
        client, [completion("Hm."), completion("<answer>3</answer>")], protocol="text"
    )
    assert rollout.faults == {"no action": 1}
    assert requests[1]["messages"][-1]["content"] == prompts.NO_TEXT


def test_of_several_calls_the_first_is_done_and_all_are_answered(client: Client) -> None:
    both = call("list_workdir")
    both["choices"][0]["message"]["tool_calls"] += call("submit_answer", answer="1")["choices"][0]["message"][
        "tool_calls"
    ]
    rollout, desk, requests = rolled(client, [both, call("submit_answer", answer="3")])
    assert rollout.answer == "3"
    assert [name for name, _ in desk.done] == ["list_workdir", "submit_answer"]
    assert [turn["tool_call_id"] for turn in requests[1]["messages"] if turn["role"] == "tool"] == [
        "id-list_workdir",
        "id-submit_answer",
    ]


def test_an_agent_that_loops_is_stopped(client: Client) -> None:
    rollout, desk, _ = rolled(client, [call("list_workdir")], max_repeats=4)
    assert (rollout.end, rollout.answer, len(desk.done)) == ("repeats itself", None, 4)
    rollout, desk, _ = rolled(client, [call("list_workdir")], max_repeats=0, max_steps=7)
    assert (rollout.end, len(desk.done)) == ("steps", 7)
    rollout, _, _ = rolled(client, [call("list_workdir")], question_seconds=1e-9)
    assert rollout.end == "time"


def test_a_run_that_is_stopped_keeps_nothing_of_what_was_begun(client: Client) -> None:
    worker = ModelSolver(
        Agent(name="m", endpoint="http://127.0.0.1:9/v1", model="x"), client, RunSettings()
    ).begin(QUESTION, 0)
    with pytest.raises(StoppedError):
        roll_out(worker, Desk(), RunSettings(), lambda: True)  # type: ignore[arg-type]


def test_a_conversation_that_becomes_too_long_ends(client: Client) -> None:
    refused = say({"error": {"message": "too long"}}, 400)
    desk, settings = Desk(), RunSettings()
    with serving(lambda h, n: say(call("list_workdir"))(h, n) if n < 2 else refused(h, n)) as server:
        agent = Agent(name="m", endpoint=server.url, model="x", retries=0)
        rollout = roll_out(ModelSolver(agent, client, settings).begin(QUESTION, 0), desk, settings)  # type: ignore[arg-type]
        assert (rollout.end, len(rollout.steps)) == ("refused by the endpoint", 2)
        with pytest.raises(EndpointError) as raised:  # but who refuses at once has another reason
            roll_out(ModelSolver(agent, client, settings).begin(QUESTION, 0), desk, settings)  # type: ignore[arg-type]
        assert raised.value.fault == Fault.REFUSED


def asked_of(server: Server) -> str:
    content = server.requests[-1]["messages"][-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def test_answers_without_tools(client: Client) -> None:
    choices = Choices(("1", "3", "Insufficient information to answer the question"), "B", "C")
    with serving(say(completion("I think <answer>b</answer>"))) as server:
        solver = ModelSolver(
            Agent(name="m", endpoint=server.url, model="x"), client, RunSettings(images=True)
        )
        assert solver.answer(QUESTION, 0).answer == "b"
        assert "How many?" in asked_of(server)
        told = solver.choose(QUESTION, choices, None, 0)
        assert (told.answer, told.cost.completion_tokens) == ("B", 3)
        assert "(B) 3" in asked_of(server)
        finished = Finished(Shown("### Cell 0", ("aW1hZ2U=",)), "3")
        solver.choose(QUESTION, choices, finished, 0)
        assert "### Cell 0" in asked_of(server)
        assert "The answer that was given: 3" in asked_of(server)
        image = server.requests[-1]["messages"][-1]["content"][1]
        assert image["image_url"]["url"] == "data:image/png;base64,aW1hZ2U="
    with serving(say(completion("no tags"))) as server:
        solver = ModelSolver(Agent(name="m", endpoint=server.url, model="x"), client, RunSettings())
        assert solver.choose(QUESTION, choices, None, 0).answer is None


def test_another_replica_is_another_draw(client: Client) -> None:
    with serving(say(completion("<answer>1</answer>"))) as server:
        solver = ModelSolver(Agent(name="m", endpoint=server.url, model="x", seed=5), client, RunSettings())
        for replica in (0, 3):
            solver.answer(QUESTION, replica)
        assert [request["seed"] for request in server.requests] == [5, 8]
