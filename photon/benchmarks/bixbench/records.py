"""What a run of the benchmark keeps in its folder.

``run.json`` says what was run, ``questions.json`` on what, ``answers.jsonl`` has a line for each answer that
was tried, and ``trajectories/`` an agent's steps and notebook. A line that is torn by a crash counts as none.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from photon.benchmarks.bixbench.choices import Choices, Regime
from photon.benchmarks.bixbench.questions import Question
from photon.benchmarks.bixbench.rollout import Rollout
from photon.benchmarks.bixbench.solvers import Cost
from photon.benchmarks.notebook.document import Notebook
from photon.errors import PhotonError, RunError, printable
from photon.files.atomic import write_text
from photon.files.owner import held

_RUN, _QUESTIONS, _ANSWERS = "run.json", "questions.json", "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """One answer that was tried.

    Attributes
    ----------
    question, replica, regime
        Which one.
    failed
        Why there is none that could be graded, by a name (``endpoint: timeout``, ``capsule``, ``kernel``); a
        second start tries again. None where there is one.
    detail
        What was said of the failure.
    predicted
        The answer or letter; None where the solver gave none.
    target, refusal
        The right answer or letter, and the letter that refuses.
    end
        How an agent's work ended.
    steps, faults
        Actions of an agent, and those of them that were none, by name.
    """

    question: str
    replica: int
    regime: Regime
    failed: str | None = None
    detail: str = ""
    predicted: str | None = None
    target: str = ""
    refusal: str | None = None
    end: str = ""
    steps: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, int, Regime]:
        """Which answer it is."""
        return self.question, self.replica, self.regime


_ANSWER = TypeAdapter(Answer)
_QUESTION_LIST = TypeAdapter(list[Question])


class Folder:
    """The folder of a run.

    Methods may be called from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    @property
    def trajectories(self) -> Path:
        """Where agents' steps and notebooks lie."""
        return self.path / "trajectories"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from working in this folder.

        Raises
        ------
        PhotonError
            If one does, or the folder cannot be made.
        """
        with held(self.path) as is_ours:
            if not is_ours:
                raise PhotonError(
                    f"{printable(self.path)}: another process works here; wait for it, or name another folder"
                )
            yield

    def begin(self, what: dict[str, Any], questions: list[Question]) -> None:
        """Say what is run here; what was said before must be the same.

        Raises
        ------
        PhotonError
            If this folder holds a run of something else.
        """
        file = self.path / _RUN
        if file.exists():
            earlier = self.told()
            differing = sorted(
                key
                for key in {*earlier["identity"], *what["identity"]}
                if earlier["identity"].get(key) != what["identity"].get(key)
            )
            if differing:
                raise PhotonError(
                    f"{printable(self.path)} holds answers made otherwise ({', '.join(differing)} differ); "
                    "name another folder with --output, or set them as they were"
                )
        write_text(self.path / _QUESTIONS, json.dumps([asdict(one) for one in questions], indent=1))
        write_text(file, json.dumps(what, indent=1))

    def told(self) -> dict[str, Any]:
        """Return what is run here.

        Raises
        ------
        PhotonError
            If this is no folder of a run.
        """
        try:
            told = json.loads((self.path / _RUN).read_text())
            if not isinstance(told["identity"], dict) or not isinstance(told["run"], dict):
                raise ValueError("no run")
        except (OSError, ValueError, KeyError, TypeError):
            raise PhotonError(
                f"{printable(self.path)}: no run of this benchmark; `photon bench bixbench run` makes one"
            ) from None
        return dict(told)

    def questions(self) -> list[Question]:
        """Return the questions of the run.

        Raises
        ------
        PhotonError
            If they cannot be read.
        """
        file = self.path / _QUESTIONS
        try:
            return _QUESTION_LIST.validate_json(file.read_bytes())
        except (OSError, ValidationError, ValueError):
            raise PhotonError(
                f"{printable(file)}: cannot be read; start the run again, which writes it"
            ) from None

    def answers(self) -> dict[tuple[str, int, Regime], Answer]:
        """Return the last try of each answer, and of several the one that did not fail."""
        found: dict[tuple[str, int, Regime], Answer] = {}
        file = self.path / _ANSWERS
        if not file.exists():
            return found
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                answer = _ANSWER.validate_json(line)
            except ValidationError:
                continue
            if answer.key not in found or answer.failed is None:
                found[answer.key] = answer
        return found

    def add(self, answer: Answer) -> None:
        """Keep an answer.

        Raises
        ------
        RunError
            If the disk does not take it.
        """
        # Half of a character, which a model may write, could not be read again.
        line = (json.dumps(asdict(answer), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            with self._lock, (self.path / _ANSWERS).open("ab+") as file:
                # After a line that a crash has torn, a new one begins.
                file.seek(0, os.SEEK_END)
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)
        except OSError as error:
            raise RunError(f"{printable(self.path)}: an answer cannot be kept ({error.strerror})") from None

    # --- trajectories ---------------------------------------------------------------------------------------

    def keep(
        self,
        question: Question,
        replica: int,
        rollout: Rollout,
        notebook: Notebook,
        about: dict[str, Any],
        choices: Choices | None,
    ) -> None:
        """Keep an agent's work: the fields that the authors' tools read, its steps, and its notebook."""
        base = self._base(question.id, replica)
        record = {
            "problem_id": question.id,
            "agent_answer": rollout.answer,
            "ideal_answer": question.ideal,
            "problem": question.text,
            "mcq_options": [] if choices is None else list(choices.options),
            "mcq_question": "" if choices is None else "\n".join([question.text, *choices.lines()]),
            "notebook_stats": notebook.statistics(),
            "num_actions": len(rollout.steps),
            "question_format": "open",
            "refusal_option": choices is not None and choices.refusal is not None,
            "model": about["model"],
            "metadata": {
                "question_id": question.id,
                "capsule": question.capsule,
                "categories": list(question.categories),
                "distractors": list(question.distractors),
                "eval_mode": question.verifier,
                "version": question.version,
                "replica": replica,
                "end": rollout.end,
                "faults": dict(rollout.faults),
                "cost": asdict(rollout.cost),
                "seconds": round(rollout.seconds, 3),
            },
            "nb": notebook.as_dict(),
            "run_name": about["name"],
        }
        lines = "".join(json.dumps(step, ensure_ascii=True) + "\n" for step in rollout.steps)
        write_text(base.with_suffix(".jsonl"), lines, flush=False)
        write_text(base.with_suffix(".ipynb"), notebook.text(), flush=False)
        write_text(base.with_suffix(".json"), json.dumps(record, ensure_ascii=True), flush=False)

    def kept(self, question: str, replica: int) -> dict[str, Any] | None:
        """Return what is kept of an agent's work, or None."""
        try:
            record = json.loads(self._base(question, replica).with_suffix(".json").read_text())
            return record if isinstance(record["nb"]["cells"], list) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def steps(self, question: str, replica: int) -> list[dict[str, Any]]:
        """Return an agent's steps."""
        try:
            lines = self._base(question, replica).with_suffix(".jsonl").read_text().splitlines()
            return [step for step in map(json.loads, lines) if isinstance(step, dict)]
        except (OSError, ValueError, RecursionError):
            return []

    def _base(self, question: str, replica: int) -> Path:
        # Names have no dot-suffix of their own here: "bix-1-q1.2_replica_0" would lose its end.
        return self.trajectories / f"{question.replace('.', '-')}_replica_{replica}"
