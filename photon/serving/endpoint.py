"""An endpoint that speaks OpenAI's API: chats, completions, and the list of models."""

import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from photon.errors import PhotonError
from photon.serving.model import Answer, PromptError, ServedModel, Settings, TooLongError
from photon.serving.schema import ChatRequest, CompletionRequest, error, usage

#: Bytes of a request, at most.
MOST_BYTES = 4 << 20

#: How pydantic names alternatives.
_ALTERNATIVES = ("str", "constrained-str")

_NO_OBJECT = "a request has a body, an object in JSON, and says so: Content-Type: application/json"

_log = logging.getLogger(__name__)


def build_app(model: ServedModel, key: str | None) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    model
        What answers.
    key
        What clients must show. Without one, only those who call this machine by a loopback name are answered,
        so that no page in a browser can lead its own name here.
    """
    app = FastAPI(title="Photon", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Gate, key=key)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(PromptError, _prompt_refused)
    app.add_exception_handler(PhotonError, _cannot_write)
    app.add_exception_handler(Exception, _failed)
    made = int(time.time())
    entry = {"id": model.name, "object": "model", "created": made, "owned_by": "photon"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_name(name)
        return entry

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: ChatRequest) -> Response:
        _check_name(asked.model)
        prompt = await run_in_threadpool(model.encode_chat, asked.turns())
        return await _answered(request, model, prompt, asked.settings(), _ChatForm(model.name), asked)

    @app.post("/v1/completions")
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        _check_name(asked.model)
        first = asked.prompt[0] if isinstance(asked.prompt, list) else asked.prompt
        prompt = (
            await run_in_threadpool(model.encode, first)
            if isinstance(first, str)
            else [int(token) for token in asked.prompt]
        )
        return await _answered(request, model, prompt, asked.settings(), _TextForm(model.name), asked)

    def _check_name(name: str) -> None:
        if name != model.name:
            raise HTTPException(404, f"no model {name[:100]!r} here; it is called {model.name!r}")

    return app


# --- who is let in --------------------------------------------------------------------------------------


class _Gate:
    """Lets a request in before anything of its body is read: its key, its host, its size."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._key is None:
            if not is_loopback_name(headers.get("host", "")):
                return JSONResponse(error("call this endpoint by a loopback name, or serve with a key"), 403)
        elif scope["path"] != "/health":
            scheme, _, shown = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(shown.encode(), self._key.encode()):
                body = error("the key is missing or wrong", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return JSONResponse(error("a request says its length"), 411)
            if len(length) > 12 or int(length) > MOST_BYTES:
                return JSONResponse(error(f"a request has {MOST_BYTES} bytes at most"), 413)
        return None


def is_loopback_name(host: str) -> bool:
    """Return whether a ``Host`` header names this machine to itself."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


# --- answers --------------------------------------------------------------------------------------------


class _ChatForm:
    """Bodies of ``/v1/chat/completions``."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion", "choices": [choice]}

    def chunk(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        delta = {} if text is None else {"role": "assistant", "content": text}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class _TextForm:
    """Bodies of ``/v1/completions``."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        return self.chunk(text, finish)

    def chunk(self, text: str | None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "text_completion", "choices": [choice]}


async def _answered(
    request: Request,
    model: ServedModel,
    prompt: list[int],
    settings: Settings,
    form: _ChatForm | _TextForm,
    asked: ChatRequest | CompletionRequest,
) -> Response:
    answer = model.answer(prompt, settings)
    if asked.stream:
        events = _events(answer, form, with_usage=asked.with_usage)
        return StreamingResponse(events, media_type="text/event-stream")
    text = []
    async for piece in _pieces(answer):
        text.append(piece)
        if await request.is_disconnected():
            break
    body = form.whole("".join(text), answer.finish)
    return JSONResponse({**body, "usage": usage(answer.prompt_tokens, answer.tokens)})


async def _pieces(answer: Answer) -> AsyncIterator[str]:
    """Yield an answer's pieces; where nobody reads on, the writing ends."""
    pieces = iter(answer)
    following: Callable[[], str | None] = lambda: next(pieces, None)  # noqa: E731
    try:
        while (piece := await run_in_threadpool(following)) is not None:
            yield piece
    finally:
        answer.close()


async def _events(answer: Answer, form: _ChatForm | _TextForm, *, with_usage: bool) -> AsyncIterator[str]:
    last = {"usage": None} if with_usage else {}
    try:
        if isinstance(form, _ChatForm):
            yield _event({**form.chunk(""), **last})
        async for piece in _pieces(answer):
            yield _event({**form.chunk(piece), **last})
    except Exception as raised:  # the status has been sent, so the stream says it
        if isinstance(raised, PhotonError):
            _log.error("an answer ended early: %s", raised)
        else:
            _log.exception("an answer ended early")
        yield _event(error("the answer ended early", kind="server_error"))
        return
    yield _event({**form.chunk(None, answer.finish), **last})
    if with_usage:
        whole = {**form.chunk(None), "choices": [], "usage": usage(answer.prompt_tokens, answer.tokens)}
        yield _event(whole)
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


# --- refusals -------------------------------------------------------------------------------------------


async def _refused(_request: Request, raised: Exception) -> Response:
    status = raised.status_code if isinstance(raised, HTTPException) else 500
    detail = str(raised.detail) if isinstance(raised, HTTPException) else ""
    return JSONResponse(error(detail, code="not_found" if status == 404 else None), status)


async def _invalid(_request: Request, raised: Exception) -> Response:
    found = raised.errors()[0] if isinstance(raised, RequestValidationError) else {}
    kind = found.get("type", "")
    # Of a key that may be one thing or another, such as a word or a list of them, the first is told.
    parts = [str(part) for part in found.get("loc", ())[1:] if part not in _ALTERNATIVES]
    where = "" if kind == "json_invalid" else ".".join(parts)
    told = {
        "extra_forbidden": "not supported here",
        "json_invalid": "the body is no JSON",
        "missing": "missing" if where else _NO_OBJECT,
        "model_attributes_type": _NO_OBJECT,
    }.get(kind, str(found.get("msg", "")))
    return JSONResponse(error(f"{where}: {told}" if where else told), 400)


async def _prompt_refused(_request: Request, raised: Exception) -> Response:
    code = "context_length_exceeded" if isinstance(raised, TooLongError) else None
    return JSONResponse(error(str(raised), code=code), 400)


async def _cannot_write(_request: Request, raised: Exception) -> Response:
    _log.error("%s", raised)
    return JSONResponse(error("the model cannot answer; the log says why", kind="server_error"), 500)


async def _failed(_request: Request, _raised: Exception) -> Response:
    return JSONResponse(error("the model cannot answer; the log says why", kind="server_error"), 500)
