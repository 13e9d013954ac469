"""Files of questions, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from photon.unlearning.questions import (
    Question,
    Sets,
    hash_of_questions,
    read_questions,
    split_by_edge,
)

ROWS: list[dict[str, Any]] = [
    {"edge": "A_B", "question": "When was it?", "answer": "06-02-1998."},
    {"question": "Who is it?", "answer": "Nobody.", "more": 1},
    {"question": "What is it?"},
]


def test_json_and_json_lines_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = read_questions(tmp_path / "a.json")
    assert found == read_questions(tmp_path / "a.jsonl")
    assert found == [
        Question("When was it?", "06-02-1998.", "A_B"),
        Question("Who is it?", "Nobody."),
        Question("What is it?"),
    ]
    assert split_by_edge(found, ["A_B"], "a.json") == (found[:1], found[1:])
    with pytest.raises(PhotonError, match=r"a\.json: no question has the edge 'A_C'; there are A_B"):
        split_by_edge(found, ["A_C"], "a.json")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"question": "a"}\n{"answer": "b"}', r"row 2: no field 'question'; it has answer"),
        ("a.jsonl", '{"question": "a"}\nnonsense', r"row 2: not JSON"),
        ("a.jsonl", '{"question": 3}', r"row 1: field 'question' holds a number, no text"),
        ("a.jsonl", '{"question": "a", "answer": " "}', r"row 1: field 'answer': empty text"),
        ("a.jsonl", '["a"]', r"row 1: not an object"),
        ("a.jsonl", "", r"holds no question"),
        ("a.txt", "hello", r"expected \.json or \.jsonl"),
    ],
)
def test_a_bad_row_ends_it(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PhotonError, match=said) as caught:
        read_questions(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="does not exist"):
        read_questions(tmp_path / "none.json")
    with pytest.raises(PhotonError, match="give one file of questions"):
        read_questions(tmp_path)


def test_sets_do_not_overlap() -> None:
    one, other, third = Question("Who is it?", "Nobody."), Question("What?", "This."), Question("Which?")
    Sets([one], [other], [third]).check()
    again = Question("who  is\nIT?", "Somebody.")
    with pytest.raises(PhotonError, match=r"who  is\\nIT\? is in the forget set and in the retain set; take"):
        Sets([one], [other, again], [third]).check()
    with pytest.raises(PhotonError, match="in the retain set and in the reference set"):
        Sets([one], [third], [third]).check()
    with pytest.raises(PhotonError, match="in the retain set and in the forgotten set"):
        Sets([one], [other], [third], [other]).check()
    # To ask for the same thing twice is no contradiction.
    Sets([one], [other], [third], [one]).check()
    for empty in ("forget", "retain", "reference"):
        sets = {"forget": [one], "retain": [other], "reference": [third], empty: []}
        with pytest.raises(PhotonError, match=f"the {empty} set is empty"):
            Sets(**sets).check()


def test_the_hash_is_of_what_is_asked() -> None:
    one, other = Question("Who is it?", "Nobody.", "A"), Question("What?", "This.")
    first = hash_of_questions([one, other])
    assert first == hash_of_questions([other, Question("who is it?", "Nobody.", "B"), one])
    assert first != hash_of_questions([one])
    assert first != hash_of_questions([one, Question("What?", "That.")])
