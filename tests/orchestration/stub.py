"""Agents whose answers a test writes."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, cast

from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.endpoints.faults import EndpointError, Fault
from photon.endpoints.reply import Reply

Says = Callable[[str, str, int], str | None]
"""Makes an answer of an agent's name, what it is asked, and the number of the draw; None: it fails."""


class Stub:
    """Answers at once, and remembers who was asked what."""

    def __init__(self, says: Says) -> None:
        self.says = says
        self.asked: list[tuple[str, str]] = []

    def submit(
        self, agent: Agent, messages: Sequence[Any], *, tools: Sequence[Any] = (), draw: int = 0
    ) -> Future[Reply]:
        (message,) = messages
        self.asked.append((agent.name, message["content"]))
        future: Future[Reply] = Future()
        said = self.says(agent.name, message["content"], draw)
        if said is None:
            future.set_exception(EndpointError(Fault.TIMEOUT, agent.name, "no answer"))
        else:
            future.set_result(Reply(said, prompt_tokens=10, completion_tokens=2))
        return future

    def chat(self, agent: Agent, messages: Sequence[Any], **settings: Any) -> Reply:
        return self.submit(agent, messages, **settings).result()

    @property
    def client(self) -> Client:
        return cast(Client, self)


def agents(number: int) -> list[Agent]:
    return [Agent(name=f"a{one}", endpoint="http://127.0.0.1:1/v1", model="m") for one in range(number)]
