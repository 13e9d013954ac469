"""Secure aggregation in whole runs: what the server gets, what it makes of it, who may drop out when."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError, RunError
from photon.federation.run import prepare_run, run_federation
from photon.federation.secure import threshold_of
from photon.link.encoding import Packed
from photon.link.messages import BODY
from photon.link.records import decode_groups
from photon.privacy.masking import Quantizer
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.telemetry.events import Event, Notice, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.conftest import write_corpus

SECURE = ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"]
SILOS = {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwx", "omega": "aeiouyxz"}


@pytest.fixture(scope="module")
def four_silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("four"), SILOS)


class Recorder(InProcessGrid):
    """Keep all that reaches the server, and lose what is to be lost.

    Parameters
    ----------
    lost
        Words and silos: messages to such a silo with the word in their body come to nothing.
    """

    def __init__(self, nodes: Any, lost: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(answer, nodes)
        self.lost = set(lost)
        self.replies: list[tuple[str, Message]] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identifier in message_ids:
            request = self._mailbox.get(identifier)
            if request is None:
                continue
            body = str(request.content[BODY]["body"])
            silo = json.loads(body).get("silo")
            if any(silo == other and word in body for word, other in self.lost):
                self._mailbox.pop(identifier)
                yield Message(Error(2, "lost"), reply_to=request)
                continue
            for reply in super().pull_messages([identifier]):
                self.replies.append((body, reply))
                yield reply


Federate = Callable[..., tuple[dict[str, Any], Recorder]]


@pytest.fixture
def federate(small_config: Callable[..., RunConfig], four_silos: Path) -> Federate:
    def run(
        *overrides: str, lost: Iterable[tuple[str, str]] = (), resume: bool = False, name: str = "run"
    ) -> tuple[dict[str, Any], Recorder]:
        config = prepare_run(small_config("rounds=1", "cohort=4", *overrides, data=four_silos, name=name))
        grid = Recorder({1: {}}, lost)
        return run_federation(config, grid, resume=resume, live=False), grid

    return run


def events_of(run_dir: Path, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


def params(run_dir: Path, server_round: int) -> dict[str, torch.Tensor]:
    return CheckpointStore(run_dir / "checkpoints").load(server_round).load_params()


def update_of(run_dir: Path, silo: str, server_round: int = 1) -> dict[str, torch.Tensor]:
    """Read the update from the silo's own disk."""
    folder = run_dir / "silos" / silo / f"round-{server_round:06d}"
    return load_groups(folder / "reply.safetensors")["params"]


def check_sum(run_dir: Path, silos: list[str], server_round: int = 1, cohort: int = 4) -> None:
    """Check that the global model moved by the plain mean of the silos' updates (FedAvg)."""
    before, after = params(run_dir, server_round - 1), params(run_dir, server_round)
    updates = [update_of(run_dir, silo, server_round) for silo in silos]
    step = Quantizer(8.0, cohort).step
    for name, tensor in before.items():
        mean = sum(update[name].double() for update in updates) / len(silos)
        error = (tensor.double() - mean - after[name].double()).abs().max()
        # Half a step of the integers, and two roundings of float32.
        assert float(error) <= step / 2 + 2**-23 * max(1.0, float(tensor.abs().max())), name


def test_the_sum_is_the_plain_sum(federate: Federate, tmp_path: Path) -> None:
    secure, _ = federate(*SECURE, name="secure")
    check_sum(tmp_path / "secure", list(SILOS))
    plain, _ = federate("strategy.weighting=uniform", "link.uplink_payload=update", name="plain")
    assert secure["perplexity"]["final"] == pytest.approx(plain["perplexity"]["final"], rel=1e-5)
    assert secure["failures"] == 0
    for name, tensor in params(tmp_path / "plain", 1).items():
        torch.testing.assert_close(params(tmp_path / "secure", 1)[name], tensor, rtol=0, atol=1e-6)


