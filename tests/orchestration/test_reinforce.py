"""The gradient is that of the expected reward, and what can be learnt is learnt."""

from typing import Any

import pytest
import torch
from torch import Tensor

from photon.errors import RunError
from photon.orchestration.graph import allowed, contributions, likeliest, log_probability, ranks
from photon.orchestration.method import PolicySection, TrainingSection
from photon.orchestration.policy import Policy
from photon.orchestration.reinforce import Reinforce, baseline, sparsity, surrogate
from tests.orchestration.test_graph import embeddings, graphs_of


def expected_edges(policy: Policy, embeddings: Tensor) -> Tensor:
    """Return the expected number of edges for each question, from embeddings of shape (B, N, d)."""
    policy.eval()
    with torch.no_grad():
        chance = policy(embeddings).sigmoid()
        return (chance * allowed(ranks(contributions(embeddings)))).sum((-2, -1))


@pytest.mark.parametrize("settings", [{}, {"logits": "asymmetric"}, {"learn_scale": True}])
def test_the_expected_surrogate_has_the_gradient_of_the_expected_reward(settings: dict[str, Any]) -> None:
    """All eight graphs of three agents, in float64: with any constant baseline."""
    policy = Policy(PolicySection(dropout=0.0, feedforward=2, logit_bias=-0.5, **settings), 6).double()
    r = embeddings(3, 2)
    rank = ranks(contributions(r))
    graphs = graphs_of(3, rank)
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(of: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(of, list(policy.parameters())))

    def log_probabilities() -> Tensor:
        logits = policy(r[None])[0].expand(8, 3, 3)
        return log_probability(logits, rank.expand(8, 3), graphs)

    exact = gradients((log_probabilities().exp() * rewards).sum())
    assert max(float(one.abs().max()) for one in exact) > 1e-4
    for constant in (0.0, float(rewards.mean()), 3.0):
        found = log_probabilities()
        sampled = gradients((found.detach().exp() * surrogate(found, rewards, constant)).sum())
        for one, other in zip(exact, sampled, strict=True):
            assert torch.allclose(one, -other, atol=1e-10)


class Bandit:
    """Drafts of four classes; the reward is the share of pairs whose edge is as the target says."""

    def __init__(self, target: str, size: int = 64, agents: int = 10, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.target = target
        centres = torch.nn.functional.normalize(torch.randn((4, size), generator=draw), dim=-1)
        self.classes = torch.randint(4, (512, agents), generator=draw)
        noise = 0.35 * torch.randn((512, agents, size), generator=draw) / size**0.5
        self.all = torch.nn.functional.normalize(centres[self.classes] + noise, dim=-1)

    def __len__(self) -> int:
        return len(self.all)

    def drafts(self, questions: Tensor) -> Tensor:
        return self.all[questions]

    def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
        if self.target == "constant":
            return torch.ones(len(questions))
        same = self.classes[questions].unsqueeze(-1) == self.classes[questions].unsqueeze(-2)
        wanted = {"same": same, "other": ~same, "none": torch.zeros_like(same)}[self.target]
        may = allowed(ranks(contributions(self.all[questions])))
        return ((edges == wanted) & may).sum((-2, -1)) / may.sum((-2, -1))


def trained(world: Bandit, updates: int, lr: float = 1e-3, **settings: Any) -> tuple[Policy, float]:
    """Train; return the policy and the reward of its thresholded graphs on new questions."""
    policy = Policy(PolicySection(dropout=0.0, **settings), world.all.shape[-1])
    training = TrainingSection(lr=lr, updates=updates, batch=64, lambda_sp=0.0)
    list(Reinforce(policy, training, seed=0).steps(world, updates))
    policy.eval()
    questions = torch.arange(256)
    r = world.drafts(questions)
    with torch.no_grad():
        edges = likeliest(policy(r), ranks(contributions(r)))
    return policy, float(world.rewards(questions, edges).mean())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [64, 384])
def test_the_toy_targets_are_learnt_from_an_unsaturated_start(size: int) -> None:
    assert trained(Bandit("same", size), 400)[1] >= 0.98
    world = Bandit("none", size)
    policy, reward = trained(world, 400)
    assert reward >= 0.98
    assert float(expected_edges(policy, world.all[:256]).mean()) <= 0.5


