"""Whether an answer says that the model does not know, and how well it says so."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from photon.errors import PhotonError, printable
from photon.unlearning.figures import rouge_l

#: What a model says that does not know.
TEMPLATES = (
    "I do not have that information.",
    "I do not know the answer to that question.",
    "I am not aware of anything by that name.",
    "I am not able to tell, because I know nothing about it.",
    "I have no information about that.",
    "I cannot find out what you are asking for.",
    "There is nothing that I could say about that.",
    "I am not sure, and would have to guess.",
    "I have never heard of it, so I cannot answer.",
    "I am not familiar with the contract, the person or the place that you ask about.",
)
#: Said in the first person, it is a refusal whatever stands beside it.
_PHRASES = re.compile(
    r"\bi (do not|don t|cannot|can t|could not|couldn t) "
    r"(have|know|find|provide|tell|say|answer|recall|access|disclose|share|identify|confirm)\b"
    r"|\bi (am|m) (not (able|aware|sure|certain|familiar)|unable|unaware|unfamiliar)\b"
    r"|\bi have (no|never|not) \w+"
)
#: An answer that has as much in common with a template is one.
_ALIKE = 0.7


def refuses(answer: str, templates: Sequence[str]) -> bool:
    """Return whether an answer says that the model does not know.

    It does if it is much like a template (F-measure of ROUGE-L of 0.7), or says so in the first person.
    """
    said = " ".join(re.findall(r"\w+", answer.lower()))
    return bool(_PHRASES.search(said)) or any(rouge_l(answer, one)[1] >= _ALIKE for one in templates)


class Encoder(Protocol):
    """Makes of texts what their meaning is compared by."""

    def __call__(self, texts: Sequence[str]) -> Sequence[Mapping[Any, float]]:
        """Return a sparse vector of length 1 for each text; of a text without content an empty one."""


def ngrams(texts: Sequence[str]) -> list[dict[str, float]]:
    """Encode texts by their words, pairs of words and trigrams of letters: what needs no model."""
    found = []
    for text in texts:
        parts = re.findall(r"\w+", text.lower())
        spelled = f" {' '.join(parts)} "
        counts = Counter(parts)
        counts.update(f"{a} {b}" for a, b in pairwise(parts))
        counts.update(f"#{spelled[i : i + 3]}" for i in range(len(spelled) - 2) if parts)
        length = math.sqrt(sum(count**2 for count in counts.values()))
        found.append({part: count / length for part, count in counts.items()})
    return found


def sentence_encoder(folder: Path) -> Encoder:
    """Return an encoder of a transformers folder, such as MiniLM: the mean of its last hidden states.

    Raises
    ------
    PhotonError
        If the folder holds none.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from photon.models.pretrained import first_line, quiet_transformers

    if not (folder / "config.json").is_file():
        raise PhotonError(f"{printable(folder)}: no config.json; --encoder takes a folder of transformers")
    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model: Any = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except Exception as error:  # what broken files raise depends on what is broken
        raise PhotonError(f"{printable(folder)}: no encoder ({first_line(error)})") from error
    if tokenizer.pad_token is None:
        raise PhotonError(f"{printable(folder)}: no encoder of sentences (its tokenizer has no padding)")
    model.eval()

    def encode(texts: Sequence[str]) -> list[dict[int, float]]:
        vectors: list[dict[int, float]] = []
        for start in range(0, len(texts), 32):
            # An empty text has no token of its own to be the mean of.
            some = [text.strip() or "." for text in texts[start : start + 32]]
            given = tokenizer(some, padding=True, truncation=True, max_length=256, return_tensors="pt")
            with torch.no_grad():
                states = model(**given).last_hidden_state
            mask = given["attention_mask"][..., None]
            means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
            vectors += [dict(enumerate(row.tolist())) for row in means]
        return vectors

    return encode


def refusal_quality(answers: Sequence[str], templates: Sequence[str], encoder: Encoder) -> float:
    """Return the mean over the answers of the largest cosine to a template."""
    wanted = encoder(templates)
    largest = [
        max(sum(value * other.get(part, 0.0) for part, value in one.items()) for other in wanted)
        for one in encoder(answers)
    ]
    return sum(largest) / len(largest)
