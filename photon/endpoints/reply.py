"""What an endpoint answers, as far as it is used: nothing of it is believed."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.endpoints.faults import EndpointError, Fault

#: Bytes of an answer, at most.
MOST_BYTES = 4 << 20
_MOST_CALLS = 64
#: Tokens of a question or an answer, at most; what is said beyond is not believed.
_MOST_TOKENS = 1 << 40
_Name = Annotated[str, Field(min_length=1, max_length=256)]


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants called.

    Attributes
    ----------
    id
        By which the tool's answer names the call.
    name
        Of the tool; it may be none of those that were offered.
    arguments
        JSON, as the model wrote it: it may be none.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes
    ----------
    content
        Its text; may be empty.
    tool_calls
        Tools that are to be called.
    finish
        Why it ended, as the endpoint says: ``stop``, ``length``, ``tool_calls``, …
    prompt_tokens, completion_tokens
        As the endpoint reports them; None where it does not.
    cached
        Whether it was there before: from the cache or a recording.
    """

    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached: bool = False

    def message(self) -> dict[str, Any]:
        """Return the answer as a turn of the conversation."""
        turn: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return turn

    def record(self) -> dict[str, Any]:
        """Return the answer as JSON values, which `of_record` reads."""
        made = {
            "message": self.message(),
            "finish_reason": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        }
        return {key: value for key, value in made.items() if value is not None}


class _Function(BaseModel):
    model_config = ConfigDict(strict=True)
    name: _Name
    arguments: str | dict[str, Any] = "{}"


class _Call(BaseModel):
    model_config = ConfigDict(strict=True)
    id: Annotated[str, Field(max_length=256)] = ""
    function: _Function


class _Turn(BaseModel):
    model_config = ConfigDict(strict=True)
    content: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=_MOST_CALLS)] | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True)
    message: _Turn
    finish_reason: Annotated[str, Field(max_length=100)] | None = None


class _Body(BaseModel):
    model_config = ConfigDict(strict=True)
    choices: list[_Choice]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    message: _Turn
    finish_reason: Annotated[str, Field(max_length=100)] | None = None
    prompt_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None
    completion_tokens: Annotated[int, Field(ge=0, le=_MOST_TOKENS)] | None = None


def of_body(data: bytes, agent: str) -> Reply:
    """Return the answer that the body of a chat completion has: its first choice.

    Raises
    ------
    EndpointError
        If it is no JSON object, no chat completion, or has neither text nor tool calls.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise EndpointError(Fault.NOT_JSON, agent, "the answer is no JSON") from None
    if not isinstance(values, dict):
        raise EndpointError(Fault.NOT_JSON, agent, "the answer is no JSON object")
    if values.get("choices") == []:
        raise EndpointError(Fault.EMPTY, agent, "the answer has no choices")
    try:
        choice = _Body.model_validate(values).choices[0]
    except ValidationError as error:
        raise EndpointError(Fault.MALFORMED, agent, _first(error)) from None
    usage = values.get("usage")
    told = usage if isinstance(usage, dict) else {}
    return _reply(
        choice.message,
        choice.finish_reason,
        _tokens(told.get("prompt_tokens")),
        _tokens(told.get("completion_tokens")),
        agent,
    )


def of_record(values: Any, agent: str) -> Reply:
    """Return the answer that a cache or a recording has.

    Raises
    ------
    EndpointError
        If it is none that `Reply.record` may have written.
    """
    try:
        record = _Record.model_validate(values)
    except ValidationError as error:
        raise EndpointError(Fault.MALFORMED, agent, _first(error)) from None
    return _reply(
        record.message,
        record.finish_reason,
        record.prompt_tokens,
        record.completion_tokens,
        agent,
        cached=True,
    )


def _reply(
    turn: _Turn,
    finish: str | None,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    agent: str,
    *,
    cached: bool = False,
) -> Reply:
    if turn.content is None and not turn.tool_calls:
        raise EndpointError(Fault.EMPTY, agent, "the answer has neither text nor tool calls")
    calls = tuple(
        ToolCall(
            call.id or f"call-{number}",
            call.function.name,
            call.function.arguments
            if isinstance(call.function.arguments, str)
            else json.dumps(call.function.arguments),
        )
        for number, call in enumerate(turn.tool_calls or ())
    )
    # Half of a character, as JSON may have it, can neither be written nor sent on.
    text = (turn.content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Reply(text, calls, finish, prompt_tokens, completion_tokens, cached)


def _tokens(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS
    return value if is_count else None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"the answer is no chat completion: {where}: {first['msg'][0].lower()}{first['msg'][1:]}"
