"""The three regimes: an open answer, and a choice among options with or without a way to refuse."""

import hashlib
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from photon.benchmarks.bixbench.questions import Question

Regime = Literal["open", "mcq-refusal", "mcq"]
#: As the paper's table has them.
REGIMES: tuple[Regime, ...] = ("open", "mcq-refusal", "mcq")
#: What the option says by which a model refuses.
REFUSAL = "Insufficient information to answer the question"
#: Accuracy of who guesses.
CHANCE: dict[Regime, float | None] = {"open": None, "mcq-refusal": 0.2, "mcq": 0.25}
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Choices:
    """Options of a question in the order they are shown.

    Attributes
    ----------
    options
        Texts; their letters are A, B, C, …
    target, refusal
        Letter of the right one, and of the one that refuses (None where there is none).
    """

    options: tuple[str, ...]
    target: str
    refusal: str | None

    @property
    def letters(self) -> str:
        """The letters of the options."""
        return string.ascii_uppercase[: len(self.options)]

    def lines(self) -> list[str]:
        """Return the options as they are shown: ``(A) text``."""
        return [f"({letter}) {text}" for letter, text in zip(self.letters, self.options, strict=True)]


def choices_of(question: Question, *, refusal: bool, seed: int = 0) -> Choices | None:
    """Return a question's options, or None if it has nothing to choose among.

    The order is a function of the question's name and the seed alone, so every run and every model sees the
    same one.
    """
    if not question.distractors or len(question.distractors) > 20:
        return None
    options = [question.ideal, *question.distractors, *([REFUSAL] if refusal else [])]
    key = hashlib.sha256(f"{seed} {refusal} {question.id}".encode()).digest()
    order = list(range(len(options)))
    random.Random(key).shuffle(order)
    letter = dict(zip(order, string.ascii_uppercase, strict=False))
    return Choices(
        tuple(options[place] for place in order), letter[0], letter[len(options) - 1] if refusal else None
    )


def answer_in(text: str) -> str | None:
    """Return what stands between the last pair of ``answer`` tags, or None without one."""
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


def letter_in(text: str, letters: Sequence[str]) -> str | None:
    """Return the letter that a model chose, or None if it chose none of ``letters``."""
    answer = answer_in(text)
    if answer is None:
        return None
    match = re.match(r"\W*([A-Za-z])(?:\W|$)", answer)
    letter = match[1].upper() if match else ""
    return letter if letter and letter in letters else None
