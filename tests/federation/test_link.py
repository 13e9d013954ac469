"""One federation over every preset of the link: it trains, and what is reported is what crossed."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from photon.config.folders import conf_dir
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.link.encoding import encoded_bytes
from photon.link.records import count_bytes
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

PRESETS = sorted(path.stem for path in (conf_dir() / "link").glob("*.yaml"))


def test_the_presets_have_the_names_that_users_know() -> None:
    dense = "dense bf16 fp8 int8 int4 e3m0 two-bit sign powersgd"
    sparse = "sparse topk sparseloco top64of4096 top1of32 topk-100x"
    assert sorted([*dense.split(), *sparse.split()]) == PRESETS


@pytest.mark.few(3)
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
    finished = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFinished)]
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

    from photon.link.codecs import TopKTiles, TwoBit

    run_small("link=sparseloco", "rounds=1", "cohort=1")
    (kept,) = (tmp_path / "run").rglob("round-000001/reply.safetensors")
    encodings = json.loads(json.loads((kept.parent / "state.json").read_text())["encodings"])["params"]
    for name, payload in load_file(kept).items():
        shape = encodings[name.removeprefix("params/")]["shape"]
        assert payload.nbytes == encoded_bytes([TopKTiles(), TwoBit()], shape)


# --- the model comes down as a change ------------------------------------------------------------------

CHANGE = [
    "link=int8",
    "link.downlink_payload=update",
    "link.downlink=[{_target_: photon.link.codecs.Int, bits: 4}]",
]


def test_a_change_that_loses_nothing_trains_as_parameters_do(
    run_small: Callable[..., dict[str, Any]],
) -> None:
    parameters = run_small("cohort=2", "rounds=4", name="parameters")
    change = run_small("cohort=2", "rounds=4", "link.uplink_payload=update", "link.downlink_payload=update")
    assert change["perplexity"]["final"] == pytest.approx(parameters["perplexity"]["final"], rel=1e-4)


def test_what_silos_have_follows_the_model(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """The change is rounded to four bits; what that loses comes with the next change, and does not add up."""
    from photon.state.checkpoint import CheckpointStore

    summary = run_small(*CHANGE, "cohort=3", "rounds=6", "checkpoint.keep=9")
    assert summary["failures"] == 0
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for server_round in range(2, 7):
        # The reference of a round is what silos trained from, that is, the parameters of the round before.
        sent = store.load(server_round - 1).load_params()
        reference = store.load(server_round).load_reference()
        moved = store.load(server_round - 2).load_params()
        for name, tensor in sent.items():
            lost = (tensor - reference[name]).abs().max()
            change = (tensor - moved[name]).abs().max() + (lost if server_round == 2 else 0)
            assert lost <= change / 7
    finished = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFinished)]
    parameters = summary["parameters"]
    for event in finished:
        expected = 4 * parameters if event.round == 1 else 0.6 * parameters
        assert event.group_bytes_down["params"] <= expected


def test_a_change_survives_a_kill_bit_for_bit(
    run_small: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silos miss rounds, and get all parameters after that; others have what the last round changed."""
    from photon.federation import federation

    options = [*CHANGE, "cohort=2", "rounds=4"]
    whole = run_small(*options, name="whole")
    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 3:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            run_small(*options)
    assert run_small(*options, resume=True)["weights_sha256"] == whole["weights_sha256"]


def test_a_silo_that_lost_what_it_had_fails_once_and_then_gets_all(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from photon.silo import train

    kept_state = train.kept_state

    def forgetful(store: Any, request: Any) -> Any:
        return (None, True) if (request.silo, request.round) == ("beta", 2) else kept_state(store, request)

    monkeypatch.setattr(train, "kept_state", forgetful)
    summary = run_small(*CHANGE, "cohort=3", "rounds=3", "federation.quorum=2")
    assert summary["failures"] == 1
    assert "beta has lost the parameters of round 1" in (tmp_path / "run" / "events.jsonl").read_text()
    finished = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFinished)]
    down = {(e.silo, e.round): e.group_bytes_down["params"] for e in finished}
    assert down["beta", 3] == 4 * summary["parameters"] > 6 * down["alpha", 3]


def test_a_strategy_that_sends_parts_is_refused(run_small: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(PhotonError, match="sends parameters in parts"):
        run_small(
            *CHANGE, "strategy=streaming-diloco", "strategy.fragments=2", "model.architecture.n_layer=2"
        )
