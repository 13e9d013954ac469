"""Whether an answer says that the model does not know, and how well it says so."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from photon.models.sentences import Sentences
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
    encode = Sentences(folder, "--encoder")
    return lambda texts: [dict(enumerate(row)) for row in encode(texts).tolist()]


def refusal_quality(answers: Sequence[str], templates: Sequence[str], encoder: Encoder) -> float:
    """Return the mean over the answers of the largest cosine to a template."""
    wanted = encoder(templates)
    largest = [
        max(sum(value * other.get(part, 0.0) for part, value in one.items()) for other in wanted)
        for one in encoder(answers)
    ]
    return sum(largest) / len(largest)
