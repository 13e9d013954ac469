"""How large an update may be, who counts for how much, and where replies wait."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.federation.admission import Asked
from photon.federation.collect import limits_of
from photon.federation.run import prepare_run, run_federation
from photon.federation.sizes import Plausibility, clip_problem, measure, too_large
from photon.federation.spool import Spool
from photon.link.encoding import SparseTensor
from photon.link.messages import SiloInfo
from photon.strategy.base import Limits, Reply
from photon.strategy.contract import Contract, Leaving
from photon.telemetry.events import SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.adversary.harness import LyingGrid
from tests.adversary.lies import scaled, tensors
from tests.samples import train_report, train_request

Make = Callable[..., RunConfig]
SHAPES = {"w": torch.Size([3]), "own.w": torch.Size([2])}
CONTRACT = Contract(
    {"params": SHAPES},
    {
        "params": Leaving("parameters", SHAPES, masked=frozenset(["w"])),
        "exp_avg_sq": Leaving("mean", {"w": torch.Size([4])}),
        "sums": Leaving("sum", {"w": torch.Size([1])}),
    },
    own=frozenset(["own.w"]),
)
SENT = {"w": torch.tensor([1.0, 2.0, 3.0]), "own.w": torch.zeros(2)}


def test_what_is_measured_is_the_move_of_a_parameter_in_a_step() -> None:
    trained = {"w": SENT["w"] + torch.tensor([2.0, 1.0, 2.0]), "own.w": torch.tensor([3.0, 4.0])}
    groups = {"params": trained, "exp_avg_sq": {"w": torch.full((4,), 0.5)}, "sums": {"w": torch.ones(1)}}
    found = measure(groups, CONTRACT, SENT, update=False, masked=False, steps=4)
    assert found.norm == pytest.approx(3.0)
    assert found.whole == pytest.approx(math.hypot(3.0, 5.0))
    assert found.sizes == pytest.approx(
        {"params": 3 / math.sqrt(3 * 4), "own": 5 / math.sqrt(2), "exp_avg_sq": 0.5}
    )
    three = SparseTensor(torch.Size([3]), torch.tensor([1]), torch.tensor([3.0]))
    update: dict[str, torch.Tensor | SparseTensor] = {"w": three, "own.w": SENT["own.w"]}
    sparse = measure({"params": update}, CONTRACT, SENT, update=True, masked=False, steps=1)
    assert sparse.norm == pytest.approx(3.0)
    masked = measure({"params": trained}, CONTRACT, SENT, update=True, masked=True, steps=1)
    assert (masked.norm, masked.whole) == (None, None)
    assert set(masked.sizes) == {"own"}


def test_a_large_tensor_is_measured_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.federation.sizes._SLICE", 7)
    shapes = {"w": torch.Size([5, 4])}
    contract = Contract({"params": shapes}, {"params": Leaving("parameters", shapes)})
    start, end = torch.randn(5, 4), torch.randn(5, 4)
    found = measure({"params": {"w": end}}, contract, {"w": start}, update=False, masked=False, steps=1)
    assert found.norm == pytest.approx(float((end - start).norm()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_values_that_are_no_numbers_or_enormous_are_seen_in_every_group(value: float) -> None:
    for group in ("params", "exp_avg_sq"):
        groups: dict[str, Any] = {"params": dict(SENT), "exp_avg_sq": {"w": torch.zeros(4)}}
        groups[group]["w"] = groups[group]["w"].clone()
        groups[group]["w"][1] = value
        found = measure(groups, CONTRACT, SENT, update=False, masked=False, steps=1)
        assert "not finite, or enormous" in (too_large(found) or "")


def _judge(factor: float | None = 20.0, harmless: float = 0.0, **history: float) -> Plausibility:
    return Plausibility(factor, {name: {"params": size} for name, size in history.items()}, lambda: harmless)


def _rejected(judge: Plausibility, **sizes: float) -> list[str]:
    return sorted(judge.problems({name: {"params": size} for name, size in sizes.items()}))


def test_an_update_is_rejected_beside_the_median_of_its_round_and_of_what_was_accepted() -> None:
    assert _rejected(_judge(), a=1.0, b=1.2, c=25.0) == ["c"]
    assert _rejected(_judge(), a=1.0, b=1.2, c=19.0) == []
    # One or two that are tiny reject nobody who is as the history has it.
    assert _rejected(_judge(a=1.0, b=1.0, c=1.0), a=1e-9, b=1e-9, c=1.0) == []
    # Rounds may grow, as in a warm-up: their median counts.
    assert _rejected(_judge(a=1e-3, b=1e-3, c=1e-3), a=1.0, b=1.1, c=0.9) == []
    # Of two nobody can say which is right, unless there is a history.
    assert _rejected(_judge(), a=1.0, b=1000.0) == []
    assert _rejected(_judge(a=1.0, b=1.1), a=1.0, b=1000.0) == ["b"]
    assert _rejected(_judge(a=1.0), a=1000.0) == ["a"]
    # A first round of the rate zero says nothing.
    assert _rejected(_judge(a=0.0, b=0.0), a=1.0, b=1.0) == []
    # What moves the model by a hundredth does it no harm.
    assert _rejected(_judge(harmless=30.0), a=1.0, b=1.2, c=25.0) == []
    assert _rejected(_judge(None), a=1.0, b=1.2, c=1e9) == []


def test_only_what_would_be_accepted_in_any_company_does_not_wait() -> None:
    judge = _judge(a=1.0, b=1.0)
    assert judge.at_once({"params": 19.0})
    assert not judge.at_once({"params": 21.0})
    assert not judge.at_once({"params": 1.0, "exp_avg": 1.0})  # a group that nobody has sent yet
    assert not _judge().at_once({"params": 1.0})
    assert _judge(None).at_once({"params": 1e9})


def test_states_of_local_optimizers_may_differ_by_the_square() -> None:
    sizes = {"a": 1.0, "b": 1.0, "c": 399.0}
    assert _judge().problems({name: {"exp_avg_sq": size} for name, size in sizes.items()}) == {}
    sizes["c"] = 401.0
    found = _judge().problems({name: {"exp_avg_sq": size} for name, size in sizes.items()})
    assert "its exp_avg_sq is 401 times as large as is usual" in found["c"]


@pytest.mark.parametrize("lossy", [False, True])
def test_a_clipped_update_is_no_longer_than_the_bound_and_the_noise(lossy: bool) -> None:
    room = 4 if lossy else 1.001
    assert clip_problem(0.999 * room, 100, 1.0, 0.0, lossy=lossy) is None
    assert "allows" in str(clip_problem(1.001 * room, 100, 1.0, 0.0, lossy=lossy))
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2 * 3
    assert clip_problem(float(noise.norm()), 10_000, 3.0, 2.0, lossy=lossy) is None
    assert clip_problem(9 * float(noise.norm()), 10_000, 3.0, 2.0, lossy=lossy) is not None


@pytest.mark.parametrize("payload", ["parameters", "update"])
def test_an_update_that_was_not_clipped_is_rejected(payload: str, small_config: Make, tmp_path: Path) -> None:
    more = ("privacy.clip_norm=0.05", f"link.uplink_payload={payload}")
    config = small_config("cohort=3", "rounds=2", "federation.admission.norm_factor=null", *more)
    lie = tensors("scaled", "", scaled(20.0 if payload == "update" else 1.02))
    run_federation(prepare_run(config), LyingGrid("train", {2: lie}), resume=False, live=False)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    (failed,) = [event for event in events if isinstance(event, SiloFailed)]
    assert (failed.silo, failed.round, failed.kind) == ("alpha", 2, "rejected")
    assert "privacy.clip_norm=0.05 allows" in failed.reason
    assert len([event for event in events if isinstance(event, SiloFinished)]) == 5


def _asked(steps: int, leaves: int = 1, pace: int = 1) -> Asked:
    request = train_request(steps=steps, batch_size=2)
    silo = SiloInfo(
        name="a",
        train_tokens=1,
        validation_tokens=1,
        unigram_loss=1.0,
        vocab_size=300,
        sequence_length=8,
        tokenizer_sha256="0" * 64,
        device="cpu",
        roofline_flops=None,
        federation=leaves > 1 or pace > 1,
        leaves=leaves,
        pace=pace,
    )
    return Asked(request, CONTRACT, None, {}, silo, 8, 0, local_steps=steps)


def test_nobody_has_more_than_a_share_of_what_a_cohort_is_asked() -> None:
    tokens = 4 * 2 * 8
    asked = {"a": _asked(4), "b": _asked(4), "liar": _asked(4, leaves=100, pace=50)}
    assert asked["liar"].tokens == 100 * 50 * tokens
    limits = limits_of(asked, 0.75)
    assert limits["liar"] == Limits(tokens=3 * 2 * tokens, leaves=3 * 2)
    weight = limits["liar"].tokens
    assert weight / (weight + 2 * tokens) == 0.75
    # One that does what it is asked counts for all of it.
    assert limits["a"] is not None
    assert limits["a"].tokens > tokens
    assert limits_of(asked, 1.0) == dict.fromkeys(asked)
    assert limits_of({"a": _asked(4)}, 0.5) == {"a": None}
    # With a small share everybody counts the same.
    equal = limits_of({"a": _asked(8), "b": _asked(2), "c": _asked(2)}, 1 / 3)
    assert equal["a"] == Limits(tokens=2 * 2 * 8, leaves=1)


def _reply(name: str, groups: dict[str, dict[str, torch.Tensor]], update: Any = None) -> Reply:
    return Reply(name, train_report(silo=name), groups, 0, {}, update)


def test_replies_that_are_too_large_for_memory_wait_on_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "replies", limit=100).emptied()
    small = _reply("a", {"params": {"w": torch.ones(20)}})
    assert spool.keep(small) is small
    sparse = SparseTensor(torch.Size([1000]), torch.tensor([3, 7]), torch.tensor([1.0, 2.0]))
    groups = {"exp_avg": {"w": torch.arange(100.0)}, "shared/c": {"w": torch.ones(2, 2, dtype=torch.float64)}}
    large = spool.keep(_reply("b", groups, {"w": sparse, "v": torch.full((3,), 2.0)}))
    assert len(list((tmp_path / "replies").iterdir())) == 1
    assert large.update is not None
    found = large.update["w"]
    assert isinstance(found, SparseTensor)
    assert torch.equal(found.dense(), sparse.dense())
    assert torch.equal(large.groups["exp_avg"]["w"], groups["exp_avg"]["w"])
    assert large.groups["shared/c"]["w"].dtype == torch.float64
    again = spool.keep(large)  # under another name: what is mapped stays what it is
    spool.emptied()
    assert not (tmp_path / "replies").exists()
    assert torch.equal(again.groups["exp_avg"]["w"], groups["exp_avg"]["w"])
