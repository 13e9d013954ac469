"""One federation over every preset of the link: it trains, and what is reported is what crossed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from photon.config import conf_dir
from photon.federation.grid import InProcessGrid
from photon.link.coding import coded_bytes
from photon.link.records import count_bytes
from photon.telemetry.events import ClientFinished
from photon.telemetry.log import read_events

PRESETS = sorted(path.stem for path in (conf_dir() / "link").glob("*.yaml"))


def test_the_presets_are_those_of_the_issue() -> None:
    names = "dense bf16 fp8 int8 int4 e3m0 sign topk sparseloco powersgd sparse"
    assert sorted(names.split()) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_and_counts_what_crosses(
    preset: str,
    run_small: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crossed = {"up": 0, "down": 0}
    push, pull = InProcessGrid.push_messages, InProcessGrid.pull_messages

    def pushing(self: Any, messages: Iterable[Message]) -> Any:
        messages = list(messages)
        crossed["down"] += sum(bytes_of(message) for message in messages)
        return push(self, messages)

    def pulling(self: Any, ids: Iterable[str]) -> Any:
        replies = list(pull(self, ids))
        crossed["up"] += sum(bytes_of(reply) for reply in replies)
        return replies

    monkeypatch.setattr(InProcessGrid, "push_messages", pushing)
    monkeypatch.setattr(InProcessGrid, "pull_messages", pulling)
    summary = run_small(f"link={preset}", "rounds=2")
    assert summary["failures"] == 0
    reported = summary["bytes"]
    finished = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, ClientFinished)]
    assert sum(e.bytes_up for e in finished) == crossed["up"]
    assert sum(e.bytes_down for e in finished) == crossed["down"]
    assert reported["up"] >= crossed["up"]
    assert reported["down"] >= crossed["down"]
    assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]
    again = run_small(f"link={preset}", "rounds=2", name="again")
    assert again["weights_sha256"] == summary["weights_sha256"], (
        "what is drawn at random is drawn from the seed"
    )


def bytes_of(message: Message) -> int:
    """Return the bytes of train messages; the others are counted apart."""
    return count_bytes(message.content) if message.metadata.message_type.startswith("train") else 0


def test_a_payload_has_the_length_that_is_computed(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """What a silo has kept of its reply is, tensor by tensor, as long as the codecs say without encoding."""
    import json

    from safetensors.torch import load_file

    from photon.link.codecs import TopK, TwoBit

    run_small("link=sparseloco", "rounds=1", "cohort=1")
    (kept,) = (tmp_path / "run").rglob("round-000001/reply.safetensors")
    codings = json.loads(json.loads((kept.parent / "state.json").read_text())["codings"])["params"]
    for name, payload in load_file(kept).items():
        shape = codings[name.removeprefix("params/")]["shape"]
        assert payload.nbytes == coded_bytes([TopK(64, 4096), TwoBit()], shape)
