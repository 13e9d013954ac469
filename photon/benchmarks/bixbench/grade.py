"""Graders: what is right by rules, and what a judge must decide.

A choice is right if its letter is. An open answer is verified as its question says: by its text
(``str_verifier``), by a range that its number must lie in (``range_verifier``), or by a model's judgement
(``llm_verifier``), which is also asked where a rule cannot decide.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from photon.benchmarks.bixbench.questions import VERIFIERS
from photon.errors import printable

#: Asked with question, ideal, answer, and whether the ideal is a range.
Judge = Callable[[str, str, str, bool], "Verdict"]
State = Literal["correct", "incorrect", "refused", "ungraded"]
_NUMBER = re.compile(
    r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?:\s*[eE×x]\s*(?:10\s*\^?\s*)?[-+−]?\d+)?\s*%?"
)
_RANGE = re.compile(r"[(\[]\s*([^,()\[\]\s]{1,40})\s*,\s*([^,()\[\]\s]{1,40})\s*[)\]]")
_REFUSALS = re.compile(
    r"insufficient (?:information|data)|(?:cannot|can't|can not|unable to|not possible to) "
    r"(?:be )?(?:determine|answer|provide|perform|compute|calculate|access)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth.

    Attributes
    ----------
    state
        ``ungraded`` where nobody could decide; it counts as not correct, and is reported.
    by
        Who decided: ``letter``, ``text``, ``part``, ``range``, ``none`` (there was no answer), ``judge``, or
        why nobody did.
    """

    state: State
    by: str

    @property
    def correct(self) -> bool:
        """Whether the answer is right."""
        return self.state == "correct"


def grade_choice(predicted: str | None, target: str, refusal: str | None) -> Verdict:
    """Grade a letter; case and what is no letter or digit do not matter."""
    letter = plain(predicted or "")
    if letter and letter == plain(target):
        return Verdict("correct", "letter")
    if letter and refusal and letter == plain(refusal):
        return Verdict("refused", "letter")
    return Verdict("incorrect", "letter" if letter else "none")


def grade_open(
    question: str,
    ideal: str,
    predicted: str | None,
    verifier: str,
    judge: Judge | None,
    *,
    numeric: bool = True,
    partial: Literal["never", "words", "upstream"] = "words",
) -> Verdict:
    """Grade an open answer.

    Parameters
    ----------
    judge
        Asked where no rule decides; without one, such an answer is ungraded.
    numeric
        Whether a number is compared with a range by arithmetic first.
    partial
        Whether a part of the ideal text is right: never, where it is whole words of three characters or more
        together, or any part, as the authors' code has it (there the empty answer is right, too).
    """
    if verifier not in VERIFIERS:
        return Verdict("ungraded", f"unknown verifier {printable(verifier)[:60]}")
    answer = (predicted or "").strip()
    if not answer and not (partial == "upstream" and verifier == "str_verifier"):
        return Verdict("incorrect", "none")
    if verifier == "str_verifier":
        decided = _by_text(ideal, answer, partial)
    elif verifier == "range_verifier" and numeric:
        decided = _by_range(ideal, answer)
    else:
        decided = None
    if decided is not None:
        return decided
    if judge is None:
        # Only what nobody judges is taken for a refusal by its words.
        return Verdict("refused", "words") if _REFUSALS.search(answer) else Verdict("ungraded", "no judge")
    return judge(question, ideal, answer, verifier == "range_verifier")


def plain(text: str) -> str:
    """Return a text's ASCII letters and digits, small."""
    return re.sub(r"[^a-zA-Z0-9]", "", text).lower()


def _by_text(ideal: str, answer: str, partial: str) -> Verdict | None:
    wanted, given = plain(ideal), plain(answer)
    # Signs and points are lost above; of numbers they matter.
    one, other = number_in(ideal, whole=True), number_in(answer, whole=True)
    if partial != "upstream" and one is not None and other is not None:
        if one.percent != other.percent:
            return None
        return Verdict("correct" if one.value == other.value else "incorrect", "text")
    if wanted and given == wanted:
        return Verdict("correct", "text")
    if partial == "upstream" and given in wanted:
        return Verdict("correct", "part")
    if partial == "words" and len(given) >= 3 and other is None:
        words = f" {' '.join(map(plain, ideal.split()))} "
        if f" {' '.join(map(plain, answer.split()))} " in words:
            return Verdict("correct", "part")
    return None


def _by_range(ideal: str, answer: str) -> Verdict | None:
    bounds = range_of(ideal)
    number = number_in(answer)
    if bounds is None or number is None:
        return None
    # Whether a range is of shares or of percents, it does not say.
    values = (number.value, number.value / 100) if number.percent else (number.value,)
    inside = any(bounds[0] <= value <= bounds[1] for value in values)
    return Verdict("correct" if inside else "incorrect", "range")


def range_of(text: str) -> tuple[float, float] | None:
    """Return the bounds of a text such as ``(1.50,1.54)``, both inside, or None."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return None
    # Python's own reader of literals is not for several threads at a time.
    try:
        lower, upper = float(match[1]), float(match[2])
    except ValueError:
        return None
    return (lower, upper) if math.isfinite(lower) and math.isfinite(upper) and lower <= upper else None


@dataclass(frozen=True)
class Number:
    """A number as it was written: of ``35 %`` the value is 35."""

    value: float
    percent: bool


def number_in(text: str, *, whole: bool = False) -> Number | None:
    """Return the number of a text that has exactly one, or (``whole``) is one.

    Of several different numbers nobody knows which is meant, so that is None.
    """
    text = text.strip()[:2_000]
    # The number of "CD4" or "p53" is part of a name.
    found = [match for match in _NUMBER.finditer(text) if not re.search(r"[A-Za-z_]$", text[: match.start()])]
    values = {value for value in (_number(match[0]) for match in found) if value is not None}
    if len(values) != 1 or (whole and found[0][0].strip() != text):
        return None
    return values.pop()


def _number(written: str) -> Number | None:
    percent = written.rstrip().endswith("%")
    text = written.rstrip().removesuffix("%").replace("−", "-").replace(",", "")
    text = re.sub(r"\s*[×x]\s*10\s*\^?\s*", "e", text)
    try:
        value = float(re.sub(r"\s", "", text))
    except ValueError:
        return None
    return Number(value, percent) if math.isfinite(value) else None
