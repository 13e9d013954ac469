"""Training of the policy: REINFORCE with a mean as baseline, of the batch or of a question's graphs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from photon.errors import RunError
from photon.orchestration.graph import contributions, log_probability, ranks, sampled
from photon.orchestration.method import TrainingSection
from photon.orchestration.policy import Policy


class World(Protocol):
    """Questions, what agents drafted, and what comes of a graph."""

    def __len__(self) -> int:
        """Return how many questions there are."""

    def drafts(self, questions: Tensor) -> Tensor:
        """Return the embeddings of drafts, (B, N, d), of questions by number, int64 of shape (B,)."""

    def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
        """Return how good the final answer is, float of shape (B,); NaN where it could not be had.

        Parameters
        ----------
        questions
            int64 of shape (B,).
        edges
            bool of shape (B, N, N).
        """


@dataclass(frozen=True)
class Update:
    """Figures of an update: means over its batch."""

    number: int
    reward: float
    edges: float
    counted: int


def surrogate(log_probabilities: Tensor, rewards: Tensor, baseline: Tensor | float) -> Tensor:
    """Return −(R − R̄) log p(G) for each graph, whose gradient is that of the expected reward, negated.

    Parameters
    ----------
    log_probabilities
        Shape (B,), with gradients.
    rewards
        Shape (B,).
    baseline
        R̄.
    """
    return -(rewards - baseline).detach() * log_probabilities


def baseline(rewards: Tensor, graphs: int) -> Tensor:
    """Return what each reward is compared with; a reward that is NaN counts nowhere.

    Parameters
    ----------
    rewards
        Shape (B · graphs,), the graphs of a question one after the other.
    graphs
        Drawn for each question. 1: the mean of all; more: the mean of the question's.
    """
    if graphs == 1:
        return rewards.nanmean().expand_as(rewards)
    return rewards.view(-1, graphs).nanmean(1).repeat_interleave(graphs)


def sparsity(edges: Tensor, training: TrainingSection) -> Tensor:
    """Return λ_sp |E|, or λ_sp times the share of possible edges, for graphs of shape (B, N, N)."""
    agents = edges.shape[-1]
    number = edges.sum((-2, -1)).to(torch.get_default_dtype())
    if training.sparsity_norm == "pairs":
        number = number / max(1, agents * (agents - 1) // 2)
    return training.lambda_sp * number


class Reinforce:
    """A policy in training; `steps` takes updates, one after the other.

    Parameters
    ----------
    policy
        It is changed.
    training
        Settings.
    seed
        Of all draws: batches, graphs, dropout.
    """

    def __init__(self, policy: Policy, training: TrainingSection, *, seed: int) -> None:
        self.policy, self.training = policy, training
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=training.lr)
        self.number = 0
        self._draw = torch.Generator().manual_seed(seed)

    def steps(self, world: World, number: int) -> Iterator[Update]:
        """Take so many updates.

        Raises
        ------
        RunError
            If fewer than two graphs of a batch could be judged.
        """
        for _ in range(number):
            yield self._step(world)

    def _step(self, world: World) -> Update:
        self.policy.train()
        asked = torch.randint(len(world), (self.training.batch,), generator=self._draw)
        embeddings = world.drafts(asked)
        # Log-probabilities are those of the very pass that graphs are drawn by, so dropout is the same.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=self._draw)))
            drawn = self.policy(embeddings)
        # Each question as many times as graphs are drawn for it.
        graphs = self.training.graphs
        questions, logits = asked.repeat_interleave(graphs), drawn.repeat_interleave(graphs, 0)
        rank = ranks(contributions(embeddings)).repeat_interleave(graphs, 0)
        edges = sampled(logits, rank, self._draw)
        task = world.rewards(questions, edges).to(logits.dtype)
        known = ~task.isnan()
        if int(known.sum()) < 2:
            raise RunError(
                "fewer than two graphs of a batch could be judged, because agents did not answer; see to the "
                "endpoints and start again: what was answered is kept"
            )
        rewards = task - sparsity(edges, self.training).to(logits.dtype)
        compared = baseline(rewards, graphs)[known]
        rewards = rewards[known]
        terms = surrogate(log_probability(logits, rank, edges)[known], rewards, compared)
        self.optimizer.zero_grad()
        terms.mean().backward()
        self.optimizer.step()
        self.number += 1
        return Update(
            self.number,
            float(rewards.mean()),
            float(edges[known].sum((-2, -1)).float().mean()),
            int(known.sum()),
        )
