"""A request that a model forget something, and the questions that judge what comes of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError
from photon.models.pretrained import positions_of
from photon.state.unlearned import LONGEST
from photon.unlearning.problem import Method
from photon.unlearning.questions import Question, Sets, check_answers, encode, encoder_of
from photon.unlearning.refusals import TEMPLATES, Encoder, ngrams
from photon.unlearning.scan import Asked, Exam


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes
    ----------
    sets
        The questions.
    earlier
        Those that were forgotten before, by request.
    asked_by, reason
        Who asks, and why.
    unknown
        Questions that the model is asked to see whether it still refuses; empty: those of the reference set.
    factual
        Questions with answers that have nothing to do with the request.
    method
        How.
    layers, ridges, coefficients
        What to choose among; without layers the middle half of the blocks.
    top
        How many blocks are changed together.
    templates, encoder
        What refusals are compared with, beside the answers of the reference set, and by what.
    limit
        Most questions of each set in the scan.
    attacks
        Try what brings back what was forgotten.
    data
        Prepared data, whose perplexity is measured before and after.
    batch_size, device
        Questions at once, and where.
    """

    sets: Sets
    asked_by: str
    reason: str = ""
    earlier: Sequence[Sequence[Question]] = ()
    unknown: Sequence[Question] = ()
    factual: Sequence[Question] = ()
    method: Method = field(default_factory=Method)
    layers: Sequence[int] | None = None
    ridges: Sequence[float] = (1e-3, 1e-2)
    coefficients: Sequence[float] = (0.5, 1.0, 2.0)
    top: int = 1
    templates: Sequence[str] = TEMPLATES
    encoder: Encoder = ngrams
    limit: int | None = 64
    attacks: bool = False
    data: Path | None = None
    batch_size: int = 32
    device: torch.device | str = "cpu"


def check_told(request: Request) -> None:
    """Check that the ledger can hold who asks, and why.

    Raises
    ------
    PhotonError
        If not.
    """
    for name, text in (("who asks", request.asked_by), ("why", request.reason)):
        if len(text) > LONGEST:
            raise PhotonError(f"unlearning: {name} has {len(text):,} characters; say it in {LONGEST}")
    if not request.asked_by.strip():
        raise PhotonError("unlearning: nobody asks; say who does, as in --by 'A. B.'")


def exam_of(
    export: Path, model: PreTrainedModel, request: Request
) -> tuple[Exam, dict[str, list[list[int]]]]:
    """Return what the model is asked, and the prompts of each set.

    Raises
    ------
    PhotonError
        If a question or its answer cannot be used.
    """
    tokenizer = load_tokenizer(export)
    length = positions_of(model.config) or 1 << 20
    encoder = encoder_of(export, tokenizer, length)
    sets = request.sets
    named = {
        "forget": sets.forget,
        "retain": sets.retain,
        "reference": sets.reference,
        "forgotten": sets.forgotten,
        "unknown": request.unknown or sets.reference,
        "factual": request.factual,
    }
    for name in ("forget", "retain", "forgotten", "factual"):
        check_answers(name, named[name])
    encoded = {name: encode(questions, encoder) for name, questions in named.items()}
    refusals = [one.answer for one in sets.reference if one.answer is not None]
    templates = [*dict.fromkeys([*refusals, *request.templates])]
    longest = max(len(one.gold) for some in encoded.values() for one in some)
    longest = max(longest, *(len(ids) for ids in tokenizer.encode(templates)))
    asked = {
        name: Asked(questions, encoded[name])
        for name, questions in named.items()
        if questions and name != "reference"
    }
    exam = Exam(tokenizer, asked, templates, request.encoder, longest + 4, request.batch_size)
    return exam, {name: [one.prompt for one in some] for name, some in encoded.items()}
