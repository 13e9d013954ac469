"""Who answers: what a solver can be asked, and the simple ones by which the benchmark itself is checked."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from photon.benchmarks.bixbench.choices import REFUSAL, Choices
from photon.benchmarks.bixbench.grade import number_in, plain, range_of
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.notebook.document import Shown
from photon.benchmarks.notebook.environment import Observation


@dataclass
class Cost:
    """What answers cost: requests, and tokens as reported."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0

    def add(self, other: "Cost") -> None:
        """Add another one's."""
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.unreported += other.unreported


@dataclass(frozen=True)
class Action:
    """What an agent does.

    Attributes
    ----------
    tool, arguments
        The tool it calls, or None where it did nothing that is one; arguments that were no JSON are None.
    said
        What it wrote beside.
    fault
        What was wrong with it, by a short name, or None.
    """

    tool: str | None
    arguments: Any = None
    said: str = ""
    cost: Cost = field(default_factory=Cost)
    fault: str | None = None


@dataclass(frozen=True)
class Finished:
    """What an agent leaves: its notebook, and the answer it gave, if it did."""

    notebook: Shown
    answer: str | None


@dataclass(frozen=True)
class Told:
    """An answer without tools: a text or a letter, or None where there was none in what was said."""

    answer: str | None
    said: str = ""
    cost: Cost = field(default_factory=Cost)


class Worker(Protocol):
    """An agent at work on one question."""

    def act(self) -> Action:
        """Return the next action."""

    def see(self, observation: Observation) -> None:
        """Take note of what came of it."""


class Solver(Protocol):
    """Who answers.

    What it raises other than `photon.endpoints.faults.EndpointError` is a defect.
    """

    @property
    def name(self) -> str:
        """A name for tables."""

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on."""

    def begin(self, question: Question, replica: int) -> Worker:
        """Begin to work on a question with a notebook."""

    def answer(self, question: Question, replica: int) -> Told:
        """Answer an open question without data."""

    def choose(self, question: Question, choices: Choices, finished: Finished | None, replica: int) -> Told:
        """Choose an option, after work with a notebook or without."""


class _Script:
    """Works through given actions; then it submits what the last cell printed."""

    def __init__(self, code: Sequence[str]) -> None:
        self._left = list(code)
        self._seen = ""

    def act(self) -> Action:
        if self._left:
            return Action("edit_cell", {"contents": self._left.pop(0)})
        last = self._seen.rpartition("### Output ")[2]
        lines = last.split("```")[1].strip().splitlines() if "```" in last else []
        return Action("submit_answer", {"answer": lines[-1] if lines else ""})

    def see(self, observation: Observation) -> None:
        self._seen = observation.text


class ScriptedSolver:
    """Runs code that was written for each question, and submits the last line that it printed.

    What it answers is what the code made of the data, so it is right only where data, kernel and tools are.

    Parameters
    ----------
    code
        Question to the cells that are run one after the other.
    """

    name = "reference"

    def __init__(self, code: Mapping[str, Sequence[str]]) -> None:
        self._code = code

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on: the code."""
        text = repr(sorted((name, list(cells)) for name, cells in self._code.items()))
        return {"solver": self.name, "code": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def begin(self, question: Question, replica: int) -> Worker:
        """Begin with the question's code."""
        return _Script(self._code.get(question.id, ()))

    def answer(self, question: Question, replica: int) -> Told:
        """Answer nothing: without data there is nothing to compute."""
        return Told(REFUSAL)

    def choose(self, question: Question, choices: Choices, finished: Finished | None, replica: int) -> Told:
        """Choose the option that is nearest to the computed answer."""
        if finished is None or finished.answer is None:
            return Told(choices.refusal)
        return Told(nearest_option(finished.answer, choices))


def nearest_option(answer: str, choices: Choices) -> str | None:
    """Return the letter of the option that is the answer, has it in its range, or has the nearest number."""
    pairs = list(zip(choices.letters, choices.options, strict=True))
    for letter, text in pairs:
        if plain(text) == plain(answer):
            return letter
    mine = number_in(answer)
    for letter, text in pairs:
        bounds = range_of(text)
        if mine and bounds and bounds[0] <= mine.value <= bounds[1]:
            return letter
    numbers = [(letter, number_in(text)) for letter, text in pairs]
    near = [(abs(one.value - mine.value), letter) for letter, one in numbers if one and mine]
    return min(near)[1] if near else choices.refusal


class _Submits:
    """Submits at once."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def act(self) -> Action:
        return Action("submit_answer", {"answer": self._answer})

    def see(self, observation: Observation) -> None:
        pass


class RandomSolver:
    """Guesses: each option alike, and a number where a question is open."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on."""
        return {"solver": self.name, "seed": self._seed}

    def _draw(self, question: Question, replica: int, what: str) -> random.Random:
        return random.Random(hashlib.sha256(f"{self._seed} {question.id} {replica} {what}".encode()).digest())

    def begin(self, question: Question, replica: int) -> Worker:
        """Submit a number out of the air."""
        return _Submits(self.answer(question, replica).answer or "")

    def answer(self, question: Question, replica: int) -> Told:
        """Answer a number out of the air: it has not seen the options."""
        return Told(f"{self._draw(question, replica, 'open').uniform(0, 100):.4g}")

    def choose(self, question: Question, choices: Choices, finished: Finished | None, replica: int) -> Told:
        """Choose an option."""
        return Told(self._draw(question, replica, f"choice {choices.refusal}").choice(choices.letters))


class RefusingSolver(RandomSolver):
    """Refuses wherever it can; where it must choose, it guesses."""

    name = "refusing"

    def answer(self, question: Question, replica: int) -> Told:
        """Refuse."""
        return Told(REFUSAL)

    def choose(self, question: Question, choices: Choices, finished: Finished | None, replica: int) -> Told:
        """Refuse, or guess where that is no option."""
        if choices.refusal is not None:
            return Told(choices.refusal)
        return super().choose(question, choices, finished, replica)
