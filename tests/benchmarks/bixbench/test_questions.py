"""Both forms of questions give one kind of record; what cannot be read is left out and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from photon.benchmarks.bixbench.questions import Question, read_questions
from photon.errors import PhotonError

ROW: dict[str, Any] = {
    "id": "u",
    "version": "1.5",
    "question_id": "Bix-33-q6",
    "short_id": "bix-33",
    "capsule_uuid": "AB",
    "question": " How many? ",
    "ideal": 3,
    "distractors": ["1", "2", "4"],
    "eval_mode": "str_verifier",
    "categories": "Genomics, RNA-seq",
    "data_folder": "CapsuleFolder-ab.zip",
    "canary": "never to be trained on",
}
ENTRIES = [
    {
        "id": "q1",
        "question": "A?",
        "ideal answer": "a",
        "distractor_1": "b",
        "distractor_2": "c",
        "distractor_3": "d",
    },
    {"id": "bix-9-q2", "question": "B?", "ideal answer": "it's", "distractor_1": "b", "distractor_2": "c"},
]
CAPSULE: dict[str, Any] = {
    "uuid": "CD",
    "short_id": "bix-9",
    "data_folder": "CapsuleFolder-cd.zip",
    "hypothesis": "h",
    "result": "r",
    "answer": True,
    "questions": repr(ENTRIES),
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def test_a_row_is_a_question(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "q", ROW))
    assert found.questions == [
        Question(
            id="bix-33-q6",
            capsule="ab",
            text="How many?",
            ideal="3",
            distractors=("1", "2", "4"),
            verifier="str_verifier",
            archive="CapsuleFolder-ab.zip",
            categories=("Genomics", "RNA-seq"),
            version="1.5",
        )
    ]
    assert found.left_out == []


def test_a_capsule_is_as_many_questions_as_its_list_has(tmp_path: Path) -> None:
    found = read_questions(
        write(tmp_path / "q", CAPSULE, {**CAPSULE, "short_id": "bix-10", "questions": ENTRIES[:1]})
    )
    assert [(one.id, one.capsule, one.ideal, one.distractors) for one in found.questions] == [
        ("bix-9-q1", "cd", "a", ("b", "c", "d")),
        ("bix-9-q2", "cd", "it's", ("b", "c")),
        ("bix-10-q1", "cd", "a", ("b", "c", "d")),
    ]
    assert {(one.verifier, one.version) for one in found.questions} == {("llm_verifier", "1.0")}


@pytest.mark.parametrize("value", ["Genomics,RNA-seq", "['Genomics', 'RNA-seq']", ["Genomics", "RNA-seq"]])
def test_categories_have_three_forms(tmp_path: Path, value: Any) -> None:
    (question,) = read_questions(write(tmp_path / "q", {**ROW, "categories": value})).questions
    assert question.categories == ("Genomics", "RNA-seq")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("nonsense", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "no JSON object"),
        ({**ROW, "question": ""}, "question: missing, or no text"),
        ({**ROW, "ideal": None}, "ideal: missing, or no text"),
        ({**ROW, "ideal": True}, "ideal: missing, or no text"),
        ({**ROW, "question": "x" * 30_000}, "question: more than 20000"),
        ({**ROW, "question_id": "../up"}, "is no name"),
        ({**ROW, "data_folder": "../up.zip"}, "no name of a file"),
        ({**ROW, "distractors": "__import__('os')"}, "no Python literal"),
        ({**CAPSULE, "questions": "[1"}, "no Python literal"),
        ({**CAPSULE, "questions": "{}"}, "questions: no list"),
        ({**CAPSULE, "questions": "[1]"}, "no mapping"),
        ({**ROW, "question_id": "GOOD-q1"}, "good-q1 is the name of an earlier question"),
    ],
)
def test_a_row_that_cannot_be_read_is_left_out(tmp_path: Path, row: Any, why: str) -> None:
    found = read_questions(write(tmp_path / "q", {**ROW, "question_id": "good-q1"}, row))
    assert [one.id for one in found.questions] == ["good-q1"]
    ((where, told),) = found.left_out
    assert where.startswith("line 2")
    assert why in told


def test_an_unknown_verifier_is_kept_for_the_grader(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "q", {**ROW, "eval_mode": "magic"})).questions
    assert question.verifier == "magic"


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no question in it; line 1: Expecting value"):
        read_questions(write(tmp_path / "q", "x"))
    with pytest.raises(PhotonError, match="cannot read the questions"):
        read_questions(tmp_path / "missing")
