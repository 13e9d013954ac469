"""A run over the questions of a file, in a folder of its own: it can be stopped at any time, and goes on."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from photon.endpoints.agent import Agent
from photon.endpoints.faults import EndpointError
from photon.errors import PhotonError, RunError, printable
from photon.files.atomic import write_text
from photon.files.hashing import hash_of
from photon.files.owner import held
from photon.orchestration.answer import Answered, Orchestra
from photon.orchestration.figures import Line
from photon.orchestration.pool import AT_ONCE, at_once
from photon.orchestration.questions import Question
from photon.orchestration.who import Who

ANSWERS, SETTINGS, SUMMARY = "answers.jsonl", "settings.json", "summary.json"
#: Questions that fail one after the other before a run gives up.
GIVE_UP = 8


def settings_of(questions: Sequence[Question], agents: Sequence[Agent], who: Who) -> dict[str, Any]:
    """Return what the answers of a run depend on."""
    text = json.dumps([one.model_dump() for one in questions], sort_keys=True)
    return {
        "questions": hash_of(text.encode("utf-8", "surrogatepass")),
        "agents": [agent.identity() for agent in agents],
        "policy": who.name,
        "policy_file": who.fingerprint,
        "method": who.method.model_dump(mode="json"),
    }


@contextmanager
def folder_of(path: Path, settings: Mapping[str, Any]) -> Iterator[list[Line]]:
    """Own the folder of a run; yield what it has answered before.

    Raises
    ------
    PhotonError
        If another process is at it, it cannot be written, or it is of a run with other settings.
    """
    with held(path) as is_ours:
        if not is_ours:
            raise PhotonError(
                f"{printable(path)}: another process is at work there; wait, or choose another --output"
            )
        _check_settings(path, settings)
        yield read_answers(path)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    file, shown = path / SETTINGS, printable(path)
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if not file.exists():
        if (path / ANSWERS).exists():
            raise PhotonError(f"{shown}: has answers and no {SETTINGS}; choose another --output")
        write_text(file, text)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        differ = [key for key in settings if before.get(key) != json.loads(text)[key]]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise PhotonError(f"{shown}/{SETTINGS}: cannot be read ({error}); choose another --output") from None
    if differ:
        raise PhotonError(
            f"{shown}: was begun with other settings ({', '.join(differ)}); choose another --output, or the "
            "same settings"
        )


def read_answers(path: Path) -> list[Line]:
    """Return the lines that are there; what a kill has left of a last line is cut off."""
    file = path / ANSWERS
    try:
        data = file.read_bytes() if file.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(file, whole)
        lines = data[:whole].decode().split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError(f"{printable(file)}: cannot be read ({error}); choose another --output") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Line.model_validate_json(line))
        except ValidationError as error:
            why = error.errors(include_url=False)[0]["msg"]
            raise PhotonError(
                f"{printable(file)}, line {number}: no answer of this version ({why}); delete the line, and "
                "its question is asked again"
            ) from None
    return found


def answer_all(
    questions: Sequence[Question],
    orchestra: Orchestra,
    who: Who,
    path: Path,
    progress: Callable[[int, int], None],
) -> Counter[str]:
    """Answer questions and append a line for each; return the failures by the name of their fault.

    Parameters
    ----------
    questions
        Those that have no line yet.
    progress
        Is told how many have been answered and how many have failed, after each.

    Raises
    ------
    RunError
        If none of the last questions could be answered.
    """
    failed: Counter[str] = Counter()
    in_a_row, done = 0, 0
    left = iter(questions)
    running: set[Future[Answered]] = set()
    with at_once("question") as pool, (path / ANSWERS).open("a", encoding="utf-8") as file:
        while True:
            for question in islice(left, AT_ONCE - len(running)):
                running.add(pool.submit(orchestra.answer, question, who))
            if not running:
                return failed
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for one in ended:
                error = one.exception()
                if isinstance(error, EndpointError):
                    failed[error.fault] += 1
                    in_a_row += 1
                    if in_a_row >= GIVE_UP:
                        raise RunError(
                            f"the last {in_a_row} questions have no answer: {error}; see to it and start "
                            "again: what was answered is kept"
                        )
                else:
                    file.write(line_of(one.result(), orchestra, who).model_dump_json() + "\n")
                    file.flush()
                    done, in_a_row = done + 1, 0
                progress(done, failed.total())


def line_of(answered: Answered, orchestra: Orchestra, who: Who) -> Line:
    """Return what is written of a question."""
    question, right = answered.question, answered.question.right
    answer = question.found(answered.responses[answered.chosen])
    parallel = question.found(answered.drafts[answered.parallel])
    refined = any(one.refined for one in answered.propagations)
    return Line(
        id=question.id,
        answer=answer,
        right=None if right is None else answer == right,
        response=answered.responses[answered.chosen],
        agent=orchestra.agents[0 if who.is_vote else answered.chosen].name,
        parallel=parallel,
        parallel_right=None if right is None else parallel == right,
        propagations=[asdict(one) for one in answered.propagations],
        drafts=answered.drafts,
        responses=answered.responses if refined else [],
        **asdict(answered.spent),
    )


def write_summary(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a run."""
    write_text(path / SUMMARY, json.dumps(figures, indent=1) + "\n")
