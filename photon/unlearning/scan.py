"""Which layer, ridge and coefficient: each candidate is applied, and the model is asked.

The Deviation Score alone would choose layers after which the model writes broken text: that forgets, too. So
refusals count: of what is to be forgotten they are wanted, of what is retained they are not, and what the
model does not know it must go on refusing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from photon.data.tokenizer import EosTokenizer
from photon.unlearning.answers import Figures, ask, measured, show
from photon.unlearning.capture import edited
from photon.unlearning.problem import Choice, Edit, Problem
from photon.unlearning.questions import Encoded, Question
from photon.unlearning.refusals import Encoder

#: Name of a set of questions to its figures.
Found = Mapping[str, Figures]


@dataclass(frozen=True)
class Asked:
    """Questions that a model is asked.

    Attributes
    ----------
    questions, encoded
        As text and in tokens.
    """

    questions: Sequence[Question]
    encoded: Sequence[Encoded]

    def first(self, limit: int | None) -> "Asked":
        """Return at most ``limit`` of them, evenly spaced."""
        if limit is None or limit >= len(self.questions):
            return self
        chosen = [index * len(self.questions) // limit for index in range(limit)]
        return Asked([self.questions[i] for i in chosen], [self.encoded[i] for i in chosen])


@dataclass(frozen=True)
class Exam:
    """Sets of questions, and how answers to them are judged.

    Attributes
    ----------
    tokenizer
        The model's.
    sets
        Name to questions. ``forget``, ``retain`` and ``unknown`` are there; a set all of whose questions have
        an answer is judged by these, too, but for ``unknown``.
    templates, encoder
        What refusals are compared with, and by what.
    most
        Most tokens of an answer.
    batch_size
        Questions at once.
    """

    tokenizer: EosTokenizer
    sets: Mapping[str, Asked]
    templates: Sequence[str]
    encoder: Encoder
    most: int
    batch_size: int = 32

    def take(self, model: PreTrainedModel, *, limit: int | None = None) -> dict[str, Figures]:
        """Return the figures of each set, or of at most ``limit`` questions of it."""
        return {name: self.figures(model, name, asked.first(limit)) for name, asked in self.sets.items()}

    def figures(self, model: PreTrainedModel, name: str, asked: Asked) -> Figures:
        """Return the figures of some questions."""
        answers = ask(model, self.tokenizer, asked.encoded, most=self.most, batch_size=self.batch_size)
        answered = name != "unknown" and all(one.gold for one in asked.encoded)
        taken = show(model, asked.encoded, batch_size=self.batch_size) if answered else []
        return measured(asked.questions, asked.encoded, answers, taken, self.templates, self.encoder)


class Seen(NamedTuple):
    """A candidate of the scan.

    Attributes
    ----------
    choice
        Which.
    found
        Figures of the changed model.
    distance
        From what is wanted, see `distance`.
    """

    choice: Choice
    found: Found
    distance: float


def distance(before: Found, after: Found) -> float:
    """Return how far a model is from what is wanted: 0 is all that one may wish, more is worse.

    It is the length of (R_f, what R_r has lost, answers to what is to be forgotten that are no refusals,
    refusals of retained questions that were none before, refusals of unknown questions that are none any
    more), where R are ROUGE-1 recalls and all others are shares of the questions.
    """
    forget, retain, unknown = after["forget"], after["retain"], after["unknown"]
    misses = (
        forget["rouge1"],
        max(0.0, before["retain"]["rouge1"] - retain["rouge1"]),
        1 - forget["refused"],
        max(0.0, retain["refused"] - before["retain"]["refused"]),
        max(0.0, before["unknown"]["refused"] - unknown["refused"]),
    )
    return math.hypot(*misses)


def choices(layers: Sequence[int], ridges: Sequence[float], coefficients: Sequence[float]) -> list[Choice]:
    """Return all candidates."""
    return [Choice(layer, ridge, c) for layer in layers for ridge in ridges for c in coefficients]


def middle_half(count: int) -> list[int]:
    """Return the numbers of the blocks to scan by default; the last block is never among them."""
    quarter = count // 4
    return list(range(quarter, max(quarter + 1, min(count - 1, count - quarter))))


def scan(
    problem: Problem,
    exam: Exam,
    before: Found,
    candidates: Sequence[Choice],
    *,
    limit: int | None = None,
    told: Callable[[Seen], None] = lambda _: None,
) -> list[Seen]:
    """Apply each candidate and take it back; return what was seen, the best first.

    Parameters
    ----------
    problem
        The request.
    exam
        What the model is asked.
    before
        Figures of the model without a change, of as many questions.
    candidates
        The candidates.
    limit
        Most questions of each set.
    told
        Called with each.

    Raises
    ------
    PhotonError
        If there is no solution for one.
    """
    seen = []
    for choice in candidates:
        change = problem.edit(choice)
        with applied([change]):
            found = exam.take(problem.model, limit=limit)
        seen.append(Seen(choice, found, distance(before, found)))
        told(seen[-1])
    # Of candidates that are equally good the first one is: the lower layer, the smaller coefficient.
    return sorted(seen, key=lambda one: one.distance)


def best_of_layers(seen: Sequence[Seen], count: int) -> list[Choice]:
    """Return the best choice of each of the ``count`` best layers; ``seen`` has the best first."""
    by_layer: dict[int, Choice] = {}
    for one in seen:
        by_layer.setdefault(one.choice.layer, one.choice)
    return list(by_layer.values())[:count]


def applied(edits: Sequence[Edit]) -> AbstractContextManager[None]:
    """Change a model in this block; afterwards it has its bits again."""
    return edited([(one.site, one.delta) for one in edits])
