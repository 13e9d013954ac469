"""What a model answers by itself, and how it takes the right answer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from photon.data.tokenizer import EosTokenizer
from photon.models.pretrained import positions_of, quiet_transformers
from photon.unlearning.figures import (
    deviation_score,
    extraction_strength,
    hit_rate,
    is_exact,
    rank_of,
    reciprocal_rank,
    rouge_1_recall,
    rouge_l,
)
from photon.unlearning.questions import Encoded, Question
from photon.unlearning.refusals import Encoder, refusal_quality, refuses

Figures = dict[str, float]
"""Figures of a set of questions by name; `questions` is how many."""


class Answer(NamedTuple):
    """What a model wrote.

    Attributes
    ----------
    text
        Its answer, without the end.
    ranks
        The rank of each gold token at the step that would have written it; fewer where the answer ended.
    """

    text: str
    ranks: list[int]


class Taken(NamedTuple):
    """How a model takes the right answer when it is shown to it.

    Attributes
    ----------
    nll
        Negative log-likelihood of its tokens, in nats.
    right
        Of each token, whether it is the likeliest after those before it.
    """

    nll: float
    right: list[bool]


class _Ranks(LogitsProcessor):
    """Writes down where the gold tokens rank, step by step, and changes nothing."""

    def __init__(self, golds: Sequence[Sequence[int]]) -> None:
        self._golds = golds
        self.ranks: list[list[int]] = [[] for _ in golds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, gold in enumerate(self._golds):
            if (step := len(self.ranks[row])) < len(gold):
                self.ranks[row].append(rank_of(scores[row], gold[step]))
        return scores


def ask(
    model: PreTrainedModel,
    tokenizer: EosTokenizer,
    asked: Sequence[Encoded],
    *,
    most: int,
    batch_size: int = 32,
) -> list[Answer]:
    """Return what a model answers, always with the likeliest token.

    Parameters
    ----------
    model
        The model, in evaluation mode.
    tokenizer
        Its tokenizer.
    asked
        Questions in tokens.
    most
        Most tokens of an answer; fewer where the model has no positions for more.
    batch_size
        Questions at once.
    """
    answers: dict[int, Answer] = {}
    for places, room in _batches_to_ask(model, asked, most, batch_size):
        found = _answered(model, tokenizer, [asked[place] for place in places], room)
        answers |= zip(places, found, strict=True)
    return [answers[place] for place in range(len(asked))]


def _batches_to_ask(
    model: PreTrainedModel, asked: Sequence[Encoded], most: int, batch_size: int
) -> Iterator[tuple[list[int], int]]:
    """Yield which questions are asked together, and the most tokens of their answers.

    A prompt after which the model has positions for fewer is asked by itself, so that it shortens no other's
    answer.
    """
    # The last token of an answer is not read.
    positions = positions_of(model.config)
    rooms = [most if positions is None else min(most, positions - len(one.prompt) + 1) for one in asked]
    whole = [place for place, room in enumerate(rooms) if room == most]
    for first in range(0, len(whole), batch_size):
        yield whole[first : first + batch_size], most
    for place, room in enumerate(rooms):
        if room < most:
            yield [place], room


def _answered(
    model: PreTrainedModel, tokenizer: EosTokenizer, some: Sequence[Encoded], most: int
) -> Iterator[Answer]:
    end, device = tokenizer.eos_token_id, next(model.parameters()).device
    ends = {end, *_ends(model)}
    config = GenerationConfig(
        max_new_tokens=most, do_sample=False, eos_token_id=sorted(ends), pad_token_id=end, use_cache=True
    )
    length = max(len(one.prompt) for one in some)
    ids = torch.tensor([[end] * (length - len(one.prompt)) + one.prompt for one in some], device=device)
    sizes = torch.tensor([len(one.prompt) for one in some], device=device)
    mask = (torch.arange(length, device=device) >= length - sizes[:, None]).long()
    ranks = _Ranks([one.gold for one in some])
    generating: Any = model
    with torch.no_grad(), quiet_transformers():
        written: Tensor = generating.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([ranks]),
        )
    for tokens, found in zip(written[:, length:].tolist(), ranks.ranks, strict=True):
        stop = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
        text = tokenizer.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
        # The step that wrote the end had logits, those after it had none.
        yield Answer(text.strip(), found[: stop + 1])


def _ends(model: PreTrainedModel) -> set[int]:
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    return set(own) if isinstance(own, list) else set() if own is None else {own}


def show(model: PreTrainedModel, asked: Sequence[Encoded], *, batch_size: int = 32) -> list[Taken]:
    """Return how a model takes the right answers; each question has one."""
    device = next(model.parameters()).device
    found = []
    for first in range(0, len(asked), batch_size):
        some = asked[first : first + batch_size]
        texts = [[*one.prompt, *one.gold] for one in some]
        tokens = torch.zeros((len(some), max(map(len, texts))), dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        with torch.no_grad():
            logits = model(input_ids=tokens.to(device), use_cache=False).logits
        for row, one in enumerate(some):
            places = slice(len(one.prompt) - 1, len(one.prompt) + len(one.gold) - 1)
            likely, gold = logits[row, places].float().log_softmax(-1), torch.tensor(one.gold, device=device)
            nll = -likely.gather(1, gold[:, None]).sum(dtype=torch.float64)
            found.append(Taken(float(nll), (likely.argmax(-1) == gold).tolist()))
    return found


def measured(
    questions: Sequence[Question],
    asked: Sequence[Encoded],
    answers: Sequence[Answer],
    taken: Sequence[Taken],
    templates: Sequence[str],
    encoder: Encoder,
) -> Figures:
    """Return the figures of a set of questions.

    Parameters
    ----------
    questions, asked
        The questions, as text and in tokens.
    answers
        What the model has answered.
    taken
        How it takes the right answers; empty where there are none.
    templates, encoder
        What refusals are compared with, and by what.
    """
    texts = [one.text for one in answers]
    figures: Figures = {
        "questions": len(questions),
        "refused": _mean([refuses(text, templates) for text in texts]),
        "refusal_quality": refusal_quality(texts, templates, encoder),
    }
    if not taken:
        return figures
    golds = [one.answer or "" for one in questions]
    lengths = [len(one.gold) for one in asked]
    ranked = list(zip((one.ranks for one in answers), lengths, strict=True))
    pairs = list(zip(texts, golds, strict=True))
    loss = math.fsum(one.nll for one in taken) / sum(lengths)
    return figures | {
        "rouge1": _mean([rouge_1_recall(*pair) for pair in pairs]),
        "rougeL": _mean([rouge_l(*pair)[0] for pair in pairs]),
        "exact": _mean([is_exact(*pair) for pair in pairs]),
        "mrr": _mean([reciprocal_rank(*one) for one in ranked]),
        "hit_rate": _mean([hit_rate(*one) for one in ranked]),
        "extraction": _mean([extraction_strength(one.right) for one in taken]),
        "perplexity": math.exp(min(loss, 700.0)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def score_of(figures: Mapping[str, Figures]) -> float:
    """Return the Deviation Score of the figures of the sets `forget` and `retain`."""
    return deviation_score(figures["forget"]["rouge1"], figures["retain"]["rouge1"])
