"""Questions are put in one way, and answers are found in what models write."""

import json
from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.orchestration.questions import Question, normal, read_questions

CAPITAL = Question(id="1", question="Capital of Peru?", choices=["Quito", "Lima", "La Paz"], answer="Lima")
SUM = Question(id="2", question="How much is 5 + 7?", answer="12")


def test_prompts_say_how_to_answer() -> None:
    assert CAPITAL.prompt().startswith("Capital of Peru?\n\nA. Quito\nB. Lima\nC. La Paz\n\n")
    assert CAPITAL.prompt().endswith("'Answer: ' and the letter of the right choice.")
    assert SUM.prompt().endswith("'Answer: ' and the answer alone.")


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Answer: B", "B"),
        ("Let me see. A is Quito.\nAnswer: (b).", "B"),
        ("answer: A\nNo. Answer: C", "C"),
        ("**Answer:** C. La Paz", "C"),
        ("Answer: Lima", "B"),
        ("B", "B"),
        ("b", "B"),
        ("B) Lima", "B"),
        ("The answer is Lima.", "B"),
        ("It is lima, I think", "B"),
        ("A capital of Peru is hard to name", None),
        ("Lima or Quito", None),
        ("\\boxed{C}", "C"),
        ("Answer: D", None),
        ("The answer is: **C**", "C"),
        ("answer is" + " " * 7900, None),
        ("Answer:" + " " * 7900 + "B", "B"),
        ("Because of limani", None),
        ("", None),
        ("Answer:", None),
        ("Please answer the question: which of them", None),
    ],
)
def test_a_choice_is_found(response: str, found: str | None) -> None:
    assert CAPITAL.found(response) == found


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("5 + 7 is 12.", "12"),
        ("Answer: 12", "12"),
        ("Answer: 12.0", "12"),
        ("#### 1,012", "1012"),
        ("The answer is: $12$", "12"),
        ("First 5, then 7, so -3.50", "-3.5"),
        ("Answer: The Moon!", "the moon"),
        ("I do not know", None),
        ("", None),
        ("9" * 5000, normal("9" * 5000)),
    ],
)
def test_a_free_answer_is_found(response: str, found: str | None) -> None:
    assert SUM.found(response) == found


def test_equal_answers_have_one_form() -> None:
    assert {normal(one) for one in ("12", "12.", "12.00", " $12 ", "+12", "12%", "(12)")} == {"12"}
    assert {normal(one) for one in ("0", "-0", "0.00")} == {"0"}
    assert normal("1e5") == "1e5"
    assert normal("100") == "100"


def test_right_answers_may_be_choices_or_letters() -> None:
    assert CAPITAL.right == "B"
    assert CAPITAL.model_copy(update={"answer": "b"}).right == "B"
    assert SUM.model_copy(update={"answer": "12.0"}).right == "12"
    assert SUM.model_copy(update={"answer": None}).right is None
    # What is compared by vectors is the choice, so that no letter means anything.
    assert CAPITAL.meaning("B") == "Lima"


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    lines = [
        '{"question": "How much is 5 + 7?", "answer": "12", "id": "2"}',
        "",
        json.dumps(CAPITAL.model_dump()),
    ]
    assert read_questions(write(tmp_path / "q.jsonl", *lines)) == [SUM, CAPITAL]
    assert read_questions(write(tmp_path / "r.jsonl", '{"question": "?"}'))[0].id == "1"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: no JSON"),
        ("[]", "line 2: expected an object with `question`"),
        ('{"answer": "x"}', "expected an object with `question`"),
        ('{"question": "?", "anwser": "x"}', "anwser: unknown key; did you mean 'answer'?"),
        ('{"question": "?", "choices": ["a"]}', "choices"),
        ('{"question": "?", "choices": ["a", "a"]}', "two are the same"),
        ('{"question": "?", "choices": ["x", "y"], "answer": "z"}', "none of the choices"),
        ('{"question": "?", "choices": ["x", "y"], "answer": "C"}', "none of the choices"),
        ('{"question": "?", "answer": 12}', "answer=12"),
        ('{"question": "\\ud800"}', "should be a valid string"),
        ('{"question": "again", "id": "first"}', "id first is that of another"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = write(tmp_path / "q.jsonl", '{"question": "?", "id": "first"}', line)
    with pytest.raises(PhotonError) as raised:
        read_questions(file)
    assert why in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_questions(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="has no questions"):
        read_questions(write(tmp_path / "q.jsonl", ""))
    with pytest.raises(PhotonError, match="cannot read the questions"):
        read_questions(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xff")
    with pytest.raises(PhotonError, match="cannot read the questions"):
        read_questions(tmp_path / "bytes")
