"""Silos that find nothing to train on: what such a reply may say, and that nothing of it is folded."""

import math
from typing import Any

import pytest
import torch

from photon.federation.admission import Asked, problem_with
from photon.link.messages import TrainReport
from photon.state.checkpoint import Checkpoint
from photon.strategy.anchored import Anchored
from photon.strategy.base import Reply
from photon.strategy.contract import PARAMS, Contract, Leaving
from tests.conftest import SMALL, composed
from tests.objective.test_anchor import ANCHORED
from tests.samples import train_report, train_request

SHAPES = {"w": torch.Size([3])}
CONTRACT = Contract({PARAMS: SHAPES}, {PARAMS: Leaving("parameters", SHAPES)})
GROUPS = {PARAMS: {"w": torch.ones(3)}}


def idle(**changed: Any) -> TrainReport:
    request = train_request()
    told: dict[str, Any] = {
        "steps": 0,
        "tokens": 0,
        "position": request.position + request.steps * request.batch_size,
        "loss": None,
        "loss_last": None,
        "learning_rate": None,
        "gradient_norm": None,
    }
    return train_report(**{"round": request.round, "silo": request.silo, **told, **changed})


def asked(*, may_idle: bool) -> Asked:
    request = train_request()
    return Asked(request, CONTRACT, None, {}, None, 16, 0, local_steps=request.steps, may_idle=may_idle)


def test_a_silo_may_take_no_steps_where_the_strategy_folds_that() -> None:
    assert problem_with(idle(), GROUPS, asked(may_idle=True)) is None
    assert "without a loss" in str(problem_with(idle(), GROUPS, asked(may_idle=False)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tokens": 5}, "it reports 5 tokens"),
        ({"position": 0}, "window 0, and no steps"),
        ({"loss": 1.0}, "it reports a loss, and has taken no steps"),
        ({"leaves": 3}, "and no steps"),
        ({"round": 7}, "it answers round 7"),
    ],
)
def test_what_such_a_reply_says_is_not_believed(changed: dict[str, Any], told: str) -> None:
    assert told in str(problem_with(idle(**changed), GROUPS, asked(may_idle=True)))


def test_nothing_of_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Anchored(composed(*SMALL, *ANCHORED, "data.path=none"))
    params = {"w": torch.tensor([1.0, 2.0, 3.0]), "class_head.bias": torch.zeros(3)}
    monkeypatch.setattr(strategy, "trained", dict)
    checkpoint = FakeCheckpoint(params)

    def reply(name: str, value: float, steps: int) -> Reply:
        report = train_report(silo=name) if steps else idle(silo=name)
        return Reply(name, report, {PARAMS: {"w": torch.full((3,), value)}}, 0, {})

    liars = [reply("a", 1e6, 0), reply("b", math.pi, 0)]
    nothing = strategy.aggregate_train(1, checkpoint, iter(liars))
    assert all(torch.equal(nothing.params[name], tensor) for name, tensor in params.items())
    assert nothing.weights == {}
    one = strategy.aggregate_train(1, checkpoint, iter([liars[0], reply("c", 5.0, 4), liars[1]]))
    assert torch.equal(one.params["w"], torch.full((3,), 5.0))
    assert torch.equal(one.params["class_head.bias"], params["class_head.bias"])
    assert one.weights == {"c": 1.0}


class FakeCheckpoint(Checkpoint):
    """A checkpoint in memory."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        object.__setattr__(self, "_params", params)
        object.__setattr__(self, "given", {})
        object.__setattr__(self, "state", type("State", (), {"outer_scalars": {}})())

    def load_params(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = object.__getattribute__(self, "_params")
        return dict(found)

    def load_outer(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}

    def load_kept(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}
