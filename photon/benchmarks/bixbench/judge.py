"""A model as a judge: whether an answer says the same as the right one."""

import re

from photon.benchmarks.bixbench.grade import Verdict
from photon.benchmarks.bixbench.prompts import RANGE_RUBRIC, RUBRIC
from photon.endpoints.agent import Agent
from photon.endpoints.client import Client
from photon.endpoints.faults import EndpointError
from photon.files.hashing import hash_of

_GRADE = re.compile(r"<grade>\s*(correct|incorrect|refused)\s*</grade>", re.IGNORECASE)


def rubric_hash() -> str:
    """Return the hash of what judges are told, by which grades of different rubrics are told apart."""
    return hash_of(f"{RUBRIC}\n{RANGE_RUBRIC}".encode())[:16]


class ModelJudge:
    """Judges by asking a model; a callable that graders take.

    A judge that gives no answer, or none of the three grades, leaves the answer ungraded.
    """

    def __init__(self, agent: Agent, client: Client) -> None:
        self.agent, self._client = agent, client

    def __call__(self, question: str, ideal: str, answer: str, is_range: bool) -> Verdict:
        """Judge an answer."""
        form = RANGE_RUBRIC if is_range else RUBRIC
        text = form.format(question=question, ideal=ideal, answer=answer)
        try:
            reply = self._client.chat(self.agent, [{"role": "user", "content": text}])
        except EndpointError as error:
            return Verdict("ungraded", f"judge: {error.fault}")
        # The last one: a judge may quote an answer that has such tags.
        found = _GRADE.findall(reply.content)
        if not found:
            return Verdict("ungraded", "judge: no grade")
        grade = found[-1].lower()
        if grade == "correct":
            return Verdict("correct", "judge")
        return Verdict("refused" if grade == "refused" else "incorrect", "judge")
