"""Agents: an endpoint, a model, and how it is asked, from a YAML file."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator

from photon.components import nearest
from photon.config.explain import explain_validation
from photon.config.reader import read_file
from photon.config.section import Section
from photon.errors import PhotonError, printable

Message = Mapping[str, Any]
"""One turn of a chat, as OpenAI's API has it: ``role``, ``content`` and, with tools, ``tool_calls``."""

#: How the endpoint of an agent begins that answers from a file.
RECORDED = "recorded:"
#: Agents of one file, at most.
MOST_AGENTS = 256
#: Keys of a request that are an agent's own, or that would change the form of the answer.
_OWN = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "tools", "tool_choice", "stream", "n"}
)


class Agent(Section):
    """Who is asked, and how."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}$", description="Name, of one line.")
    endpoint: str = Field(
        min_length=1,
        max_length=2000,
        description="Base URL of an OpenAI-compatible API, up to and with `/v1`, or `recorded:FILE`.",
    )
    model: str = Field(min_length=1, max_length=500, description="Name of the model there.")
    system: str | None = Field(None, description="System prompt; none by default.")
    temperature: float | None = Field(None, ge=0, le=2, description="Null: the endpoint's own.")
    top_p: float | None = Field(None, gt=0, le=1, description="Null: the endpoint's own.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer.")
    seed: int | None = Field(
        None, ge=0, lt=2**62, description="Of the endpoint's choices; the number of the draw is added to it."
    )
    extra: dict[str, Any] = Field(default={}, description="Further keys of each request.")
    key_variable: str | None = Field(None, description="Environment variable that has the API key.")
    timeout: float = Field(120.0, gt=0, le=3600, description="Seconds for a whole answer, each time.")
    retries: int = Field(3, ge=0, le=20, description="Times that a failed request is repeated.")

    @model_validator(mode="after")
    def _possible(self) -> "Agent":
        if not self.is_recorded:
            try:
                parts = urlsplit(self.endpoint)
                _ = parts.port
            except ValueError as error:
                raise ValueError(f"endpoint={self.endpoint!r}: no address ({error})") from None
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(
                    f"endpoint={printable(self.endpoint)}: expected http://HOST:PORT/v1, https://…, "
                    f"or {RECORDED}FILE"
                )
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    "endpoint: an address has no user, password or query; name the variable that has the key "
                    "in key_variable"
                )
        if self.key_variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # It may be a key, so it is not shown.
            raise ValueError(
                "key_variable: not the name of an environment variable; a key itself is in no file"
            )
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"extra: JSON, in which it is sent, cannot hold it ({error})") from None
        if own := sorted(_OWN & set(self.extra)):
            raise ValueError(
                f"extra.{own[0]}: not a further key; an agent sets it itself, or it is not supported"
            )
        return self

    @property
    def is_recorded(self) -> bool:
        """Whether the agent answers from a file."""
        return self.endpoint.startswith(RECORDED)

    def key(self) -> str | None:
        """Return the API key, or None where none is named.

        Raises
        ------
        PhotonError
            If the variable is not set, or has what no header can.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise PhotonError(f"agent {self.name}: the environment variable {self.key_variable} is not set")
        if not key.isascii() or not key.isprintable():
            raise PhotonError(f"agent {self.name}: {self.key_variable} has characters that no key has")
        return key

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with the system prompt before them."""
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]

    def identity(self) -> dict[str, Any]:
        """Return what an answer depends on: everything but key, time-out and retries."""
        return self.model_dump(exclude={"key_variable", "timeout", "retries"})


class _Asked(Agent):
    """An agent as its file has it."""

    copies: int = Field(1, ge=1, le=MOST_AGENTS, description="Agents like this one: NAME-1, NAME-2, …")


_KEYS = set(_Asked.model_fields) - {"name"}
_TOP: tuple[Literal["agents", "defaults"], ...] = ("agents", "defaults")


def read_agents(path: Path) -> list[Agent]:
    """Read a file of agents, in its order.

    The file has ``agents``, a mapping of names to settings, and may have ``defaults``, settings of all.
    Recordings are looked for beside it.

    Raises
    ------
    PhotonError
        If it cannot be read, or has an unknown key (the nearest valid one is named) or a wrong value.
    """
    try:
        values = read_file(path)
    except PhotonError as error:
        raise PhotonError(f"agents {path}: cannot be read ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("agents"), dict) or not values["agents"]:
        raise PhotonError(f"agents {path}: expected a mapping `agents` of names to settings")
    for key in values:
        if key not in _TOP:
            raise PhotonError(f"agents {path}: {printable(key)}: unknown key{nearest(str(key), _TOP)}")
    defaults = _settings(values.get("defaults"), f"agents {path}: defaults")
    agents: list[Agent] = []
    for name, own in values["agents"].items():
        where = f"agents {path}: agents.{printable(name)}"
        agents += _agents(name, {**defaults, **_settings(own, where)}, path, where)
        if len(agents) > MOST_AGENTS:
            raise PhotonError(f"agents {path}: more than {MOST_AGENTS} agents; make them fewer")
    names = [agent.name for agent in agents]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PhotonError(f"agents {path}: {twice[0]} is the name of two agents; rename one")
    return agents


def _settings(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PhotonError(f"{where}: expected settings, as in {{temperature: 0.8}}")
    for key in value:
        if key not in _KEYS:
            raise PhotonError(f"{where}.{printable(key)}: unknown key{nearest(str(key), _KEYS)}")
    return value


def _agents(name: Any, settings: dict[str, Any], path: Path, where: str) -> list[Agent]:
    for key in ("endpoint", "model"):
        if key not in settings:
            raise PhotonError(f"{where}.{key}: missing; give it here or in defaults")
    try:
        asked = _Asked.model_validate({"name": str(name), **settings})
        values = asked.model_dump(exclude={"copies"})
        if asked.is_recorded:
            file = path.parent / asked.endpoint.removeprefix(RECORDED)
            values["endpoint"] = f"{RECORDED}{file}"
        if asked.copies == 1:
            return [Agent.model_validate(values)]
        return [
            Agent.model_validate({**values, "name": f"{name}-{number}"})
            for number in range(1, asked.copies + 1)
        ]
    except ValidationError as error:
        raise PhotonError(f"{where}: {explain_validation(error, _KEYS)}") from error
