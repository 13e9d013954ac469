"""The sync plan against the paper's tables and formulas."""

import math

import pytest

from photon.errors import PhotonError
from photon.strategy.sync import SyncPlan, betas_of, bytes_per_cycle, half_life, suggest_periods
from photon.training.loop import state_group_names

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
        (256, {}, 256.0),
        (32, {"exp_avg": 96}, 24.0),
    ],
)
def test_reduction_factors_are_the_papers(
    local_steps: int, periods: dict[str, int], reduction: float
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


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ({"exp_avgs": 24}, "did you mean 'exp_avg'"),
        ({"exp_avg": 4}, "at least as often as any state"),
        ({"exp_avg": 12}, "choose a multiple of local_steps=8"),
        ({"params": 16}, "set local_steps=16"),
    ],
)
def test_impossible_plans_are_refused(periods: dict[str, int], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        SyncPlan(periods, 8, ADAM)


def test_periods_are_suggested_from_half_lives_or_by_ratio() -> None:
    betas = {"exp_avg": 0.95, "exp_avg_sq": 0.999}
    assert suggest_periods(betas, 32, by_half_life=False) == {"params": 32, "exp_avg": 96, "exp_avg_sq": 192}
    by_half_life = suggest_periods(betas, 32, by_half_life=True)
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


def test_decays_are_matched_with_their_groups() -> None:
    groups = ["exp_avg", "exp_avg_2", "exp_avg_sq"]
    assert betas_of({"betas": [0.9, 0.99, 0.999]}, groups) == {
        "exp_avg": 0.9,
        "exp_avg_2": 0.99,
        "exp_avg_sq": 0.999,
    }
