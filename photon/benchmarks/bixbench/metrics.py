"""Figures of a run: accuracy, precision and coverage, intervals, and the majority of several answers."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

#: Standard normal quantile of a 95 % interval, as the authors have it.
Z = 1.96


@dataclass(frozen=True)
class Figures:
    """Counts of a set of answers.

    Attributes
    ----------
    total, correct, refused
        Numbers of answers.
    """

    total: int
    correct: int
    refused: int

    @property
    def accuracy(self) -> float:
        """Correct of all; 0 of none."""
        return self.correct / self.total if self.total else 0.0

    @property
    def precision(self) -> float:
        """Correct of those that did not refuse; 0 where all did."""
        sure = self.total - self.refused
        return self.correct / sure if sure else 0.0

    @property
    def coverage(self) -> float:
        """Share that did not refuse; 0 of none."""
        return (self.total - self.refused) / self.total if self.total else 0.0


def wilson(share: float, number: int, z: float = Z) -> tuple[float, float]:
    """Return the Wilson interval of a share.

    centre = (p + z²/2n) / (1 + z²/n), half = z·sqrt(p(1 − p)/n + z²/4n²) / (1 + z²/n). Of nothing (n = 0) it
    is the whole of [0, 1].
    """
    if number == 0:
        return 0.0, 1.0
    scale = 1 + z * z / number
    centre = (share + z * z / (2 * number)) / scale
    half = z * math.sqrt(share * (1 - share) / number + (z / number) ** 2 / 4) / scale
    # At 0 and 1 the formula has exactly these bounds; rounding must not move them.
    lower = 0.0 if share == 0 else max(0.0, centre - half)
    upper = 1.0 if share == 1 else min(1.0, centre + half)
    return lower, upper


def clustered(right: Mapping[Hashable, Sequence[bool]], z: float = Z) -> tuple[float, float] | None:
    """Return an interval of the accuracy where answers of one cluster depend on each other.

    The variance is that of a ratio of cluster sums, with the correction for few clusters (Taylor
    linearisation): Var = K/(K − 1) · Σ_k (r_k − p·n_k)² / N², with r_k of n_k right in cluster k of K and
    p = Σ r_k / N. Clipped to [0, 1]; None where it cannot be estimated: for fewer than two clusters, and
    where all are alike.
    """
    clusters = len(right)
    total = sum(len(one) for one in right.values())
    if clusters < 2 or total == 0:
        return None
    share = sum(sum(one) for one in right.values()) / total
    squares = sum((sum(one) - share * len(one)) ** 2 for one in right.values())
    if squares == 0:
        return None
    if squares == 0:
        return None
    half = z * math.sqrt(clusters / (clusters - 1) * squares) / total
    return max(0.0, share - half), min(1.0, share + half)


def majority_votes(
    answers: Mapping[str, Sequence[str | None]],
    targets: Mapping[str, str],
    *,
    most: int | None = None,
    upstream: bool = False,
    seed: int = 0,
) -> list[float]:
    """Return the accuracy of the majority of k answers, for k = 1 … K.

    Parameters
    ----------
    answers
        Question to its replicas' letters; None for no answer, which is no vote.
    targets
        Question to its right letter.
    most
        K; by default the smallest number of replicas of a question.
    upstream
        As the authors' code: the last replica is dropped.
    seed
        Of the draws. For each k there are K + 1 trials, in each of which k replicas are drawn without
        replacement and, where several letters have most votes, the one that was drawn first wins.

    Returns
    -------
    list of float
        Means over trials and questions.
    """
    replicas = {name: list(given[:-1] if upstream else given) for name, given in answers.items()}
    fewest = min((len(given) for given in replicas.values()), default=0)
    most = fewest if most is None else min(most, fewest)
    draw = random.Random(seed)
    curve = []
    for size in range(1, most + 1):
        right = 0
        for _ in range(most + 1):
            for name, given in replicas.items():
                votes = [vote for vote in draw.sample(given, size) if vote is not None]
                right += bool(votes) and Counter(votes).most_common(1)[0][0] == targets[name]
        curve.append(right / ((most + 1) * len(replicas)))
    return curve


def grouped(pairs: Sequence[tuple[Hashable, bool]]) -> dict[Hashable, list[bool]]:
    """Return what is right by cluster."""
    found: dict[Hashable, list[bool]] = defaultdict(list)
    for cluster, right in pairs:
        found[cluster].append(right)
    return dict(found)