@pytest.mark.slow
def test_unlike_drafts_are_joined_by_asymmetric_logits_and_not_by_gram_ones() -> None:
    assert trained(Bandit("other"), 400)[1] <= 0.80  # at best the full graph
    assert trained(Bandit("other"), 400, logits="asymmetric", logit_bias=0.0)[1] >= 0.90


def test_a_few_updates_raise_the_reward() -> None:
    world = Bandit("none", size=16)
    before, after = (trained(world, updates, lr=0.01, logit_bias=-3.5)[0] for updates in (1, 60))
    fewer = [float(expected_edges(one, world.all[:64]).mean()) for one in (before, after)]
    assert fewer[1] < 0.5 * fewer[0]


def test_a_constant_reward_without_a_price_has_no_gradient() -> None:
    policy = Policy(PolicySection(dropout=0.0, logit_bias=0.0), 64)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    loop = Reinforce(policy, TrainingSection(batch=8, lambda_sp=0.0, lr=0.1), seed=0)
    list(loop.steps(Bandit("constant"), 3))
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    list(
        Reinforce(policy, TrainingSection(batch=8, lambda_sp=0.1, lr=0.1), seed=0).steps(
            Bandit("constant"), 1
        )
    )
    assert not all(torch.equal(before[name], value) for name, value in policy.state_dict().items())


def test_training_repeats_and_leaves_the_global_random_state_alone() -> None:
    def run(seed: int) -> dict[str, Tensor]:
        policy = Policy(PolicySection(dropout=0.3, logit_bias=-3.0), 64)
        list(Reinforce(policy, TrainingSection(batch=8), seed=seed).steps(Bandit("same"), 5))
        return policy.state_dict()

    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = run(1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    again, other = run(1), run(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_sparsity_is_a_share_or_a_number() -> None:
    edges = torch.zeros((2, 10, 10), dtype=torch.bool)
    edges[1] = torch.ones(10, 10).triu(1).bool()
    assert sparsity(edges, TrainingSection(lambda_sp=0.1)).tolist() == pytest.approx([0, 0.1])
    raw = TrainingSection(lambda_sp=0.1, sparsity_norm="raw")
    assert sparsity(edges, raw).tolist() == pytest.approx([0, 4.5])


def test_baselines_are_means_of_what_is_known() -> None:
    rewards = torch.tensor([1.0, 0.0, float("nan"), 0.5])
    assert baseline(rewards, 1).tolist() == [0.5] * 4
    assert baseline(rewards, 2).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert baseline(torch.tensor([1.0, 0.0, 4.0, 2.0]), 2).tolist() == [0.5, 0.5, 3.0, 3.0]


def test_several_graphs_of_a_question_are_drawn_and_judged() -> None:
    class Watched(Bandit):
        asked: Tensor

        def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
            self.asked = questions
            self.edges = edges
            return super().rewards(questions, edges)

    world = Watched("same")
    policy = Policy(PolicySection(logit_bias=0.0), 64)
    (update,) = Reinforce(policy, TrainingSection(batch=3, graphs=4), seed=0).steps(world, 1)
    assert update.counted == 12
    assert world.asked.view(3, 4).eq(world.asked.view(3, 4)[:, :1]).all()
    assert not world.edges[0].equal(world.edges[1])


class Half(Bandit):
    """A world where some rewards cannot be had."""

    def __init__(self, kept: int) -> None:
        super().__init__("same")
        self.kept = kept

    def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
        found = super().rewards(questions, edges)
        found[self.kept :] = float("nan")
        return found


def test_graphs_that_could_not_be_judged_do_not_count() -> None:
    policy = Policy(PolicySection(logit_bias=-3.0), 64)
    training = TrainingSection(batch=8)
    (update,) = Reinforce(policy, training, seed=0).steps(Half(5), 1)
    assert update.counted == 5
    assert all(bool(value.isfinite().all()) for value in policy.state_dict().values())
    with pytest.raises(RunError, match="start again"):
        list(Reinforce(policy, training, seed=0).steps(Half(1), 1))
