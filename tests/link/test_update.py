"""A silo sends its update and what earlier rounds lost: nothing gets lost, and nothing comes of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import CodecSection, LinkSection, NamedCodecs, RunConfig, StoreSection
from photon.errors import PhotonError
from photon.link.encoding import payloads_of, unpack
from photon.link.update import RESIDUAL, encode_reply, encodings_of, with_encodings
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

BF16 = {"_target_": "photon.link.codecs.Cast", "dtype": "bfloat16"}
UPDATE = ["link.uplink_payload=update", "link.error_feedback=true"]
CAST = "link.uplink=[{_target_: photon.link.codecs.Cast, dtype: bfloat16}]"


def section(*codecs: dict[str, Any], feedback: bool = True) -> LinkSection:
    return LinkSection(
        uplink=[CodecSection.model_validate(codec) for codec in codecs],
        uplink_by_name=[],
        uplink_payload="update",
        error_feedback=feedback,
        downlink=[],
        downlink_payload="parameters",
        states=[],
        transport="inline",
        inline_limit_mb=1.0,
        store=StoreSection(url=None, presigned=False),
    )


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(6, 5, generator=generator), "b": torch.randn(7, generator=generator)}


def test_what_was_sent_and_what_was_kept_is_what_was_trained() -> None:
    """Over many rounds Σ sent + residual = Σ updates, exactly: subtracting a rounded value is exact."""
    link, feedback = section(BF16), {}
    total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in weights(0).items()}
    sent = {name: torch.zeros_like(t) for name, t in total.items()}
    for server_round in range(1, 20):
        received, trained = weights(server_round), weights(100 + server_round)
        reply, feedback = encode_reply({"params": trained}, received, link, feedback, seed=str(server_round))
        for name in total:
            total[name] += (received[name] - trained[name]).double()
            sent[name] += unpack(reply["params"][name], name).double()
    for name, whole in total.items():
        assert feedback[RESIDUAL][name].abs().max() > 0
        torch.testing.assert_close(sent[name] + feedback[RESIDUAL][name].double(), whole, rtol=0, atol=1e-5)


def test_a_part_of_what_was_lost_fades() -> None:
    """a = Δ + β e and e = a − sent, round by round."""
    link = section(BF16).model_copy(update={"error_decay": 0.75})
    lost = {name: torch.zeros_like(t) for name, t in weights(0).items()}
    feedback: dict[str, dict[str, torch.Tensor]] = {}
    for server_round in range(1, 6):
        received, trained = weights(server_round), weights(100 + server_round)
        reply, feedback = encode_reply({"params": trained}, received, link, feedback, seed="")
        for name, before in lost.items():
            whole = received[name] - trained[name] + 0.75 * before
            sent = whole.to(torch.bfloat16).float()
            assert torch.equal(unpack(reply["params"][name], name), sent)  # type: ignore[arg-type]
            assert torch.equal(feedback[RESIDUAL][name], whole - sent)
        lost = feedback[RESIDUAL]


def test_parameters_have_codecs_by_name() -> None:
    """The first expression that is found counts; without codecs a parameter goes as it is."""
    sign = CodecSection.model_validate({"_target_": "photon.link.codecs.Sign"})
    rules = [NamedCodecs(names="norm$", codecs=[]), NamedCodecs(names="^wte|norm", codecs=[sign])]
    link = section(BF16).model_copy(update={"uplink_by_name": rules})
    names = ("wte.weight", "h.0.norm", "h.0.norm.bias", "h.0.fc")
    received = {name: torch.zeros(4, 3) for name in names}
    trained = {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) for name in names}
    reply, feedback = encode_reply({"params": trained, "exp_avg": trained}, received, link, {}, seed="")
    chosen = {
        name: packed.encoding and packed.encoding.codecs[0].codec for name, packed in reply["params"].items()
    }
    assert chosen == {"wte.weight": "sign", "h.0.norm": None, "h.0.norm.bias": "sign", "h.0.fc": "cast"}
    assert set(feedback[RESIDUAL]) == set(names) - {"h.0.norm"}, "what loses nothing remembers nothing"
    assert all(packed.encoding is None for packed in reply["exp_avg"].values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("h.0.typo", "'h.0.typo' fits no parameter; there are such as "),
        ("(", "'.' is no regular expression of RE2"),
    ],
)
def test_a_wrong_expression_is_refused(
    names: str, message: str, run_small: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(PhotonError, match=f"link.uplink_by_name: {message}"):
        run_small(f"link.uplink_by_name=[{{names: '{names}', codecs: []}}]")


def test_without_feedback_nothing_is_remembered() -> None:
    reply, feedback = encode_reply(
        {"params": weights(1)}, weights(0), section(BF16, feedback=False), {}, seed=""
    )
    assert feedback == {}
    expected = (weights(0)["a"] - weights(1)["a"]).to(torch.bfloat16).float()
    assert torch.equal(unpack(reply["params"]["a"], "a"), expected)  # type: ignore[arg-type]


def test_other_state_groups_are_sent_by_value() -> None:
    moments = {"exp_avg": weights(3)}
    reply, feedback = encode_reply({"params": weights(1), **moments}, weights(0), section(BF16), {}, seed="")
    assert torch.equal(reply["exp_avg"]["a"].data, moments["exp_avg"]["a"])
    assert set(feedback) == {RESIDUAL}


def test_a_kept_reply_is_the_reply() -> None:
    reply, _ = encode_reply({"params": weights(1)}, weights(0), section(BF16), {}, seed="")
    again = with_encodings(payloads_of(reply), encodings_of(reply))
    assert {g: set(t) for g, t in again.items()} == {"params": {"a", "b"}}
    for name, packed in again["params"].items():
        assert packed.encoding == reply["params"][name].encoding
        assert torch.equal(packed.data, reply["params"][name].data)


def test_a_kept_reply_has_its_groups_without_tensors() -> None:
    """Such as the parameters of strategy=local; a file of tensors does not hold them."""
    reply, _ = encode_reply({"params": {}}, weights(0), section(BF16), {}, seed="")
    assert with_encodings({}, encodings_of(reply)) == {"params": {}}


def test_updates_as_they_are_train_as_parameters_do(run_small: Callable[..., dict[str, Any]]) -> None:
    parameters = run_small("cohort=2", "outer=diloco")
    updates = run_small("cohort=2", "outer=diloco", "link.uplink_payload=update", name="updates")
    assert updates["perplexity"]["final"] == pytest.approx(parameters["perplexity"]["final"], rel=1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "link", [[CAST, *UPDATE], ["link=sparseloco"], ["link=powersgd"]], ids=lambda o: o[0]
)
def test_killed_with_a_residual_and_resumed_equals_uninterrupted(
    link: list[str],
    run_small: Callable[..., dict[str, Any]],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The silos have trained round 2, and their residuals with it, when the server dies."""
    from photon.federation import federation

    whole = run_small(*link, name="whole")
    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 2:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            run_small(*link)
    assert run_small(*link, resume=True)["weights_sha256"] == whole["weights_sha256"]
    without = run_small(*link, "link.error_feedback=false", "link.error_decay=1", name="without")
    assert without["weights_sha256"] != whole["weights_sha256"], "feedback must have done something"
    # At most half of float32, and the headers.
    sent = [e for e in read_events(tmp_path / "whole" / "events.jsonl") if isinstance(e, SiloFinished)]
    assert all(e.group_bytes_up["params"] <= 4 * summary_parameters(whole) / 2 for e in sent)


