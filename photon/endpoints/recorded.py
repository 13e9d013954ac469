"""Answers that are there already: a cache on disk, and recordings that stand for an endpoint."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from photon.endpoints.agent import Agent, Message
from photon.endpoints.faults import EndpointError, Fault
from photon.endpoints.reply import MOST_BYTES, Reply, of_record
from photon.errors import PhotonError, printable
from photon.files.atomic import write_text
from photon.files.hashing import hash_of

#: Bytes of a recording, at most.
_MOST_RECORDING = 512 << 20


def _hash(values: Any) -> str:
    return hash_of(json.dumps(values, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass"))


class ReplyCache:
    """A folder with a file for each answer, named by the hash of agent, messages, tools and draw.

    A file has a line of JSON, so ``cat FOLDER/*/*.json`` is a recording.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int) -> Reply | None:
        """Return the answer that is kept; None if there is none, or it is damaged."""
        path = self._path(agent, messages, tools, draw)
        try:
            if path.stat().st_size > 4 * MOST_BYTES:
                return None
            return of_record(json.loads(path.read_bytes())["reply"], agent.name)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, EndpointError):
            return None

    def put(
        self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int, reply: Reply
    ) -> None:
        """Keep an answer; two that write the same leave one of them whole."""
        line = {"agent": agent.name, "messages": list(messages), "tools": list(tools), "draw": draw}
        text = json.dumps({**line, "reply": reply.record()}, ensure_ascii=True)
        write_text(self._path(agent, messages, tools, draw), f"{text}\n", flush=False)

    def _path(self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int) -> Path:
        key = _hash([agent.identity(), list(messages), list(tools), draw])
        return self._folder / key[:2] / f"{key[2:42]}.json"


class Recording:
    """Answers of a JSON Lines file, by agent, messages, tools and draw.

    A line has ``agent``, ``messages`` (with the system prompt), ``reply`` and, where there are any, ``tools``
    and ``draw``; or ``fault`` in place of the reply: the name of what goes wrong.

    Raises
    ------
    PhotonError
        If it cannot be read, or a line is none of these.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers: dict[str, Reply | Fault] = dict(self._read())

    def answer(self, agent: Agent, messages: Sequence[Message], tools: Sequence[Any], draw: int) -> Reply:
        """Return the recorded answer.

        Raises
        ------
        EndpointError
            If there is none, or a fault is recorded.
        """
        found = self._answers.get(_hash([agent.name, list(messages), list(tools), draw]))
        if found is None:
            raise EndpointError(
                Fault.NOT_RECORDED, agent.name, f"{printable(self._path)} has no answer to these messages"
            )
        if isinstance(found, Fault):
            raise EndpointError(found, agent.name, f"recorded in {printable(self._path)}")
        return found

    def _read(self) -> Iterator[tuple[str, "Reply | Fault"]]:
        shown = printable(self._path)
        try:
            if self._path.stat().st_size > _MOST_RECORDING:
                raise PhotonError(f"{shown}: a recording has {_MOST_RECORDING} bytes at most; split it")
            lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise PhotonError(f"{shown}: cannot read the recording ({error})") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield self._entry(line, f"{shown}, line {number}")

    @staticmethod
    def _entry(line: str, where: str) -> tuple[str, "Reply | Fault"]:
        try:
            values = json.loads(line)
            agent, messages = values["agent"], values["messages"]
            key = _hash([agent, messages, values.get("tools", []), values.get("draw", 0)])
            if "fault" in values:
                return key, Fault(values["fault"])
            return key, of_record(values["reply"], str(agent))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, EndpointError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise PhotonError(
                f"{where}: no recorded answer ({printable(why)[:200]}); a line has agent, messages and reply"
            ) from None
