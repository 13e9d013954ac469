"""A model at an endpoint as a solver: an agent by tool calls or by text, and answers without tools."""

import re
from typing import Any

from photon.benchmarks.bixbench import prompts
from photon.benchmarks.bixbench.choices import Choices, answer_in, letter_in
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.settings import RunSettings
from photon.benchmarks.bixbench.solvers import Action, Cost, Finished, Told, Worker
from photon.benchmarks.notebook.environment import TOOLS, Observation, as_arguments
from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.endpoints.reply import Reply, ToolCall

_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_EDIT = re.compile(r"ACTION:\s*edit_cell[ \t]*(\d{1,3})?", re.IGNORECASE)
_LIST = re.compile(r"ACTION:\s*list_workdir", re.IGNORECASE)
_OTHER = re.compile(r"ACTION:\s*(\w{1,60})", re.IGNORECASE)
#: Characters of what a model wrote that stay in the conversation.
_MOST_SAID = 120_000


class ModelSolver:
    """A model that is asked over an OpenAI-compatible API.

    Parameters
    ----------
    agent
        Endpoint, model and how it is asked.
    client
        What asks.
    """

    def __init__(self, agent: Agent, client: Client, settings: RunSettings) -> None:
        self.agent, self._client, self._settings = agent, client, settings

    @property
    def name(self) -> str:
        """Name of the agent."""
        return self.agent.name

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on; of a recording, what was recorded."""
        told = self.agent.identity()
        return {"solver": "model", **{key: value for key, value in told.items() if key != "endpoint"}}

    def begin(self, question: Question, replica: int) -> Worker:
        """Begin to work on a question with a notebook."""
        kind = _ByText if self._settings.protocol == "text" else _ByTools
        return kind(self, question, replica)

    def answer(self, question: Question, replica: int) -> Told:
        """Answer an open question without data."""
        reply = self.ask([_user(prompts.open_question(question))], replica)
        return Told(answer_in(reply.content), reply.content, _cost(reply))

    def choose(self, question: Question, choices: Choices, finished: Finished | None, replica: int) -> Told:
        """Choose an option, after work with a notebook or without."""
        seen = None if finished is None else (finished.notebook, finished.answer)
        text = prompts.choice(question, choices, seen)
        images = finished.notebook.images if finished is not None and self._settings.images else ()
        reply = self.ask([_user(text, images)], replica)
        return Told(letter_in(reply.content, choices.letters), reply.content, _cost(reply))

    def ask(self, messages: list[dict[str, Any]], replica: int, *, tools: bool = False) -> Reply:
        """Ask the model.

        Raises
        ------
        EndpointError
            If there is no answer after all repetitions.
        """
        return self._client.chat(self.agent, messages, tools=TOOLS if tools else (), draw=replica)

    @property
    def hides(self) -> bool:
        """Whether earlier states of the notebook are left out of the conversation."""
        return self._settings.hide_old_states


class _Conversation:
    """What both ways of acting have in common: the turns, without old states of the notebook."""

    def __init__(self, solver: ModelSolver, question: Question, replica: int, *, by_text: bool) -> None:
        self._solver, self._replica = solver, replica
        self._messages: list[dict[str, Any]] = [_user(prompts.task(question, by_text=by_text))]
        self._state: int | None = None

    def _add_state(self, turn: dict[str, Any], *, is_state: bool) -> None:
        if is_state and self._state is not None and self._solver.hides:
            self._messages[self._state] = {**self._messages[self._state], "content": prompts.OLD_STATE}
        self._messages.append(turn)
        if is_state:
            self._state = len(self._messages) - 1


class _ByTools(_Conversation):
    """Acts by tool calls."""

    def __init__(self, solver: ModelSolver, question: Question, replica: int) -> None:
        super().__init__(solver, question, replica, by_text=False)
        self._call: ToolCall | None = None

    def act(self) -> Action:
        reply = self._solver.ask(self._messages, self._replica, tools=True)
        self._messages.append(_bounded(reply))
        self._call = reply.tool_calls[0] if reply.tool_calls else None
        # Every call has to be answered; only the first one is done.
        self._rest = reply.tool_calls[1:]
        if self._call is None:
            return Action(None, said=reply.content, cost=_cost(reply), fault="no tool call")
        arguments = as_arguments(self._call.arguments)
        fault = "arguments are no JSON" if arguments is None else None
        return Action(self._call.name, arguments, reply.content, _cost(reply), fault)

    def see(self, observation: Observation) -> None:
        if self._call is None:
            self._messages.append(_user(prompts.NO_CALL))
            return
        is_state = self._call.name == "edit_cell" and observation.fault is None
        turn = {"role": "tool", "tool_call_id": self._call.id, "content": observation.text}
        self._add_state(turn, is_state=is_state)
        for call in self._rest:
            self._messages.append(
                {"role": "tool", "tool_call_id": call.id, "content": "Not done: one call at a time."}
            )
        if observation.images:
            # A tool's answer is a text; what is to be seen comes as the user's.
            self._messages.append(_user("The images of the notebook.", observation.images))


class _ByText(_Conversation):
    """Acts by what it writes."""

    def __init__(self, solver: ModelSolver, question: Question, replica: int) -> None:
        super().__init__(solver, question, replica, by_text=True)
        self._action: Action | None = None

    def act(self) -> Action:
        reply = self._solver.ask(self._messages, self._replica)
        self._messages.append(_bounded(reply))
        tool, arguments, fault = action_in(reply.content)
        self._action = Action(tool, arguments, reply.content, _cost(reply), fault)
        return self._action

    def see(self, observation: Observation) -> None:
        if self._action is None or self._action.tool is None:
            self._messages.append(_user(prompts.NO_TEXT))
            return
        is_state = self._action.tool == "edit_cell" and observation.fault is None
        self._add_state(_user(observation.text, observation.images), is_state=is_state)


def action_in(text: str) -> tuple[str | None, dict[str, Any] | None, str | None]:
    """Return the tool, its arguments, and what was wrong with it, of an action that was written as text."""
    edit, code = _EDIT.search(text), _CODE.search(text)
    if edit is not None and code is not None:
        number = None if edit[1] is None else int(edit[1])
        return "edit_cell", {"contents": code[1].rstrip(), "idx": number}, None
    answer = answer_in(text)
    if answer is not None:
        return "submit_answer", {"answer": answer}, None
    if _LIST.search(text):
        return "list_workdir", {}, None
    if code is not None:
        # Code alone can only be meant as a cell.
        return "edit_cell", {"contents": code[1].rstrip(), "idx": None}, None
    other = _OTHER.search(text)
    if other is not None and other[1].lower() != "edit_cell":
        return other[1], {}, None
    return None, None, "no action"


def _user(text: str, images: tuple[str, ...] = ()) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    shown = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{one}"}} for one in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *shown]}


def _bounded(reply: Reply) -> dict[str, Any]:
    turn = reply.message()
    if len(turn["content"]) > _MOST_SAID:
        turn["content"] = turn["content"][:_MOST_SAID]
    return turn


def _cost(reply: Reply) -> Cost:
    missing = reply.prompt_tokens is None or reply.completion_tokens is None
    return Cost(1, reply.prompt_tokens or 0, reply.completion_tokens or 0, int(missing))
