"""The endpoint, asked by OpenAI's own client."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from photon.commands.app import app
from photon.errors import PhotonError
from photon.evaluation.generate import generate_text
from photon.serving.endpoint import MOST_BYTES, build_app, is_loopback_name
from photon.serving.listen import listen, read_key
from photon.serving.model import ServedModel

from .conftest import POSITIONS

openai = pytest.importorskip("openai")

KEY = "0123456789abcdef"


@contextmanager
def running(model: ServedModel, key: str | None = None) -> Iterator[str]:
    """Serve a model from a thread; the address of the endpoint."""
    with listen("127.0.0.1", 0, key) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(model, key), log_level="error"))
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


@pytest.fixture
def base_client(base: ServedModel) -> Iterator[Any]:
    with (
        running(base) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


@pytest.fixture
def chat_client(talker: ServedModel) -> Iterator[Any]:
    with (
        running(talker) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


GREEDY = {"model": "base", "prompt": "abc", "max_tokens": 30, "temperature": 0}
TURNS = [{"role": "user", "content": "abc"}]
ASKED = {"model": "talker", "messages": TURNS, "max_tokens": 30, "temperature": 0}


def test_models_and_completions(base_client: Any, base: ServedModel, export: Path) -> None:
    assert [model.id for model in base_client.models.list()] == ["base"]
    assert base_client.models.retrieve("base").id == "base"
    whole = base_client.completions.create(**GREEDY)
    wanted = generate_text(export, "abc", max_new_tokens=30, temperature=0)
    assert "abc" + whole.choices[0].text == wanted
    assert whole.choices[0].finish_reason == "length"
    prompt = base.encode("abc")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 30)
    assert whole.usage.total_tokens == len(prompt) + 30
    for same in (["abc"], prompt):
        assert base_client.completions.create(**{**GREEDY, "prompt": same}).choices == whole.choices
    # As in OpenAI's API, 16 tokens where nothing is said, unless the text ends, and a temperature of 1.
    some = [base_client.completions.create(model="base", prompt="abc") for _ in range(8)]
    ended = [one.usage.completion_tokens for one in some if one.choices[0].finish_reason == "length"]
    assert set(ended) == {16}
    assert len({one.choices[0].text for one in some}) > 1
    texts = {
        base_client.completions.create(model="base", prompt="abc", seed=1).choices[0].text for _ in range(3)
    }
    assert len(texts) == 1


def test_streams_are_the_same_text_and_end_with_the_count(base_client: Any) -> None:
    whole = base_client.completions.create(**GREEDY)
    chunks = list(
        base_client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )
    *texts, last = chunks
    assert len(texts) > 3
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in texts)
    assert {chunk.id for chunk in chunks} == {last.id}
    plain = list(base_client.completions.create(**GREEDY, stream=True))
    assert len(plain) == len(texts)


def test_stop_words_end_an_answer_and_are_not_in_it(base_client: Any) -> None:
    text = base_client.completions.create(**GREEDY).choices[0].text
    word = text[6:9]
    stopped = base_client.completions.create(**GREEDY, stop=[word, "nowhere"])
    assert stopped.choices[0].text == text[: text.find(word)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 30
    streamed = base_client.completions.create(**GREEDY, stop=word, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.choices[0].text


def test_chats(chat_client: Any, talker: ServedModel) -> None:
    whole = chat_client.chat.completions.create(**ASKED)
    assert whole.choices[0].message.role == "assistant"
    prompt = talker.encode_chat(TURNS)
    assert whole.usage.prompt_tokens == len(prompt)
    continued = chat_client.completions.create(model="talker", prompt=prompt, max_tokens=30, temperature=0)
    assert whole.choices[0].message.content == continued.choices[0].text
    chunks = list(chat_client.chat.completions.create(**ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == continued.choices[0].text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"
    # Text in parts, a developer's words, and the newer name of the bound.
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "bc"}]}]
    same = chat_client.chat.completions.create(
        model="talker", messages=parts, max_completion_tokens=30, temperature=0, user="somebody"
    )
    assert same.choices[0].message.content == continued.choices[0].text
    counted = [
        chat_client.chat.completions.create(
            **{**ASKED, "messages": [{"role": role, "content": "d"}, *TURNS]}
        ).usage
        for role in ("system", "developer")
    ]
    assert counted[0] == counted[1]
    # Without a bound, as many tokens as there is room for.
    chat = chat_client.chat.completions.create(model="talker", messages=TURNS, temperature=0)
    assert chat.usage.total_tokens == POSITIONS or chat.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 2}, "n: "),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"reply": True}}, "reply: not supported here"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_completion_tokens": 4}, "max_tokens and max_completion_tokens differ"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_would_have_no_effect_is_refused(chat_client: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(said)):
        chat_client.chat.completions.create(**{**ASKED, **changes})
    # What asks for nothing may be said.
    chat_client.chat.completions.create(
        **{**ASKED, "max_tokens": 1}, n=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={}
    )


def test_wrong_models_prompts_and_bodies(chat_client: Any, base_client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="it is called 'base'"):
        base_client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.NotFoundError):
        base_client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        base_client.embeddings.create(model="base", input="a")
    with pytest.raises(openai.BadRequestError, match="shorten it") as refused:
        chat_client.chat.completions.create(
            **{**ASKED, "messages": [{"role": "user", "content": "a " * 999}]}
        )
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        base_client.chat.completions.create(**{**ASKED, "model": "base"})
    with pytest.raises(openai.BadRequestError, match="none of the model's"):
        base_client.completions.create(model="base", prompt=[1 << 30])
    url = f"{base_client.base_url}completions"
    for body in (b"", b"{", b"[]", b'{"model": "base"}', b"\xff"):
        answer = httpx.post(url, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, set(answer.json())) == (400, {"error"})


def test_who_is_let_in(base: ServedModel, talker: ServedModel) -> None:
    with running(base, KEY) as address:
        for key in ("-", KEY + "0", KEY[:-1], "é"):
            shown = {"Authorization": f"Bearer {key}".encode()}
            answer = httpx.get(f"{address}/v1/models", headers=shown)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        # The key is asked for before the body is looked at.
        assert httpx.post(f"{address}/v1/completions", content=b"{").status_code == 401
        client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY)
        assert client.completions.create(**GREEDY).usage.completion_tokens == 30
        bearer = {"Authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{address}/v1/models", headers={**bearer, "Host": "a.example"}).status_code == 200
    with running(base) as address:
        for host, status in {
            "evil.example": 403,
            "localhost:1": 200,
            "[::1]:1": 200,
            "127.0.0.1.a": 403,
        }.items():
            assert httpx.get(f"{address}/v1/models", headers={"Host": host}).status_code == status, host
        large = httpx.post(f"{address}/v1/completions", content=b" " * (MOST_BYTES + 1))
        assert large.status_code == 413
        unbounded = httpx.post(f"{address}/v1/completions", content=iter([b"{}"]))
        assert unbounded.status_code == 411


def test_loopback_names() -> None:
    for name in ("localhost", "LOCALHOST:80", "127.0.0.1", "127.3.2.1:8000", "[::1]", "[::1]:8000"):
        assert is_loopback_name(name), name
    for name in (
        "",
        "localhost.example",
        "10.0.0.1",
        "[::]",
        "0.0.0.0",
        "example:127",
        "[::1",
        "::1.example",
    ):
        assert not is_loopback_name(name), name


def test_a_client_that_leaves_ends_the_writing(base: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = ServedModel.write, []

    def slow(self: ServedModel, prompt: Any, settings: Any, most: int, to: Any) -> None:
        put = to.put

        def slowly(value: Any) -> None:
            written.append(value)
            time.sleep(0.02)
            put(value)

        to.put = slowly
        write(self, prompt, settings, most, to)

    monkeypatch.setattr(ServedModel, "write", slow)
    body = {**GREEDY, "max_tokens": 200}
    with running(base) as address:
        with httpx.stream("POST", f"{address}/v1/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_bytes())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body, timeout=0.5)
        deadline = time.monotonic() + 10
        count = -1
        while count != len(written) and time.monotonic() < deadline:
            count = len(written)
            time.sleep(0.3)
        assert len(written) < 150


# --- the command ----------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert isinstance(result.exception, PhotonError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_what_cannot_be_served_is_one_line(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHOTON_SERVE_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} (Address already in use)" in refused(export, "--port", port)
    assert "needs a key" in refused(export, "--host", "0.0.0.0", "--port", 0)
    assert "needs a key" in refused(export, "--host", "::", "--port", 0)
    assert "no such address" in refused(export, "--host", "nowhere.invalid", "--port", 0)
    assert "nor an exported model" in refused(tmp_path, "--port", 0)
    (export / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "no tokenizer.json" in refused(export, "--port", 0)
    key = tmp_path / "key"
    assert "cannot read the key" in refused(export, "--key-file", key)
    key.write_text(KEY)
    key.chmod(0o644)
    assert "other users can read" in refused(export, "--key-file", key)
    key.chmod(0o600)
    assert read_key(key) == KEY
    for bad in ("short", KEY + " " + KEY, "é" * 20):
        key.write_text(bad)
        assert "a key has at least 16" in refused(export, "--key-file", key)
    monkeypatch.setenv("PHOTON_SERVE_KEY", KEY)
    assert read_key(None) == KEY
    with listen("0.0.0.0", 0, KEY):
        pass


def test_the_command_answers_until_it_is_asked_to_end(export: Path) -> None:
    command = [sys.executable, "-m", "photon.cli", "serve", str(export), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as served:
        try:
            assert served.stdout is not None
            assert served.stderr is not None
            address = served.stdout.readline().decode().split()[-1]
            client = openai.OpenAI(base_url=address, api_key="-")
            assert client.completions.create(**GREEDY).usage.completion_tokens == 30
            served.terminate()
            assert served.wait(timeout=20) == 0
            assert served.stderr.read() == b""
        finally:
            served.kill()
