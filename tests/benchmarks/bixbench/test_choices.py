"""Options in an order that the question decides, and letters in what models say."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from photon.benchmarks.bixbench.choices import REFUSAL, answer_in, choices_of, letter_in
from photon.benchmarks.bixbench.questions import Question

QUESTION = Question("q", "c", "?", "right", ("x", "y", "z"), "str_verifier", None, (), "1.5")


@pytest.mark.parametrize("refusal", [True, False])
def test_letters_lead_to_their_texts(refusal: bool) -> None:
    for number in range(50):
        made = choices_of(replace(QUESTION, id=f"q{number}"), refusal=refusal)
        assert made is not None
        texts = dict(zip(made.letters, made.options, strict=True))
        assert texts[made.target] == "right"
        assert sorted(made.options) == sorted(["right", "x", "y", "z", *([REFUSAL] if refusal else [])])
        assert (made.refusal is None) is not refusal
        if made.refusal is not None:
            assert texts[made.refusal] == REFUSAL
        assert made.lines()[0] == f"(A) {made.options[0]}"


def test_the_order_is_the_same_each_time_and_another_for_another_seed() -> None:
    first = [choices_of(replace(QUESTION, id=f"q{n}"), refusal=True) for n in range(20)]
    assert first == [choices_of(replace(QUESTION, id=f"q{n}"), refusal=True) for n in range(20)]
    assert first != [choices_of(replace(QUESTION, id=f"q{n}"), refusal=True, seed=1) for n in range(20)]


@pytest.mark.parametrize(("refusal", "options"), [(True, 5), (False, 4)])
def test_every_place_is_as_likely(refusal: bool, options: int) -> None:
    number = 10_000
    made = (choices_of(replace(QUESTION, id=f"q{n}"), refusal=refusal) for n in range(number))
    counts = Counter(one.target for one in made if one)
    share = 1 / options
    bound = 3 * math.sqrt(number * share * (1 - share))
    assert all(abs(counts[letter] - number * share) < bound for letter in "ABCDE"[:options])


def test_a_question_without_wrong_answers_has_no_options() -> None:
    assert choices_of(replace(QUESTION, distractors=()), refusal=True) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<ANSWER> b. </ANSWER>", "B"),
        ("<answer>(C) three</answer>", "C"),
        ("not <answer>A</answer> but <answer>D</answer>", "D"),
        ("<answer>E</answer>", None),
        ("<answer>Because</answer>", None),
        ("B", None),
        ("<answer></answer>", None),
        ("<answer>B", None),
    ],
)
def test_a_letter_is_found_between_tags(text: str, letter: str | None) -> None:
    assert letter_in(text, "ABCD") == letter


def test_an_answer_may_have_lines() -> None:
    assert answer_in("x <answer>\n3\n4 </answer>") == "3\n4"
    assert answer_in("x") is None
