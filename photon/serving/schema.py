"""What clients of OpenAI's API may ask for, and what they are answered.

A setting that would be without effect is refused, unless it has the value of no effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from photon.serving.model import Message, Settings

_Word = Annotated[str, Field(min_length=1, max_length=1000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: Any = None
    refusal: None = None


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Any = None


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class _Request(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: _Word | Annotated[list[_Word], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Of these, the value that asks for nothing.
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Without effect on an answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None

    def most(self) -> int | None:
        """Return the most tokens of an answer, or None for as many as there is room for."""
        return self.max_tokens

    def settings(self) -> Settings:
        """Return how the answer is written."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Settings(
            most=self.most(),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(stop),
        )

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[_Turn], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: _Format | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    logprobs: Literal[False] | None = None

    @model_validator(mode="after")
    def _one_most(self) -> "ChatRequest":
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self

    def most(self) -> int | None:
        """Return the most tokens of an answer, or None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[Message]:
        """Return the conversation as templates know it: a developer speaks as the system."""
        return [
            {
                "role": "system" if turn.role == "developer" else turn.role,
                "content": turn.content
                if isinstance(turn.content, str)
                else "".join(part.text for part in turn.content),
            }
            for turn in self.messages
        ]


class CompletionRequest(_Request):
    """``POST /v1/completions``: one text, or one list of tokens, to continue."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[int], Field(min_length=1)]
    )
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    def most(self) -> int | None:
        """Return the most tokens of an answer: 16 where nothing is said, as in OpenAI's API."""
        return self.max_tokens or 16


def usage(prompt: int, answer: int) -> dict[str, int]:
    """Return how many tokens prompt and answer have."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error(message: str, *, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return the body of an answer that says what was wrong."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
