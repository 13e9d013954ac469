"""The sync plan against the paper's tables and formulas."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from photon.errors import PhotonError
from photon.strategy.base import strategy_of
from photon.strategy.photon import Photon
from photon.strategy.sync import Period, SyncPlan, betas_of, bytes_per_cycle, half_life, suggest_periods
from photon.training.loop import state_group_names
from tests.conftest import SMALL, composed

ADAM = ["exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize(
    ("beta", "steps"), [(0.9, 6.6), (0.95, 13.5), (0.99, 69.0), (0.999, 692.8), (0.9999, 6931.1)]
)
def test_half_lives_are_the_papers(beta: float, steps: float) -> None:
    assert half_life(beta) == pytest.approx(steps, abs=0.06)
    assert beta ** half_life(beta) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("local_steps", "periods", "reduction"),
    [
        (16, dict.fromkeys(ADAM, 16), 5.333),
        (32, dict.fromkeys(ADAM, 32), 10.67),
        (256, dict.fromkeys(ADAM, 256), 85.33),
        (16, {"exp_avg": 48, "exp_avg_sq": 96}, 10.67),
        (32, {"exp_avg": 96, "exp_avg_sq": 192}, 21.33),
        (256, {"exp_avg": 768, "exp_avg_sq": 1536}, 170.7),
        (32, {"exp_avg": 128, "exp_avg_sq": 256}, 23.27),
        (256, {"others": "never"}, 256.0),
        (32, {"exp_avg": 96, "exp_avg_sq": "never"}, 24.0),
    ],
)
def test_reduction_factors_are_the_papers(
    local_steps: int, periods: dict[str, Period], reduction: float
) -> None:
    """DDP sends one payload per step, so 1 / Σ (1/K) is the reduction against it."""
    plan = SyncPlan(periods, local_steps, ADAM)
    assert 1 / plan.payloads_per_step() == pytest.approx(reduction, rel=5e-4)


@pytest.mark.parametrize(
    ("periods", "payloads"),
    [
        ({"params": 8, "exp_avg": 24, "exp_avg_sq": 48}, 9),
        ({"params": 8, "exp_avg": 8, "exp_avg_sq": 8}, 18),
        ({"params": 8}, 6),
    ],
)
def test_six_rounds_send_the_papers_bytes(periods: dict[str, int], payloads: int) -> None:
    group_bytes = dict.fromkeys(["params", *ADAM], 1000)
    assert bytes_per_cycle(periods, 6, group_bytes) == payloads * 1000


def test_groups_are_due_at_the_end_of_their_period() -> None:
    plan = SyncPlan({"exp_avg": 24, "exp_avg_sq": 48}, 8, ADAM)
    due = {one: plan.due(8 * one) for one in range(1, 7)}
    assert due[1] == due[2] == due[4] == due[5] == ["params"]
    assert due[3] == ["params", "exp_avg"]
    assert due[6] == ["params", "exp_avg", "exp_avg_sq"]


def test_what_a_model_has_no_state_of_is_averaged_by_nobody_and_missed_by_nobody() -> None:
    """Adapters are matrices, so with them Muon alone has states, and what it has is the whole."""
    strategy = strategy_of(composed(*SMALL, "data.path=elsewhere", "strategy=muloco-averaged"))
    name, shape = "h.0.mlp.lora_A.weight", torch.Size([2, 16])
    contract = strategy.contract(1, {name: shape})
    assert set(contract.leaving) == {"params", "momentum_buffer"}
    received = {group: {name: torch.ones(shape)} for group in contract.leaving}
    request: Any = SimpleNamespace(
        contract=contract, scalars={"step": 4.0}, global_step=8, averaged_rounds={"momentum_buffer": 1}
    )
    start = strategy.local.joined(received, None, request, received["params"], received["params"])
    assert start.optimizer is not None
    assert set(start.optimizer) == {"momentum_buffer"}


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ({"exp_avgs": 24}, "did you mean 'exp_avg'"),
        ({"exp_avg": 4}, "at least as often as any state"),
        ({"exp_avg": 12}, "choose a multiple of local_steps=8"),
        ({"params": 16}, "set local_steps=16"),
        ({"exp_avg": 24.0, "exp_avg_sq": 24}, "expected a number of local steps, or never"),
        ({"exp_avg": "often", "exp_avg_sq": 24}, "expected a number of local steps, or never"),
        (
            {"exp_avg": 24},
            r"exp_avg_sq of the local optimizer has no period; write \+\+strategy.sync=\{exp_avg: 24, "
            r"exp_avg_sq: 48\}, or never",
        ),
    ],
)
def test_impossible_plans_are_refused(periods: dict[str, Any], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        SyncPlan(periods, 8, ADAM)


def test_periods_are_suggested_from_half_lives_or_by_ratio() -> None:
    decays = {"exp_avg": 0.95, "exp_avg_sq": 0.999}
    assert suggest_periods(ADAM, 32) == {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}
    by_half_life = suggest_periods(ADAM, 32, decays)
    assert by_half_life == {"params": 32, "exp_avg": 32, "exp_avg_sq": 32 * math.ceil(692.8 / 32)}


@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [
        ({"_target_": "torch.optim.AdamW", "lr": 0.1}, ADAM),
        ({"_target_": "torch.optim.SGD", "lr": 0.1}, []),
        ({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, ["momentum_buffer"]),
        (
            {
                "_target_": "photon.optim.QHAdamW",
                "lr": 0.1,
                "betas": [0.9, 0.99, 0.999],
                "weights": [0.5, 0.4],
            },
            ["exp_avg", "exp_avg_2", "exp_avg_sq"],
        ),
    ],
)
def test_state_groups_are_found_by_a_step_without_memory(optimizer: dict, groups: list[str]) -> None:
    assert state_group_names(optimizer) == groups


def plan_of(*overrides: str) -> dict[str, int]:
    config = composed(*SMALL, "data.path=elsewhere", "local_steps=32", *overrides)
    strategy = strategy_of(config)
    assert isinstance(strategy, Photon)
    assert strategy.plan is not None
    return strategy.plan.periods


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("optimizer", "periods"),
    [
        ("adamw", {"exp_avg": 96, "exp_avg_sq": 192}),
        ("adopt", {"exp_avg": 96, "exp_avg_sq": 192}),
        ("muon", {"exp_avg": 96, "exp_avg_sq": 192, "momentum_buffer": 96}),
        ("qhadamw", {"exp_avg": 96, "exp_avg_sq": 192}),
        (
            "qhadamw optimizer.betas=[0.9,0.999,0.999] optimizer.weights=[0.05,0.95]",
            {"exp_avg": 96, "exp_avg_2": 96, "exp_avg_sq": 192},
        ),
    ],
)
def test_the_preset_names_every_state_as_is_suggested(optimizer: str, periods: dict[str, int]) -> None:
    chosen = [f"optimizer={optimizer.split(maxsplit=1)[0]}", *optimizer.split()[1:]]
    assert plan_of("strategy=desloc", *chosen) == {"params": 32, **periods}
    assert suggest_periods(list(periods), 32) == {"params": 32, **periods}
    for strategy in ("local-adam", "mtdao"):
        assert plan_of(f"strategy={strategy}", *chosen) == dict.fromkeys(["params", *periods], 32)


def test_moments_have_the_period_of_their_basis() -> None:
    lordo = dict.fromkeys(["basis", "exp_avg", "exp_avg_sq"], 32)
    assert plan_of("strategy=lordo") == {"params": 32, **lordo}
    with pytest.raises(PhotonError) as caught:
        plan_of("strategy=desloc", "optimizer=lordo")
    message = "mean something together alone; give them one period, such as ++strategy.sync={basis: 32, "
    assert message in str(caught.value)
    given = "++strategy.sync={basis: 64, exp_avg: 64, exp_avg_sq: 64}"
    assert plan_of("strategy=desloc", "optimizer=lordo", given)["basis"] == 64
    apart = "++strategy.sync={basis: never, exp_avg: 64, exp_avg_sq: 64}"
    with pytest.raises(PhotonError, match="mean something together alone"):
        plan_of("strategy=desloc", "optimizer=lordo", apart)
    decays = {"exp_avg": 0.9, "exp_avg_sq": 0.999}
    assert suggest_periods(lordo, 32, decays, list(lordo)) == {"params": 32, **lordo}


def test_decays_are_matched_with_their_groups() -> None:
    # A momentum without weight has no state; Muon has one of its own.
    weighted = {"betas": [0.9, 0.99, 0.999], "weights": [0.0, 0.95]}
    assert betas_of(weighted, ADAM) == {"exp_avg": 0.99, "exp_avg_sq": 0.999}
    muon = {"betas": [0.9, 0.99], "momentum": 0.8}
    assert betas_of(muon, [*ADAM, "momentum_buffer"])["momentum_buffer"] == 0.8
    groups = ["exp_avg", "exp_avg_2", "exp_avg_sq"]
    assert betas_of({"betas": [0.9, 0.99, 0.999]}, groups) == {
        "exp_avg": 0.9,
        "exp_avg_2": 0.99,
        "exp_avg_sq": 0.999,
    }
