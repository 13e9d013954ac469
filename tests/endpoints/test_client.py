"""Agents are asked with bounds; whatever a server does is an answer or a named fault."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from photon.endpoints.agent import Agent
from photon.endpoints.client import Client, _retry_after
from photon.endpoints.faults import EndpointError, Fault
from photon.endpoints.reply import Reply, ToolCall, of_record
from photon.errors import PhotonError
from tests.endpoints.server import Act, Handler, completion, say, send, serving

ASKED = [{"role": "user", "content": "How much is 1 + 1?"}]


def agent(endpoint: str, **settings: Any) -> Agent:
    return Agent.model_validate(
        {"name": "one", "endpoint": endpoint, "model": "m", "timeout": 5.0, "retries": 0, **settings}
    )


def fault_of(act: Act, **settings: Any) -> tuple[EndpointError, Client, int]:
    """Ask a server that fails; return the error, the client, and how often the server was asked."""
    with serving(act) as server, Client(backoff=0.001, most_bytes=10_000) as client:
        with pytest.raises(EndpointError) as raised:
            client.chat(agent(server.url, **settings), ASKED)
        assert "\n" not in str(raised.value)
        return raised.value, client, len(server.requests)


def test_what_is_sent_and_what_comes_back() -> None:
    one = {"system": "Be short.", "temperature": 0, "max_tokens": 9, "seed": 5, "extra": {"top_k": 3}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    with serving(say(completion("2"))) as server, Client() as client:
        reply = client.chat(agent(server.url, **one), ASKED, tools=[tool], draw=2)
    assert reply == Reply("2", (), "stop", 7, 3, cached=False)
    assert server.requests == [
        {
            **{"path": "/v1/chat/completions", "model": "m", "temperature": 0, "max_tokens": 9},
            **{"seed": 7, "top_k": 3, "tools": [tool]},
            "messages": [{"role": "system", "content": "Be short."}, *ASKED],
        }
    ]
    assert "Authorization" not in server.headers[0]
    tally = client.tally
    assert (tally.answers, tally.requests, tally.prompt_tokens, tally.completion_tokens) == (1, 1, 7, 3)


def test_tool_calls_pass_through_and_a_turn_goes_back() -> None:
    called = [
        {"id": "c1", "type": "function", "function": {"name": "nosuch", "arguments": "{not json"}},
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
    ]
    with serving(say(completion(None, tool_calls=called))) as server, Client() as client:
        reply = client.chat(agent(server.url), ASKED)
    assert reply.content == ""
    assert reply.tool_calls == (ToolCall("c1", "nosuch", "{not json"), ToolCall("call-1", "add", '{"a": 1}'))
    turn = reply.message()
    assert turn["tool_calls"][0] == called[0]
    assert of_record(reply.record(), "one").tool_calls == reply.tool_calls


def test_a_key_comes_from_the_environment_and_is_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONES_KEY", "sk-secret")

    def refuse(handler: Handler, _: int) -> None:
        said = f"no such key: {handler.headers['Authorization']}"
        send(handler, json.dumps({"error": {"message": said}}).encode(), 401)

    with serving(refuse) as server, Client() as client:
        one = agent(server.url, key_variable="ONES_KEY", retries=3)
        with pytest.raises(EndpointError, match="answers 401: no such key: Bearer …") as raised:
            client.chat(one, ASKED)
        assert raised.value.fault == Fault.REFUSED
        assert len(server.requests) == 1
        monkeypatch.delenv("ONES_KEY")
        with pytest.raises(PhotonError, match="ONES_KEY is not set"):
            client.check([one])
    assert "sk-secret" not in str(raised.value) + json.dumps(one.identity())


# --- faults ---------------------------------------------------------------------------------------------


def drip(handler: Handler, _: int) -> None:
    """Send an answer so slowly that no single read takes long."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: Handler, _: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 4096)


