"""Graders: what rules decide, and what they leave to a judge."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from photon.benchmarks.bixbench.grade import Verdict, grade_choice, grade_open, number_in, range_of

JUDGED = Verdict("correct", "judge")


def judge(question: str, ideal: str, answer: str, is_range: bool) -> Verdict:
    return JUDGED


@pytest.mark.parametrize(
    ("predicted", "state"),
    [("(b)", "correct"), (" B ", "correct"), ("b.", "correct"), ("E", "refused"), ("(e)", "refused"),
     ("A", "incorrect"), ("", "incorrect"), (None, "incorrect"), ("BE", "incorrect")],
)  # fmt: skip
def test_a_choice_is_its_letter(predicted: str | None, state: str) -> None:
    assert grade_choice(predicted, "B", "E").state == state


def test_without_the_option_nobody_refuses() -> None:
    assert grade_choice("E", "B", None).state == "incorrect"
    assert grade_choice("E", "B", "").state == "incorrect"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        *(
            (text, "correct")
            for text in ("1.5", "1.54", "1.52 units", "1.52e0", "OR = 1.52", "152%", "1.52 × 10^0")
        ),
        *((text, "incorrect") for text in ("1.541", "1.499", "-1.52", "15.2%", "15.2", "0", "1.52e1")),
        *((text, "ungraded") for text in ("about one and a half", "1.5 or 1.6", "p53")),
        ("", "incorrect"),
    ],
)
def test_a_range_has_both_its_ends(answer: str, state: str) -> None:
    assert grade_open("?", "(1.50,1.54)", answer, "range_verifier", None).state == state


def test_a_range_of_percents_and_a_range_of_shares() -> None:
    assert grade_open("?", "(35,37)", "36%", "range_verifier", None).correct
    assert grade_open("?", "(0.35,0.37)", "36 %", "range_verifier", None).correct
    assert not grade_open("?", "(35,37)", "3.6%", "range_verifier", None).correct


def test_what_cannot_be_read_goes_to_the_judge() -> None:
    assert grade_open("?", "(1,2)", "one and a half", "range_verifier", judge) == JUDGED
    assert grade_open("?", "1 to 2", "1.5", "range_verifier", judge) == JUDGED
    assert grade_open("?", "(1,2)", "9", "range_verifier", judge) != JUDGED
    assert grade_open("?", "(1,2)", "9", "range_verifier", judge, numeric=False) == JUDGED
    assert grade_open("?", "x", "y", "llm_verifier", judge) == JUDGED
    assert grade_open("?", "x", "y", "llm_verifier", None) == Verdict("ungraded", "no judge")


@pytest.mark.parametrize(
    ("ideal", "answer", "state"),
    [
        ("CD79A", "cd79a", "correct"),
        ("0.0002", "2E-4", "correct"),
        ("0.0002", "0.002", "incorrect"),
        ("1.9E-05", "19E-06", "correct"),
        ("-3", "3", "incorrect"),
        ("35%", "35 %", "correct"),
        ("35%", "0.35", "ungraded"),
        ("increase of DNA repair", "DNA repair", "correct"),
        ("increase of DNA repair", "NA rep", "ungraded"),
        ("increase of DNA repair", "of", "ungraded"),
        ("increase of DNA repair", "0", "ungraded"),
        ("increase of DNA repair", "", "incorrect"),
        ("4.25E-04", "5", "incorrect"),
    ],
)
def test_texts_are_compared_without_what_does_not_matter(ideal: str, answer: str, state: str) -> None:
    assert grade_open("?", ideal, answer, "str_verifier", None).state == state


def test_as_upstream_any_part_is_right() -> None:
    for ideal, answer in (("4.25E-04", "5"), ("15.6%", "15%"), ("increase", "")):
        assert grade_open("?", ideal, answer, "str_verifier", None, partial="upstream").by == "part"
    assert grade_open("?", "DNA repair", "repair", "str_verifier", None, partial="never").state == "ungraded"


def test_a_refusal_is_known_by_its_words_only_where_nobody_judges() -> None:
    words = "I cannot determine this without the data."
    assert grade_open("?", "3", words, "llm_verifier", None) == Verdict("refused", "words")
    assert grade_open("?", "3", words, "llm_verifier", judge) == JUDGED


def test_an_unknown_verifier_grades_nothing() -> None:
    assert grade_open("?", "3", "3", "magic\x1b", judge) == Verdict("ungraded", "unknown verifier magic\\x1b")


@pytest.mark.parametrize(
    "text", ["(2,1)", "(1)", "(1,2,3)", "x", "(1,inf)", "(" * 5_000, "(1,'a')", "1e999,2"]
)
def test_what_is_no_range_is_none(text: str) -> None:
    assert range_of(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234.5", 1234.5), ("−3", -3.0), (".5", 0.5), ("1.9 × 10^-5", 1.9e-5), ("3 and 3", 3.0),
     ("1e999", None), ("CD4", None), ("2 of 3", None)],
)  # fmt: skip
def test_one_number_is_found(text: str, value: float | None) -> None:
    found = number_in(text)
    assert (None if found is None else found.value) == value


def test_ranges_are_read_in_many_threads() -> None:
    """Answers are graded at the same time; what reads a range must not mind."""
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda number: range_of(f"({number % 7 - 9},{number % 7}.5)"), range(5_000)))
    assert found == {(number - 9.0, number + 0.5) for number in range(7)}
    assert range_of("[-1e-3, 2E2]") == (-0.001, 200.0)