def test_all_that_reaches_the_server_of_an_update_is_noise_to_it(federate: Federate, tmp_path: Path) -> None:
    _, grid = federate(*SECURE)
    run_dir = tmp_path / "run"
    updates = {silo: update_of(run_dir, silo) for silo in SILOS}
    with_tensors = [
        (body, reply)
        for body, reply in grid.replies
        if any(isinstance(r, ArrayRecord) for r in reply.content.values())
    ]
    assert len(with_tensors) == 4, "tensors come in the answers to the train requests and in nothing else"
    vectors = []
    for silo, (body, reply) in zip(SILOS, with_tensors, strict=True):
        assert f'"silo":"{silo}"' in body
        groups = decode_groups(reply.content)
        assert set(groups) == {"params"}
        names = sorted(groups["params"])
        seen = np.concatenate([groups["params"][name].numpy().reshape(-1).view(np.uint32) for name in names])
        update = np.concatenate([updates[silo][name].numpy().reshape(-1) for name in names])
        count = len(seen)
        assert count > 5000
        # Uniform: χ² over the top four bits, five standard deviations.
        counts = np.bincount(seen >> 28, minlength=16)
        statistic = float(((counts - count / 16) ** 2 / (count / 16)).sum())
        assert abs(statistic - 15) < 5 * 30**0.5
        # Unrelated to the update, and to the others' vectors.
        centred = seen.astype(np.float64) - 2**31
        for other in [update, *vectors]:
            assert abs(np.corrcoef(centred, other)[0, 1]) < 5 / count**0.5
        vectors.append(centred)
        # The same test sees an update that is not masked.
        plain = Quantizer(8.0, 4).encode({"x": torch.from_numpy(update)})["x"]
        assert abs(np.corrcoef(plain.astype(np.float64), update)[0, 1]) > 0.99
    # The values of an update are nowhere, in whatever form a message has.
    largest = {silo: max(t.abs().max().item() for t in update.values()) for silo, update in updates.items()}
    for _, reply in grid.replies:
        text = str(reply.content)
        assert not any(str(value) in text for value in largest.values())


def test_worldlm_learns_the_sum_of_the_backbones_and_each_key_layer(
    federate: Federate, tmp_path: Path
) -> None:
    rules = ["strategy=worldlm", "link.uplink_payload=update", "model.architecture.n_layer=2"]
    with pytest.raises(PhotonError, match=r"h\.1\..* would leave without a mask \(12 tensors\)"):
        federate(*rules, "privacy=secure", name="refused")
    secure = ["privacy=secure", "privacy.allow_unmasked=true"]
    _, grid = federate(*rules, *secure, lost=[('"masking":{', "beta")], name="secure")
    federate(*rules, lost=[("global_step", "beta")], name="plain")
    replies = [
        (json.loads(body)["silo"], decode_groups(reply.content)["params"])
        for body, reply in grid.replies
        if any(isinstance(record, ArrayRecord) for record in reply.content.values())
    ]
    assert [silo for silo, _ in replies] == ["alpha", "gamma", "omega"]
    for silo, seen in replies:
        own = update_of(tmp_path / "secure", silo)
        for name, packed in seen.items():
            if ".h.1." in name:
                torch.testing.assert_close(packed, own[name])
            else:
                assert packed.dtype == torch.int32, name
    for name, tensor in params(tmp_path / "plain", 1).items():
        torch.testing.assert_close(params(tmp_path / "secure", 1)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("lost", "left"),
    [
        ([("advertise_keys", "beta")], ["alpha", "gamma", "omega"]),
        ([("share_keys", "beta")], ["alpha", "gamma", "omega"]),
        ([("check_shares", "beta")], ["alpha", "gamma", "omega"]),
        # After its keys were shared: its masks on the others' updates are taken off.
        ([('"masking":{', "beta")], ["alpha", "gamma", "omega"]),
        # After it has sent its masked update: that is in the sum.
        ([("unmask", "beta")], ["alpha", "beta", "gamma", "omega"]),
        ([("unmask", "alpha")], ["alpha", "beta", "gamma", "omega"]),
    ],
)
def test_silos_may_drop_out_at_any_stage(
    federate: Federate, tmp_path: Path, lost: list[tuple[str, str]], left: list[str]
) -> None:
    summary, _ = federate(*SECURE, lost=lost)
    assert {event.silo for event in events_of(tmp_path / "run", SiloFinished)} == set(left)
    assert summary["failures"] == 4 - len(left)
    cohort = 3 if lost[0][0] == "advertise_keys" else 4
    check_sum(tmp_path / "run", left, cohort=cohort)


