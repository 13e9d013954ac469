"""Who reads whom: from drafts to a graph, in each of the ways that can be chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from photon.components import nearest
from photon.errors import PhotonError
from photon.files.hashing import hash_of, hash_of_file
from photon.orchestration.graph import allowed, contributions, likeliest, ranks, sampled
from photon.orchestration.method import Method
from photon.orchestration.policy import Policy, load_policy

#: How a policy is named that was trained.
NEXA = "nexa:"
SELF_CONSISTENCY = "self-consistency"
NAMES = ("parallel", SELF_CONSISTENCY, "selforg", "full", "rule")


@dataclass(frozen=True)
class Responses:
    """What agents have answered to a question.

    Attributes
    ----------
    embeddings
        r, float of shape (N, d), in unit length.
    psi
        ψ, shape (N,).
    rank
        Places in π, int64 of shape (N,).
    answers
        The answer of each; equal ones are the same text.
    """

    embeddings: Tensor
    psi: Tensor
    rank: Tensor
    answers: tuple[str, ...]

    @classmethod
    def of(cls, embeddings: Tensor, answers: Sequence[str]) -> "Responses":
        """Return responses with their contributions and their order."""
        psi = contributions(embeddings)
        return cls(embeddings, psi, ranks(psi), tuple(answers))


Edges = Callable[[Responses, str], Tensor]
"""Makes bool edges of shape (N, N) of responses and the question's id, by which chance is seeded."""


@dataclass(frozen=True)
class Who:
    """A way to decide who reads whom.

    Attributes
    ----------
    name
        As it was chosen.
    edges
        The graph.
    rounds
        Propagations, at most.
    method
        Settings; those of a trained policy are the ones that it was trained with.
    fingerprint
        By which another policy of the same name is known.
    size
        d of a trained policy.
    """

    name: str
    edges: Edges
    rounds: int
    method: Method
    fingerprint: str = ""
    size: int | None = None

    def check_size(self, size: int) -> None:
        """Check that a trained policy takes vectors of ``size`` numbers.

        Raises
        ------
        PhotonError
            If it does not.
        """
        if self.size is not None and self.size != size:
            raise PhotonError(
                f"--policy={self.name}: takes vectors of {self.size} numbers, and its encoder gives {size}; "
                "train it anew with this encoder"
            )

    @property
    def is_vote(self) -> bool:
        """Whether one agent is asked several times, and the plurality answers."""
        return self.name == SELF_CONSISTENCY


def who_of(name: str, method: Method) -> Who:
    """Return the way that a name stands for.

    Raises
    ------
    PhotonError
        If it is none (the nearest is named), or the policy's file cannot be read.
    """
    if name.startswith(NEXA):
        path = Path(name.removeprefix(NEXA))
        trained = load_policy(path)
        edges = by_policy(trained.policy, trained.method)
        return Who(name, edges, 1, trained.method, hash_of_file(path), trained.policy.size)
    ways: dict[str, tuple[Edges, int]] = {
        "parallel": (_none, 1),
        SELF_CONSISTENCY: (_none, 1),
        "full": (lambda responses, _: allowed(responses.rank), 1),
        "rule": (_between_unlike, 1),
        "selforg": (_similar(method.selforg.threshold), method.selforg.rounds),
    }
    if name not in ways:
        known = [*NAMES, f"{NEXA}FILE"]
        raise PhotonError(
            f"--policy={name}: no such policy{nearest(name, known)}; there are {', '.join(known)}"
        )
    edges, rounds = ways[name]
    return Who(name, edges, rounds, method)


def by_policy(policy: Policy, method: Method) -> Edges:
    """Return the way of a trained policy: edges that are likelier than not, or drawn by their probability."""
    policy.eval()

    def edges(responses: Responses, question: str) -> Tensor:
        with torch.no_grad():
            logits = policy(responses.embeddings.float().unsqueeze(0))[0]
        if method.test_decision == "threshold":
            return likeliest(logits, responses.rank)
        seed = int(hash_of(f"{method.training.seed} {question}".encode())[:15], 16)
        return sampled(logits, responses.rank, torch.Generator().manual_seed(seed))

    return edges


def _none(responses: Responses, _: str) -> Tensor:
    return torch.zeros((len(responses.rank),) * 2, dtype=torch.bool)


def _between_unlike(responses: Responses, _: str) -> Tensor:
    """Join every two whose answers differ: what a policy has to be better than."""
    unlike = [[one != other for other in responses.answers] for one in responses.answers]
    return torch.tensor(unlike).view_as(allowed(responses.rank)) & allowed(responses.rank)


def _similar(threshold: float) -> Edges:
    def edges(responses: Responses, _: str) -> Tensor:
        """Join m to n if cos(r_n, r_m) ≥ τ and ψ_m > ψ_n (2510.00685)."""
        near = responses.embeddings @ responses.embeddings.mT >= threshold
        above = responses.psi.unsqueeze(-1) > responses.psi.unsqueeze(-2)
        return near & above & allowed(responses.rank)

    return edges