def summary_parameters(summary: dict[str, Any]) -> int:
    parameters = summary["parameters"]
    assert isinstance(parameters, int)
    return parameters


def test_the_order_of_arrival_changes_nothing(
    run_small: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies that are sparse and summed, pulled backwards."""
    from photon.engine.inprocess import InProcessGrid

    forwards = run_small("link=sparseloco", "cohort=3", name="forwards")
    pull = InProcessGrid.pull_messages
    asked: dict[str, int] = {}

    def late(self: Any, ids: Any) -> Any:
        # The first reply comes when it is asked for the fourth time, the second at the third, …
        (one,) = ids
        asked[one] = asked.get(one, 0) + 1
        due = 4 - list(asked).index(one) % 3
        return pull(self, ids) if asked[one] >= due else []

    monkeypatch.setattr(InProcessGrid, "pull_messages", late)
    assert run_small("link=sparseloco", "cohort=3")["weights_sha256"] == forwards["weights_sha256"]


@pytest.mark.parametrize("key", ["link.error_feedback=true", "link.mean_over=senders"])
def test_what_acts_on_updates_needs_them(key: str, small_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(PhotonError, match=rf"{key} needs link\.uplink_payload=update"):
        small_config(key)


def test_a_decay_needs_feedback(small_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(PhotonError, match=r"link\.error_decay=0\.5 needs link\.error_feedback=true"):
        small_config("link.uplink_payload=update", "link.error_decay=0.5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["strategy.weighting=uniform", "strategy.fold.rule=norm-bounded-mean"],
            "takes what a reply leaves out for zero; set link.mean_over=silos",
        ),
        (
            ["strategy=worldlm", "federation.tree={n: [alpha, beta], s: [gamma]}", "cohort=null"],
            "folds parameters",
        ),
    ],
)
def test_a_mean_over_senders_needs_a_mean_of_updates(
    overrides: list[str], message: str, run_small: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(PhotonError, match=message):
        run_small("link=sparseloco", *overrides)