def test_dropping_out_before_and_after_masking(federate: Federate, tmp_path: Path) -> None:
    federate(*SECURE, "privacy.threshold=3", lost=[('"masking":{', "beta")])
    check_sum(tmp_path / "run", ["alpha", "gamma", "omega"])


@pytest.mark.few(2)
@pytest.mark.parametrize("stage", ["advertise_keys", "share_keys", '"masking":{', "unmask"])
def test_too_few_for_the_threshold_stop_the_run_which_goes_on_later(
    federate: Federate, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(RunError, match=r"secure aggregation: 2 of 4 silos .* takes 3 \(privacy.threshold\)"):
        federate(*SECURE, lost=[(stage, "beta"), (stage, "omega")])
    assert len(events_of(tmp_path / "run", SiloFailed)) == (0 if stage == "unmask" else 2)
    summary, _ = federate(*SECURE, resume=True)
    assert summary["status"] == "finished"
    check_sum(tmp_path / "run", list(SILOS))


def test_a_resumed_round_masks_what_was_trained_with_new_keys(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from photon.federation import federation
    from photon.training.loop import LocalTrainer

    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 2:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    grids: list[Recorder] = []
    init = Recorder.__init__
    monkeypatch.setattr(Recorder, "__init__", lambda self, *a: (init(self, *a), grids.append(self))[0])
    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            federate(*SECURE, "rounds=2")
    trained: list[int] = []
    train = LocalTrainer.train

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        trained.append(kwargs["global_step"])
        return train(self, *args, **kwargs)

    monkeypatch.setattr(LocalTrainer, "train", counting)
    federate(*SECURE, "rounds=2", resume=True)
    assert trained == [], "the stored updates are masked anew"
    check_sum(tmp_path / "run", list(SILOS), server_round=2)

    def masked(grid: Recorder) -> list[bytes]:
        bodies = [
            (body, reply) for body, reply in grid.replies if '"round":2' in body and '"masking":{' in body
        ]
        return [next(iter(reply.content["params"].values())).data for _, reply in bodies]

    first, second = masked(grids[0]), masked(grids[1])
    assert len(first) == len(second) == 4
    assert not set(first) & set(second)


def damage(run_dir: Path, *rounds: int) -> None:
    for server_round in rounds:
        file = run_dir / "checkpoints" / f"round-{server_round:06d}" / "params.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")


def test_a_run_that_goes_back_opens_the_same_sums_again(federate: Federate, tmp_path: Path) -> None:
    run = [*SECURE, "rounds=2", "checkpoint.keep=3"]
    federate(*run, lost=[('"round":1,', "omega")])
    first = {
        server_round: {
            name: tensor.clone() for name, tensor in params(tmp_path / "run", server_round).items()
        }
        for server_round in (1, 2)
    }
    check_sum(tmp_path / "run", ["alpha", "beta", "gamma"], 1, cohort=3)
    damage(tmp_path / "run", 1, 2)
    # omega is there again, and left out of the first round: what it has trained stays its own.
    summary, _ = federate(*run, resume=True)
    assert summary["status"] == "finished"
    for server_round, before in first.items():
        after = params(tmp_path / "run", server_round)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    notices = [event.message for event in events_of(tmp_path / "run", Notice)]
    assert any("round 1: its sum was unmasked before" in message for message in notices)


@pytest.mark.few(1)
@pytest.mark.parametrize("noise", [True, False])
def test_a_repeated_round_without_one_of_its_silos_needs_fresh_noise(
    federate: Federate, tmp_path: Path, noise: bool
) -> None:
    run = [*SECURE, "checkpoint.keep=3"]
    run += ["privacy.clip_norm=0.1", "privacy.noise_multiplier=1"] if noise else []
    federate(*run)
    before = {name: tensor.clone() for name, tensor in update_of(tmp_path / "run", "alpha").items()}
    damage(tmp_path / "run", 1)
    away = [('"round":1,', "omega")]
    if noise:
        summary, _ = federate(*run, resume=True, lost=away)
        after = update_of(tmp_path / "run", "alpha")
        assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
        releases = json.loads((tmp_path / "run" / "silos" / "alpha" / "releases.json").read_text())
        assert [count for count, _ in releases["content"].values()] == [2]
        check_sum(tmp_path / "run", ["alpha", "beta", "gamma"], cohort=3)
    else:
        with pytest.raises(RunError, match=r"this update of .* was in a sum over other silos before"):
            federate(*run, resume=True, lost=away)
        summary, _ = federate(*run, resume=True)
        check_sum(tmp_path / "run", list(SILOS))
    assert summary["status"] == "finished"


@pytest.mark.parametrize("how", ["type", "shape", "missing"])
def test_a_masked_update_that_is_none_costs_its_silo_alone(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    from photon.silo import secure

    mask = secure.mask

    def garbage(request: Any, *rest: Any) -> Any:
        reply = mask(request, *rest)
        if request.silo != "beta":
            return reply
        name, packed = next(iter(reply["params"].items()))
        changed = {"type": packed.data.float(), "shape": packed.data.reshape(-1)[1:], "missing": None}[how]
        others = {key: value for key, value in reply["params"].items() if key != name}
        return {"params": others if changed is None else {name: Packed(changed), **others}}

    monkeypatch.setattr(secure, "mask", garbage)
    federate(*SECURE)
    failed = events_of(tmp_path / "run", SiloFailed)
    assert [(event.silo, event.kind) for event in failed] == [("beta", "rejected")]
    check_sum(tmp_path / "run", ["alpha", "gamma", "omega"])


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "strategy", [["strategy=diloco", "outer=diloco"], ["strategy=streaming-diloco", "strategy.fragments=2"]]
)
def test_several_rounds_go_on_as_without_masks(
    federate: Federate, tmp_path: Path, strategy: list[str]
) -> None:
    common = [*strategy, *SECURE[1:], "rounds=3", "cohort=3", "optimizer.eps=1e-3"]
    federate(*common, "privacy=secure", name="secure")
    federate(*common, name="plain")
    for name, tensor in params(tmp_path / "plain", 3).items():
        torch.testing.assert_close(params(tmp_path / "secure", 3)[name], tensor, rtol=0, atol=1e-5)


def test_noise_and_masks_go_together(federate: Federate, tmp_path: Path) -> None:
    noisy = ["privacy.clip_norm=0.1", "privacy.noise_multiplier=1", "privacy.seed=3"]
    summary, _ = federate(*SECURE, *noisy)
    assert set(summary["privacy"]["epsilon"]) == set(SILOS)
    check_sum(tmp_path / "run", list(SILOS))


# --- what cannot work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["link.uplink_payload=parameters"], "link.uplink_payload must be update"),
        (["link=int8"], r"link.uplink must be \[\]"),
        (
            ["link.uplink_by_name=[{names: wte, codecs: []}]"],
            r"link.uplink_by_name must be \[\], and is \['wte'\]",
        ),
        (["strategy.weighting=tokens"], "the plain mean"),
        (["strategy=local-adam", "strategy.weighting=uniform"], "the plain mean"),
        (["privacy.clip_norm=9"], r"privacy.range=8: clipped and noised coordinates reach 9"),
        (["privacy.clip_norm=1", "privacy.noise_multiplier=1"], "coordinates reach 9"),
    ],
)
def test_what_cannot_be_summed_is_refused_before_the_run(
    small_config: Callable[..., RunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        small_config(*SECURE, *overrides)


@pytest.mark.parametrize(("cohort", "expected"), [(2, 2), (3, 2), (4, 3), (6, 4), (7, 5), (100, 67)])
def test_two_thirds_unmask(small_config: Callable[..., RunConfig], cohort: int, expected: int) -> None:
    assert threshold_of(small_config(*SECURE).privacy, cohort) == expected


def test_a_cohort_that_cannot_hide_anybody_is_refused(
    small_config: Callable[..., RunConfig], federate: Federate
) -> None:
    with pytest.raises(PhotonError, match="the sum over one silo is its update"):
        federate(*SECURE, "cohort=1")
    privacy = small_config(*SECURE, "privacy.threshold=2").privacy
    with pytest.raises(PhotonError, match="not a majority of the cohort of 4"):
        threshold_of(privacy, 4)
    with pytest.raises(PhotonError, match="3 at least and 4 at most"):
        threshold_of(privacy.model_copy(update={"threshold": 5}), 4)


def test_an_update_beyond_the_range_fails_with_a_word(federate: Federate, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"privacy.range=1e-07: the update of .* reaches .*; raise it"):
        federate(*SECURE, "privacy.range=1e-7")
