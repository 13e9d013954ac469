"""What a model says to questions, judged: how much of the right answer it gives, and whether it refuses."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from photon.data.prepared import PreparedData
from photon.data.questions import SETS, EncodedQuestion, unpack_questions
from photon.data.tokenizer import EosTokenizer
from photon.errors import PhotonError
from photon.unlearning.answers import ask
from photon.unlearning.figures import rouge_1_recall
from photon.unlearning.questions import Encoded
from photon.unlearning.refusals import TEMPLATES, refuses

#: Most tokens of an answer, where nothing else is said.
ANSWER_TOKENS = 32


class Judged(NamedTuple):
    """An answer: ROUGE-1 recall of the right one, 0 where there is none, and whether it is a refusal."""

    rouge1: float
    refused: bool


def answers_to(
    model: nn.Module,
    questions: Sequence[EncodedQuestion],
    tokenizer: EosTokenizer,
    most: int,
    templates: Sequence[str] = TEMPLATES,
) -> list[Judged]:
    """Return what a model says to questions, always with the likeliest token.

    Parameters
    ----------
    model
        A causal language model in evaluation mode.
    most
        Most tokens of an answer.
    templates
        What refusals are compared with.
    """
    # A refusal may be longer than the right answer, of which nothing else is asked here.
    asked = [Encoded(one.prompt, []) for one in questions]
    answers = ask(model, tokenizer, asked, most=most)  # type: ignore[arg-type]
    judged = []
    for one, answer in zip(questions, answers, strict=True):
        gold = tokenizer.tokenizer.decode(one.answer, skip_special_tokens=True)
        judged.append(Judged(rouge_1_recall(answer.text, gold), refuses(answer.text, templates)))
    return judged


def forgotten_of(prepared: PreparedData, silo: str) -> list[EncodedQuestion]:
    """Return a silo's questions that are to be forgotten; none if it has no part in the folder.

    Raises
    ------
    PhotonError
        If the folder holds something else than questions.
    """
    if prepared.manifest.kind != "questions":
        raise PhotonError(
            f"{prepared.path}: holds {prepared.manifest.kind}, and what was forgotten is asked of data of "
            "`photon data prepare --kind questions`"
        )
    if silo not in prepared.silo_names:
        return []
    forget = SETS.index("forget") + 1
    return [one for one in unpack_questions(prepared.arrays(silo, "train")) if one.set == forget]