def cut(handler: Handler, _: int) -> None:
    """Promise more than there is."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def text(body: bytes, **headers: str) -> Act:
    return lambda handler, _: send(handler, body, **headers)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (say({"error": {"message": "slow down"}}, 429), Fault.RATE_LIMITED),
        (say({}, 500), Fault.SERVER_ERROR),
        (text(b"<html>bad gateway", status=503), Fault.SERVER_ERROR),  # type: ignore[arg-type]
        (say({"error": "no such model"}, 404), Fault.REFUSED),
        (say({}, 302, Location="http://127.0.0.1:1/"), Fault.REFUSED),
        (text(b"<html>login"), Fault.NOT_JSON),
        (text(b"\xff\xfe"), Fault.NOT_JSON),
        (text(b"[" * 9000), Fault.NOT_JSON),
        (text(b"[]"), Fault.NOT_JSON),
        (say({"choices": []}), Fault.EMPTY),
        (say(completion(None)), Fault.EMPTY),
        (say({}), Fault.MALFORMED),
        (say({"choices": [{"message": {"content": 5}}]}), Fault.MALFORMED),
        (say({"choices": {"0": 1}}), Fault.MALFORMED),
        (say(completion("x", tool_calls=[{"function": {"name": ""}}])), Fault.MALFORMED),
        (text(b"{}", Content_Encoding="gzip"), Fault.MALFORMED),
        (text(b" " * 10_001), Fault.TOO_LARGE),
        (endless, Fault.TOO_LARGE),
        (cut, Fault.UNREACHABLE),
    ],
)
def test_every_failure_has_a_name_and_is_counted(act: Act, fault: Fault) -> None:
    error, client, _ = fault_of(act)
    assert error.fault == fault
    assert client.tally.faults == {fault: 1}
    assert client.tally.answers == 0


@pytest.mark.parametrize("act", [drip, lambda *_: time.sleep(2)], ids=["drip", "silent"])
def test_a_slow_answer_ends_after_the_time_out_as_a_whole(act: Act) -> None:
    began = time.monotonic()
    error, _, _ = fault_of(act, timeout=0.3)
    assert error.fault == Fault.TIMEOUT
    assert time.monotonic() - began < 1.5


def test_an_endpoint_that_is_down() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    down = pytest.raises(EndpointError, match=f"127.0.0.1:{port}/v1 does not answer")
    with Client(backoff=0.001) as client, down as raised:
        client.chat(agent(f"http://127.0.0.1:{port}/v1", retries=2), ASKED)
    assert raised.value.fault == Fault.UNREACHABLE
    assert client.tally.faults == {"unreachable": 3}


def test_counts_that_are_none_are_not_believed() -> None:
    body = {**completion("x"), "usage": {"prompt_tokens": -4, "completion_tokens": True}}
    with serving(say(body)) as server, Client() as client:
        reply = client.chat(agent(server.url), ASKED)
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, None)
    assert client.tally.unreported == 1


# --- repetitions ----------------------------------------------------------------------------------------


def failing_first(times: int, status: int, **headers: str) -> Act:
    def act(handler: Handler, number: int) -> None:
        if number < times:
            send(handler, b"{}", status, **headers)
        else:
            send(handler, json.dumps(completion("at last")).encode())

    return act


def test_what_may_pass_is_repeated_and_no_more_than_is_allowed() -> None:
    with serving(failing_first(2, 503)) as server, Client(backoff=0.001) as client:
        assert client.chat(agent(server.url, retries=2), ASKED).content == "at last"
        assert client.tally.faults == {"server_error": 2}
    error, _, asked = fault_of(failing_first(9, 503), retries=2)
    assert (error.fault, asked) == (Fault.SERVER_ERROR, 3)
    _, _, asked = fault_of(failing_first(9, 400), retries=2)
    assert asked == 1


def test_retry_after_is_waited_for_unless_it_is_too_long() -> None:
    with serving(failing_first(1, 429, Retry_After="0.4")) as server, Client(backoff=0.001) as client:
        began = time.monotonic()
        assert client.chat(agent(server.url, retries=1), ASKED).content == "at last"
        assert time.monotonic() - began >= 0.4
    error, _, asked = fault_of(failing_first(1, 429, Retry_After="3600"), retries=5)
    assert (error.fault, asked, error.wait) == (Fault.RATE_LIMITED, 1, 3600)
    assert "3600 s" in str(error)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert _retry_after("7") == 7
    assert _retry_after("-7") == 0
    assert _retry_after("soon") is None
    assert _retry_after("nan") is None
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert (_retry_after("Fri, 01 Jan 2100 00:00:00 GMT") or 0) > 1e9


def test_no_more_are_asked_at_once_than_are_allowed() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def act(handler: Handler, _: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        # Before the answer is out: the client may ask anew as soon as it has it.
        with lock:
            now -= 1
        send(handler, json.dumps(completion("x")).encode())

    with serving(act) as server, Client(concurrency=3) as client:
        asked = [client.submit(agent(server.url), ASKED, draw=draw) for draw in range(12)]
        wait(asked, timeout=10)
        assert most == 3
        assert client.tally.requests == 12


def test_leaving_ends_what_is_still_asked() -> None:
    hold = threading.Event()
    with serving(lambda *_: hold.wait(5) and None) as server:  # type: ignore[func-returns-value]
        began = time.monotonic()
        with Client() as client:
            client.submit(agent(server.url), ASKED)
            while not server.requests:
                time.sleep(0.01)
        assert time.monotonic() - began < 2
        hold.set()


# --- cache and recordings -------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[tuple[Client, Path]]:
    with Client(tmp_path / "cache") as client:
        yield client, tmp_path / "cache"


def test_a_question_is_asked_once_and_other_agents_and_draws_are_others(cached: tuple[Client, Path]) -> None:
    client, _ = cached

    def act(handler: Handler, number: int) -> None:
        send(handler, json.dumps(completion(f"answer {number}")).encode())

    with serving(act) as server:
        one, warm = agent(server.url), agent(server.url, temperature=1)
        same_but_key = agent(server.url, key_variable=None, timeout=9, retries=4)
        answers = [client.chat(one, ASKED).content for one in (one, one, warm, same_but_key)]
        answers.append(client.chat(one, ASKED, draw=1).content)
        other_name = one.model_copy(update={"name": "two"})
        answers.append(client.chat(other_name, ASKED).content)
    assert answers == ["answer 0", "answer 0", "answer 1", "answer 0", "answer 2", "answer 3"]
    assert client.tally.cached == 2
    assert client.chat(one, ASKED).cached  # the server is gone


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"reply": 5}', '{"reply": {"message": {}}}'])
def test_a_damaged_answer_is_asked_for_again(cached: tuple[Client, Path], damage: str) -> None:
    client, folder = cached
    with serving(say(completion("new"))) as server:
        client.chat(agent(server.url), ASKED)
        (file,) = folder.glob("*/*.json")
        file.write_text(damage)
        assert not client.chat(agent(server.url), ASKED).cached
        assert client.chat(agent(server.url), ASKED) == Reply("new", (), "stop", 7, 3, cached=True)


def test_a_failure_is_not_kept(cached: tuple[Client, Path]) -> None:
    client, folder = cached
    with serving(failing_first(1, 400)) as server:
        with pytest.raises(EndpointError):
            client.chat(agent(server.url), ASKED)
        assert not list(folder.rglob("*.json"))
        assert client.chat(agent(server.url), ASKED).content == "at last"


def test_a_cache_is_a_recording(cached: tuple[Client, Path]) -> None:
    client, folder = cached
    odd = "half a character: \ud83d, \u2028 and a line\nend"
    with serving(say(completion(odd))) as server:
        client.chat(agent(server.url, system="Be odd."), ASKED)
    lines = "".join(file.read_text() for file in folder.glob("*/*.json"))
    trace = folder.parent / "trace.jsonl"
    trace.write_text(lines + json.dumps({"agent": "one", "messages": [], "fault": "timeout"}) + "\n\n")
    recorded = agent(f"recorded:{trace}", system="Be odd.")
    assert client.chat(recorded, ASKED).content == odd.replace("\ud83d", "\ufffd")
    with pytest.raises(EndpointError) as raised:
        client.chat(recorded, ASKED, draw=1)
    assert raised.value.fault == Fault.NOT_RECORDED
    with pytest.raises(EndpointError) as raised:
        client.chat(agent(f"recorded:{trace}"), [])
    assert raised.value.fault == Fault.TIMEOUT


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: no recorded answer"),
        ('{"agent": "one", "messages": []}', "no 'reply'"),
        ('{"agent": "one", "messages": [], "fault": "tired"}', "'tired' is not a valid Fault"),
        ('{"agent": "one", "messages": [], "reply": {"message": {}}}', "neither text nor tool calls"),
    ],
)
def test_a_recording_that_is_none_is_refused(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "trace.jsonl").write_text(f"\n{line}\n")
    with Client() as client, pytest.raises(PhotonError, match=why):
        client.check([agent(f"recorded:{tmp_path}/trace.jsonl")])
    with Client() as client, pytest.raises(PhotonError, match="cannot read the recording"):
        client.check([agent(f"recorded:{tmp_path}/none.jsonl")])
