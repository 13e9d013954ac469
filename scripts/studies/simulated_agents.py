"""Agents whose skills are numbers: how often they find the right answer, and tell it from a wrong one.

A question has a right class, drawn anew for each question from many, so that no vector looks right by itself,
and a few wrong ones that mislead. An agent's draft is right by chance, more often on easy questions. Who
answers again looks at its own answer and at those that it reads, and finds each of them good or not; what it
thinks of an answer is drawn once for each question, agent and answer, whatever else is shown. It keeps its
own if that is good, else takes the one that most of those whom it reads have, of those that are good, else
keeps its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from photon.orchestration.graph import chosen, contributions, ranks


@dataclass(frozen=True)
class Skills:
    """What agents can do, and what they are asked.

    Attributes
    ----------
    finding
        Chance that a draft is right, the mean over questions.
    checking
        Chance that an answer is judged rightly.
    agents, classes, wrong
        Agents, classes there are, and wrong classes that a question misleads to.
    spread
        By how much the chance of a right draft is higher and lower, at most, from question to question.
    size
        Numbers of an embedding.
    """

    finding: float
    checking: float
    agents: int = 10
    classes: int = 50
    wrong: int = 3
    spread: float = 0.3
    size: int = 64


class Simulated:
    """Questions with drafts that are there, and refinements that follow from a graph.

    Parameters
    ----------
    skills
        Of the agents.
    questions
        How many.
    seed
        Of everything but the vectors of classes, which are the same for all.
    shuffled
        Whether an answer is judged by the right class of another question.
    """

    def __init__(self, skills: Skills, questions: int, *, seed: int, shuffled: bool = False) -> None:
        self.skills = skills
        draw = torch.Generator().manual_seed(seed)
        shape = (questions, skills.agents)
        centres = torch.randn((skills.classes, skills.size), generator=torch.Generator().manual_seed(2605))
        self._centres = torch.nn.functional.normalize(centres, dim=-1)
        # The candidates of a question: the right class, and wrong ones.
        order = torch.rand((questions, skills.classes), generator=draw).argsort(-1)
        self._candidates = order[:, : skills.wrong + 1]
        chance = skills.finding + skills.spread * (2 * torch.rand((questions, 1), generator=draw) - 1)
        is_right = torch.rand(shape, generator=draw) < chance.clamp(0, 1)
        misled = 1 + torch.randint(skills.wrong, shape, generator=draw)
        self._drafted = torch.where(is_right, torch.zeros_like(misled), misled)
        right = torch.zeros((1, 1, skills.wrong + 1), dtype=torch.bool)
        right[..., 0] = True
        judged_well = torch.rand((*shape, skills.wrong + 1), generator=draw) < skills.checking
        self._good = judged_well == right
        self._noise = 0.35 * torch.randn((*shape, skills.size), generator=draw) / skills.size**0.5
        self.right = self._candidates[:, 0]
        if shuffled:
            self.right = self.right[torch.randperm(questions, generator=draw)]

    def __len__(self) -> int:
        return len(self.right)

    def _embedded(self, questions: Tensor, candidates: Tensor) -> Tensor:
        classes = self._candidates[questions].gather(1, candidates)
        return torch.nn.functional.normalize(self._centres[classes] + self._noise[questions], dim=-1)

    def drafts(self, questions: Tensor) -> Tensor:
        """Return the embeddings of drafts, (B, N, d)."""
        return self._embedded(questions, self._drafted[questions])

    def unlike(self, questions: Tensor) -> Tensor:
        """Return which drafts differ, bool of shape (B, N, N)."""
        drafted = self._drafted[questions]
        return drafted.unsqueeze(-1) != drafted.unsqueeze(-2)

    def refined(self, questions: Tensor, edges: Tensor) -> Tensor:
        """Return what each agent answers in the end, a candidate's number: int64 of shape (B, N)."""
        current = self._drafted[questions].clone()
        order = ranks(contributions(self.drafts(questions))).argsort(-1)
        rows = torch.arange(len(questions))
        for place in range(order.shape[1]):
            agent = order[:, place]
            read = edges[rows, :, agent]
            good = self._good[questions, agent]
            own = current[rows, agent]
            votes = torch.zeros(good.shape).scatter_add_(1, current, read.float())
            votes = torch.where(good, votes, torch.zeros_like(votes))
            keeps = good[rows, own] | (votes.amax(1) == 0)
            current[rows, agent] = torch.where(keeps, own, votes.argmax(1))
        return current

    def answers(self, questions: Tensor, edges: Tensor) -> Tensor:
        """Return whether the final answer is right, bool of shape (B,)."""
        refined = self.refined(questions, edges)
        embedded = self._embedded(questions, refined)
        best = chosen(embedded, contributions(embedded), 0.0)
        rows = torch.arange(len(questions))
        classes = self._candidates[questions, refined[rows, best]]
        return classes == self.right[questions]

    def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
        """Return 1 where the final answer is right, else 0."""
        return self.answers(questions, edges).float()
