"""Asks agents: in parallel, with bounds on time, size and number, and each question once."""

import email.utils
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from photon.endpoints.agent import RECORDED, Agent, Message
from photon.endpoints.faults import PASSING, EndpointError, Fault
from photon.endpoints.recorded import Recording, ReplyCache
from photon.endpoints.reply import MOST_BYTES, Reply, of_body
from photon.link.bounded import one_line

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

#: Seconds: most between two attempts, also where the endpoint asks for more.
MOST_WAIT = 60.0
#: Characters of what an endpoint says of an error.
_MOST_SAID = 200
#: Statuses below 500 after which the same request may be answered: time-out and conflict.
_PASSING_STATUS = (408, 409)
#: Never through a proxy: this machine, by its names for itself.
_DIRECT = ("all://localhost", "all://127.0.0.1", "all://[::1]")


@dataclass
class Tally:
    """What was asked and answered.

    Attributes
    ----------
    answers
        How many there were, the cached ones among them.
    cached
        Answers from the cache or a recording.
    requests
        Requests that were sent, repeated ones among them.
    prompt_tokens, completion_tokens
        Of the answers that were not cached, as reported.
    unreported
        Answers that were not cached and came without both.
    faults
        Attempts that failed, by the name of the fault; those that a repetition mended among them.
    """

    answers: int = 0
    cached: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def count(self, reply: Reply) -> None:
        """Count an answer."""
        self.answers += 1
        if reply.cached:
            self.cached += 1
            return
        self.prompt_tokens += reply.prompt_tokens or 0
        self.completion_tokens += reply.completion_tokens or 0
        self.unreported += reply.prompt_tokens is None or reply.completion_tokens is None


