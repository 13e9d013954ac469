"""A federation of one is training in one place; several silos train one policy, and questions stay."""

from typing import Any

import pytest
import torch

from photon.orchestration.federated import Federated
from photon.orchestration.method import PolicySection, TrainingSection
from photon.orchestration.policy import Policy
from photon.orchestration.reinforce import Reinforce
from tests.orchestration.test_reinforce import Bandit, expected_edges

SECTION = PolicySection(dropout=0.3, feedforward=1, logit_bias=-3.0)
TRAINING = TrainingSection(batch=8, lr=0.01)


def equal(one: Policy, other: Policy) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("rounds", [1, 3, 12])
def test_one_silo_is_centralised_training_to_the_last_bit(rounds: int) -> None:
    alone, together = Policy(SECTION, 16), Policy(SECTION, 16)
    list(Reinforce(alone, TRAINING, seed=4).steps(Bandit("none", 16), 12))
    federation = Federated(together, TRAINING, {"one": Bandit("none", 16)}, seed=4)
    list(federation.rounds(rounds, 12 // rounds))
    assert equal(alone, together)
    assert not equal(alone, Policy(SECTION, 16))


def test_silos_count_by_their_questions() -> None:
    """The global policy is the weighted mean of what each silo has come to, by hand."""

    class Small(Bandit):
        def __len__(self) -> int:
            return 128

    worlds: dict[str, Any] = {"large": Bandit("none", 16, seed=1), "small": Small("same", 16, seed=2)}
    together = Policy(SECTION, 16)
    (done,) = Federated(together, TRAINING, worlds, seed=4).rounds(1, 5)
    apart = [Policy(SECTION, 16) for _ in worlds]
    for number, (policy, world) in enumerate(zip(apart, worlds.values(), strict=True)):
        list(Reinforce(policy, TRAINING, seed=4 + number).steps(world, 5))
    for name, value in together.state_dict().items():
        one, other = (policy.state_dict()[name] for policy in apart)
        assert torch.allclose(value, (512 * one + 128 * other) / 640, atol=1e-6)
    assert set(done.silos) == {"large", "small"}
    assert done.step.pseudo_gradient_norm > 0


def test_silos_learn_together_and_the_outer_optimizer_may_be_any() -> None:
    worlds: dict[str, Any] = {f"silo-{seed}": Bandit("none", 16, seed=seed) for seed in range(3)}
    held_out = Bandit("none", 16, seed=9).all[:64]
    nesterov = {"_target_": "torch.optim.SGD", "lr": 0.7, "momentum": 0.9, "nesterov": True}
    for outer in (None, nesterov):
        policy = Policy(PolicySection(dropout=0.0, feedforward=1, logit_bias=-3.0), 16)
        before = float(expected_edges(policy, held_out).mean())
        list(Federated(policy, TRAINING, worlds, seed=0, outer=outer).rounds(5, 10))
        assert float(expected_edges(policy, held_out).mean()) < 0.6 * before
