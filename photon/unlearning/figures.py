"""Figures of forgetting: how much of an answer is given, how its tokens rank, how much must be shown."""

import math
import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

#: A gold token counts as hit up to this rank.
HIT_RANK = 100


def words(text: str) -> list[str]:
    """Return the words of a text as ROUGE counts them: small letters and digits, without stemming."""
    return re.findall(r"[a-z0-9]+", text.lower()) or re.findall(r"\w+", text.casefold())


def rouge_1_recall(answer: str, gold: str) -> float:
    """Return the share of the gold answer's words that the answer has."""
    wanted, given = Counter(words(gold)), Counter(words(answer))
    return (wanted & given).total() / wanted.total() if wanted else 0.0


def rouge_l(answer: str, gold: str) -> tuple[float, float]:
    """Return recall and F-measure of the longest sequence of words that both have in this order."""
    wanted, given = words(gold), words(answer)
    lengths = [0] * (len(given) + 1)
    for word in wanted:
        before = 0
        for index, other in enumerate(given, 1):
            above = lengths[index]
            lengths[index] = before + 1 if word == other else max(above, lengths[index - 1])
            before = above
    common = lengths[-1]
    if not common:
        return 0.0, 0.0
    return common / len(wanted), 2 * common / (len(wanted) + len(given))


def is_exact(answer: str, gold: str) -> bool:
    """Return whether an answer has the words of the gold answer and no others."""
    return words(answer) == words(gold)


def deviation_score(forget: float, retain: float) -> float:
    """Return DS = 100 √(R_f² + (1 − R_r)²), 0 where all is forgotten and all retained; R are recalls."""
    return 100 * math.hypot(forget, 1 - retain)


def reciprocal_rank(ranks: Sequence[int], tokens: int) -> float:
    """Return the mean of 1 / rank over the gold tokens.

    Parameters
    ----------
    ranks
        Of each gold token among the logits of the step at which the model wrote its own answer, from 1. An
        answer that ends early has no logits for what is left: these tokens count 0.
    tokens
        How many gold tokens there are.
    """
    return sum(1 / rank for rank in ranks) / tokens


def hit_rate(ranks: Sequence[int], tokens: int) -> float:
    """Return the share of the gold tokens that rank among the first `HIT_RANK`."""
    return sum(rank <= HIT_RANK for rank in ranks) / tokens


def rank_of(logits: Tensor, token: int) -> int:
    """Return the rank of a token among logits of shape (vocabulary,), from 1; of equal ones all are first."""
    return 1 + int((logits > logits[token]).sum())


def extraction_strength(right: Sequence[bool]) -> float:
    """Return ES = 1 − k / L: k of L gold tokens must be shown for the model to write all others.

    Parameters
    ----------
    right
        Of each gold token, whether it is the likeliest after the gold tokens before it. After the last one
        that is not, what is written greedily is the gold answer's rest, token by token.
    """
    shown = max((index + 1 for index, one in enumerate(right) if not one), default=0)
    return 1 - shown / len(right)
