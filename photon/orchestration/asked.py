"""Real agents as a world to train in: graphs are judged by what agents answer along them."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from photon.endpoints.faults import EndpointError
from photon.errors import PhotonError, RunError
from photon.orchestration.answer import Orchestra, Spent
from photon.orchestration.graph import chosen, in_order
from photon.orchestration.pool import at_once
from photon.orchestration.questions import Question
from photon.orchestration.run import GIVE_UP
from photon.orchestration.who import Responses


class AskedWorld:
    """Questions with known answers, and agents; no graph of a question is judged twice.

    Parameters
    ----------
    orchestra
        Who answers.
    questions
        All with their right answers.
    progress
        Is told how many drafts there are while they are asked for, before anything is trained.

    Attributes
    ----------
    failed
        Questions that could not be drafted, and graphs that could not be judged, by the name of the fault.

    Raises
    ------
    PhotonError
        If an answer is not known.
    RunError
        If fewer than two questions could be drafted.
    """

    def __init__(
        self, orchestra: Orchestra, questions: Sequence[Question], progress: Callable[[int], None]
    ) -> None:
        if unknown := [one.id for one in questions if one.right is None]:
            raise PhotonError(
                f"question {unknown[0]}: has no `answer`, and without it no graph can be judged; give "
                "all their answers, or leave them out"
            )
        self.failed: Counter[str] = Counter()
        self._orchestra = orchestra
        self._known: dict[tuple[int, bytes], float] = {}
        self._questions: list[Question] = []
        self._drafts: list[list[str]] = []
        self._embedded: list[Responses] = []
        self._ask_all(questions, progress)

    def _ask_all(self, questions: Sequence[Question], progress: Callable[[int], None]) -> None:
        with at_once("draft") as pool:
            asked = [pool.submit(self._orchestra.drafts, question, Spent()) for question in questions]
            in_a_row = 0
            for question, drafts in zip(questions, asked, strict=True):
                error = drafts.exception()
                if isinstance(error, EndpointError):
                    self.failed[error.fault] += 1
                    in_a_row += 1
                    if in_a_row >= GIVE_UP or len(questions) - self.failed.total() < 2:
                        raise RunError(
                            f"too many questions have no drafts: {error}; see to it and start again"
                        )
                    continue
                in_a_row = 0
                self._questions.append(question)
                self._drafts.append(drafts.result())
                self._embedded.append(self._orchestra.embedded(question, drafts.result()))
                progress(len(self._drafts))
        self._vectors = torch.stack([one.embeddings for one in self._embedded])

    def __len__(self) -> int:
        """Return how many questions were drafted."""
        return len(self._questions)

    def drafts(self, questions: Tensor) -> Tensor:
        """Return the embeddings of drafts; see `World.drafts`."""
        return self._vectors[questions]

    def rewards(self, questions: Tensor, edges: Tensor) -> Tensor:
        """Return 1 where the final answer is right, 0 where it is not; see `World.rewards`."""
        keys = [(int(one), graph.numpy().tobytes()) for one, graph in zip(questions, edges, strict=True)]
        graphs = dict(zip(keys, edges, strict=True))
        new = [key for key in graphs if key not in self._known]
        with at_once("graph") as pool:
            judged = [pool.submit(self._reward, number, graphs[number, code]) for number, code in new]
            for key, one in zip(new, judged, strict=True):
                error = one.exception()
                if isinstance(error, EndpointError):
                    self.failed[error.fault] += 1
                else:
                    self._known[key] = one.result()
        return torch.tensor([self._known.get(key, float("nan")) for key in keys])

    def _reward(self, number: int, edges: Tensor) -> float:
        question, drafts, seen = self._questions[number], self._drafts[number], self._embedded[number]
        texts, psi = drafts, seen.psi
        if edges.any():
            texts = self._orchestra.propagated(question, drafts, in_order(seen.rank), edges, Spent())
            seen = self._orchestra.embedded(question, texts)
            psi = seen.psi if self._orchestra.method.recompute_psi else psi
        best = int(chosen(seen.embeddings, psi, self._orchestra.method.psi_clip))
        return float(question.found(texts[best]) == question.right)