class Client:
    """Asks agents; a context manager, which ends what is still being asked.

    Methods may be called from several threads.

    Parameters
    ----------
    cache
        Folder of answers; a question that has one there is not asked again. None: no cache.
    concurrency
        Requests at the same time, at most.
    most_bytes
        Bytes of an answer, at most.
    backoff
        Seconds before the first repetition; twice as many before each further one, up to `MOST_WAIT`.
    """

    def __init__(
        self,
        cache: Path | None = None,
        *,
        concurrency: int = 8,
        most_bytes: int = MOST_BYTES,
        backoff: float = 0.5,
    ) -> None:
        self.tally = Tally()
        self._cache = None if cache is None else ReplyCache(cache)
        self._concurrency, self._most_bytes, self._backoff = concurrency, most_bytes, backoff
        self._recordings: dict[str, Recording] = {}
        self._lock = threading.Lock()
        self._portal_manager: AbstractContextManager[BlockingPortal] | None = None
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> "Client":
        self._portal_manager = start_blocking_portal()
        self._portal = self._portal_manager.__enter__()
        self._portal.call(self._open)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._portal is not None
        assert self._portal_manager is not None
        try:
            # What is still asked is not waited for.
            self._portal.call(self._http.aclose)
            self._portal.call(self._portal.stop, True)
        finally:
            self._portal_manager.__exit__(kind, value, trace)
            self._portal = self._portal_manager = None

    def check(self, agents: Sequence[Agent]) -> None:
        """Raise the `PhotonError` of what an agent lacks here: its key, or its recording."""
        for agent in agents:
            agent.key()
            if agent.is_recorded:
                self._recording(agent)

    def chat(
        self,
        agent: Agent,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] = (),
        draw: int = 0,
    ) -> Reply:
        """Ask an agent and wait for the answer.

        Parameters
        ----------
        agent
            Whom.
        messages
            The conversation; the agent's system prompt is put before it.
        tools
            That it may call, as OpenAI's API describes them; they are passed on as they are.
        draw
            Another number asks for another answer to the same question.

        Raises
        ------
        EndpointError
            If there is no answer after all repetitions.
        """
        return self.submit(agent, messages, tools=tools, draw=draw).result()

    def submit(
        self,
        agent: Agent,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] = (),
        draw: int = 0,
    ) -> "Future[Reply]":
        """Begin to ask an agent, as `chat` does; the future has the answer, or the `EndpointError`."""
        assert self._portal is not None, "a client is used within `with`"
        return self._portal.start_task_soon(
            self._answer, agent, agent.conversation(messages), list(tools), draw
        )

    # --- in the thread of the portal ------------------------------------------------------------------------

    async def _open(self) -> None:
        mounts = dict.fromkeys(_DIRECT)
        # Time is bounded for the whole answer, by `anyio.fail_after`. No key follows a redirect elsewhere.
        limits = httpx.Limits(max_connections=self._concurrency)
        self._http = httpx.AsyncClient(timeout=None, limits=limits, mounts=mounts, follow_redirects=False)
        self._free = anyio.CapacityLimiter(self._concurrency)

    async def _answer(
        self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int
    ) -> Reply:
        reply = await self._known(agent, messages, tools, draw)
        if reply is None:
            reply = await self._asked(agent, messages, tools, draw)
            if self._cache is not None:
                self._cache.put(agent, messages, tools, draw, reply)
        self.tally.count(reply)
        return reply

    async def _known(
        self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int
    ) -> Reply | None:
        if agent.is_recorded:
            try:
                return self._recording(agent).answer(agent, messages, tools, draw)
            except EndpointError as error:
                self.tally.faults[error.fault] += 1
                raise
        return None if self._cache is None else self._cache.get(agent, messages, tools, draw)

    def _recording(self, agent: Agent) -> Recording:
        name = agent.endpoint.removeprefix(RECORDED)
        with self._lock:
            if name not in self._recordings:
                self._recordings[name] = Recording(Path(name))
            return self._recordings[name]

    async def _asked(
        self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int
    ) -> Reply:
        body = _body(agent, messages, tools, draw)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if (key := agent.key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(agent.retries + 1):
            try:
                async with self._free:
                    self.tally.requests += 1
                    with anyio.fail_after(agent.timeout):
                        return of_body(await self._sent(agent, headers, body, key), agent.name)
            except TimeoutError:
                error = EndpointError(Fault.TIMEOUT, agent.name, f"no answer within {agent.timeout:g} s")
            except (httpx.HTTPError, httpx.InvalidURL) as failure:
                said = one_line(str(failure), _MOST_SAID) or type(failure).__name__
                error = EndpointError(
                    Fault.UNREACHABLE, agent.name, f"{agent.endpoint} does not answer: {said}"
                )
            except EndpointError as failure:
                error = failure
            self.tally.faults[error.fault] += 1
            is_last = attempt == agent.retries
            if is_last or error.fault not in PASSING or (error.wait or 0) > MOST_WAIT:
                raise error
            pause = min(self._backoff * 2**attempt, MOST_WAIT) * random.uniform(0.5, 1.0)
            await anyio.sleep(max(pause, error.wait or 0))
        raise AssertionError("the last attempt returns or raises")

    async def _sent(self, agent: Agent, headers: dict[str, str], body: bytes, key: str | None) -> bytes:
        """Send a request once; return the body of a good answer."""
        url = f"{agent.endpoint.rstrip('/')}/chat/completions"
        async with self._http.stream("POST", url, headers=headers, content=body) as answer:
            if answer.headers.get("content-encoding", "identity").lower() != "identity":
                raise EndpointError(
                    Fault.MALFORMED, agent.name, "the answer is compressed, and none was asked for"
                )
            data = bytearray()
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > self._most_bytes:
                    raise EndpointError(
                        Fault.TOO_LARGE, agent.name, f"the answer has more than {self._most_bytes} bytes"
                    )
        if answer.status_code != 200:
            raise _failure(agent, answer, bytes(data), key)
        return bytes(data)


def _body(agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int) -> bytes:
    settings = {
        "temperature": agent.temperature,
        "top_p": agent.top_p,
        "max_tokens": agent.max_tokens,
        "seed": None if agent.seed is None else agent.seed + draw,
        "tools": list(tools) or None,
    }
    asked = {key: value for key, value in settings.items() if value is not None}
    # In ASCII, because half of a character that a model has written cannot be sent otherwise.
    return json.dumps({**agent.extra, "model": agent.model, "messages": list(messages), **asked}).encode()


def _failure(agent: Agent, answer: httpx.Response, data: bytes, key: str | None) -> EndpointError:
    status = answer.status_code
    said = one_line(_said(data, key), _MOST_SAID)
    why = f"{agent.endpoint} answers {status}{f': {said}' if said else ''}"
    if status == 429:
        fault = Fault.RATE_LIMITED
    elif status >= 500 or status in _PASSING_STATUS:
        fault = Fault.SERVER_ERROR
    else:
        fault = Fault.REFUSED
    wait = _retry_after(answer.headers.get("retry-after", ""))
    if wait is not None and wait > MOST_WAIT:
        why += f"; it wants to be asked again in {wait:.0f} s"
    return EndpointError(fault, agent.name, why, wait)


def _said(data: bytes, key: str | None) -> str:
    """Return what the body of an error says, without the key."""
    text = data[:4096].decode("utf-8", "replace")
    try:
        error = json.loads(data)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return text if key is None else text.replace(key, "…")


def _retry_after(text: str) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, as a number or a date; None for neither."""
    try:
        seconds = (
            float(text)
            if len(text) < 20
            else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if not math.isnan(seconds) else None
