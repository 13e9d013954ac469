"""A run of the benchmark: every question, replica and regime once; what is there is not done again."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon import __version__
from photon.benchmarks.bixbench.capsules import capsule_files, unpacked
from photon.benchmarks.bixbench.choices import Regime, choices_of
from photon.benchmarks.bixbench.questions import Question, QuestionSet
from photon.benchmarks.bixbench.records import Answer, Folder
from photon.benchmarks.bixbench.rollout import Rollout, StoppedError, roll_out
from photon.benchmarks.bixbench.settings import RunSettings
from photon.benchmarks.bixbench.solvers import Finished, Solver, Told
from photon.benchmarks.bixbench.source import Source
from photon.benchmarks.notebook.document import shown
from photon.benchmarks.notebook.environment import NotebookEnvironment
from photon.benchmarks.notebook.sandbox import Shut, check_sandbox
from photon.endpoints.faults import EndpointError
from photon.errors import PhotonError, RunError, printable
from photon.files.atomic import remove_leftovers


@dataclass
class Done:
    """What a start of a run did.

    Attributes
    ----------
    there, made
        Answers that were there before, and that were made now.
    failed
        Answers that are missing still, by why.
    examples
        What was said of the first failure of each kind.
    left_out
        Rows of the questions that could not be read: where, and why.
    """

    there: int = 0
    made: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, kind: str, detail: str, number: int = 1) -> None:
        """Count failures."""
        self.failed[kind] += number
        self.examples.setdefault(kind, detail)


class BenchmarkRun:
    """Makes the answers of one solver.

    Parameters
    ----------
    folder
        Where they are kept.
    how
        How kernels are started.
    advance
        Called after each question's replica.
    """

    def __init__(
        self,
        source: Source,
        solver: Solver,
        settings: RunSettings,
        folder: Folder,
        how: Shut,
        *,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self._source, self._solver, self._settings = source, solver, settings
        self._folder, self._how, self._advance = folder, how, advance
        self._done = Done()
        self._lock, self._unpacking = threading.Lock(), threading.Lock()
        self._capsules: dict[str, Path] = {}
        self._stopped = threading.Event()

    def make(self, asked: QuestionSet) -> Done:
        """Make the answers that are missing.

        Raises
        ------
        PhotonError
            If kernels cannot be shut in, or the folder holds answers of something else.
        RunError
            If the folder cannot be written.
        """
        if self._settings.mode == "agent":
            check_sandbox(self._how)
        self._done.left_out = asked.left_out
        with self._folder.claimed():
            self._folder.begin(self._about(asked), asked.questions)
            for below in ("capsules", "trajectories"):
                remove_leftovers(self._folder.path / below)
            there = self._folder.answers()
            jobs = []
            for replica in range(self._settings.replicas):
                for question in asked.questions:
                    missing = []
                    for regime in self._settings.regimes:
                        answer = there.get((question.id, replica, regime))
                        if answer is not None and answer.failed is None:
                            self._done.there += 1
                        elif regime == "open" or choices_of(question, refusal=False) is not None:
                            missing.append(regime)
                    if missing:
                        jobs.append((question, replica, missing))
            self._work(jobs)
        return self._done

    def _about(self, asked: QuestionSet) -> dict[str, Any]:
        identity = {
            "settings": self._settings.identity(),
            "solver": self._solver.identity(),
            "version": asked.version,
        }
        told = {
            "name": self._solver.name,
            "questions": len(asked.questions),
            "left_out": len(asked.left_out),
            "source": self._source.name,
            "sandbox": self._how.isolate,
            "replicas": self._settings.replicas,
            "regimes": list(self._settings.regimes),
            "photon": __version__,
        }
        return {"identity": identity, "run": told}

    def _work(self, jobs: Sequence[tuple[Question, int, list[Regime]]]) -> None:
        with ThreadPoolExecutor(self._settings.parallel) as pool:
            futures = [pool.submit(self._one, *job) for job in jobs]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                # What is at work ends with the next action; nothing of it is kept.
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def _one(self, question: Question, replica: int, regimes: list[Regime]) -> None:
        if self._stopped.is_set():
            return
        finished = None
        try:
            if self._settings.mode == "agent":
                finished = self._worked(question, replica, regimes)
        except StoppedError:
            return
        except (EndpointError, PhotonError, RunError) as error:
            self._fail(question, replica, regimes, error)
        else:
            for regime in regimes:
                if not (regime == "open" and self._settings.mode == "agent"):
                    self._answer(question, replica, regime, finished)
        self._advance()

    def _worked(self, question: Question, replica: int, regimes: list[Regime]) -> Finished:
        """Return an agent's finished work: that which is kept, or else made now."""
        kept = self._folder.kept(question.id, replica)
        if kept is not None and "open" not in regimes:
            notebook = shown(kept["nb"]["cells"], images=self._settings.images)
            return Finished(notebook, kept["agent_answer"])
        if question.archive is None:
            raise PhotonError(f"{question.id}: the question names no archive of its capsule")
        data = self._capsule(question.archive)
        environment = NotebookEnvironment(
            capsule_files(data),
            self._settings.limits.limits(),
            self._how,
            rerun=self._settings.rerun,
            images=self._settings.images,
        )
        with environment:
            worker = self._solver.begin(question, replica)
            rollout = roll_out(worker, environment, self._settings, self._stopped.is_set)
            written = environment.notebook
        choices = choices_of(question, refusal=True, seed=self._settings.shuffle_seed)
        model = str(self._solver.identity().get("model", self._solver.name))
        about = {"model": model, "name": self._solver.name}
        self._folder.keep(question, replica, rollout, written, about, choices)
        self._keep(_of_rollout(question, replica, rollout), counted="open" in regimes)
        return Finished(written.shown(images=self._settings.images), rollout.answer)

    def _capsule(self, archive: str) -> Path:
        """Return the folder of a capsule's data: unpacked once, for a kernel may be looking at it."""
        with self._unpacking:
            if archive not in self._capsules:
                found = self._source.archive(archive)
                self._capsules[archive] = unpacked(found, self._folder.path / "capsules")
            return self._capsules[archive]

    def _answer(self, question: Question, replica: int, regime: Regime, finished: Finished | None) -> None:
        target, refusal, told = question.ideal, None, Told(None)
        try:
            if regime == "open":
                told = self._solver.answer(question, replica)
            else:
                choices = choices_of(
                    question, refusal=regime == "mcq-refusal", seed=self._settings.shuffle_seed
                )
                assert choices is not None, "questions without options have no such regime"
                target, refusal = choices.target, choices.refusal
                told = self._solver.choose(question, choices, finished, replica)
        except (EndpointError, PhotonError, RunError) as error:
            self._fail(question, replica, [regime], error)
            return
        self._keep(
            Answer(
                question.id,
                replica,
                regime,
                predicted=told.answer,
                target=target,
                refusal=refusal,
                end="answered" if told.answer is not None else "no answer in what was said",
                cost=told.cost,
            )
        )

    def _keep(self, answer: Answer, *, counted: bool = True) -> None:
        self._folder.add(answer)
        if counted:
            with self._lock:
                self._done.made += 1

    def _fail(self, question: Question, replica: int, regimes: list[Regime], error: Exception) -> None:
        kind = (
            f"endpoint: {error.fault}"
            if isinstance(error, EndpointError)
            else "kernel"
            if isinstance(error, RunError)
            else "capsule"
        )
        detail = printable(error)[:500]
        for regime in regimes:
            self._folder.add(Answer(question.id, replica, regime, failed=kind, detail=detail))
        with self._lock:
            self._done.fail(kind, detail, len(regimes))


def _of_rollout(question: Question, replica: int, rollout: Rollout) -> Answer:
    return Answer(
        question.id,
        replica,
        "open",
        predicted=rollout.answer,
        target=question.ideal,
        end=rollout.end,
        steps=len(rollout.steps),
        faults=dict(rollout.faults),
        cost=rollout.cost,
        seconds=round(rollout.seconds, 3),
    )
