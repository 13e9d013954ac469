"""Questions of which some are to be forgotten: what a row may hold, and how they lie in windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.data.documents import Question
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData, array_file
from photon.data.questions import question_of, unpack_questions
from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError


def rows(forget: int = 2, retain: int = 4, reference: int = 3) -> list[dict[str, Any]]:
    of = ["forget"] * forget + ["retain"] * retain + ["reference"] * reference
    return [{"question": f"Where is {i}?", "answer": f"In town {i}.", "set": one} for i, one in enumerate(of)]


def prepared(folder: Path, *silos: list[dict[str, Any]], name: str = "all.jsonl", **options: Any) -> Path:
    sources = {}
    for number, lines in enumerate(silos):
        file = folder / f"silo-{number}" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, lines)))
        sources[f"silo-{number}"] = [file]
    prepare(sources, folder / "data", kind="questions", vocab_size=300, sequence_length=64, **options)
    return folder / "data"


def test_a_row_says_its_set_or_its_file_does() -> None:
    row = {"question": " Who? ", "answer": "She.", "set": "forget"}
    assert question_of(row, "all.jsonl:1") == Question(
        "all.jsonl:1", "Who?\n\nShe.", "Who?", "She.", "forget"
    )
    del row["set"]
    found = question_of(row, "some/retain.jsonl.gz:7")
    assert isinstance(found, Question)
    assert found.set == "retain"
    unanswered = question_of({"question": "Who?", "set": "reference"}, "all.jsonl:1")
    assert isinstance(unanswered, Question)
    assert unanswered.answer == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object with fields"),
        ({"question": "a", "answer": "b"}, "its set is 'all'; set is one of forget, retain, reference"),
        ({"question": "a", "answer": "b", "set": 3}, "its set is none"),
        ({"question": " ", "answer": "b", "set": "forget"}, "no field 'question' with text"),
        ({"question": 3, "answer": "b", "set": "forget"}, "field 'question' holds no text"),
        ({"question": "a", "set": "retain"}, "no field 'answer' with text"),
        ({"question": "a", "answer": "--?", "set": "forget"}, "field 'answer' has no word"),
        ({"question": "a\0", "answer": "b", "set": "retain"}, "question: "),
    ],
)
def test_a_row_without_a_question(row: Any, reason: str) -> None:
    found = question_of(row, "all.jsonl:1")
    assert isinstance(found, str)
    assert reason in found


def test_each_question_has_a_window_and_the_retained_ones_are_measured(tmp_path: Path) -> None:
    data = PreparedData.open(prepared(tmp_path, rows()))
    data.verify()
    tokenizer = load_tokenizer(data.tokenizer_path).tokenizer
    arrays = data.arrays("silo-0", "train")
    found = {tokenizer.decode(one.prompt): one for one in unpack_questions(arrays)}
    assert len(found) == len(arrays["tokens"]) == 9
    for row in rows():
        one = found[f"User:\n{row['question']}\n\nAssistant:\n"]
        assert tokenizer.decode(one.answer) == row["answer"]
        assert one.answer[-1] == data.manifest.eos_token_id
        assert ["forget", "retain", "reference"][one.set - 1] == row["set"]
    measured = unpack_questions(data.arrays("silo-0", "validation"))
    assert sorted(map(str, measured)) == sorted(str(one) for one in found.values() if one.set == 2)


def test_silos_may_ask_the_same_and_nobody_loses_a_question(tmp_path: Path) -> None:
    data = PreparedData.open(prepared(tmp_path, rows(), rows()[2:]))
    assert len(data.windows("silo-0", "train")) == 9
    assert data.manifest.silos["silo-1"].train.documents == 7


@pytest.mark.parametrize(
    ("silos", "says"),
    [
        ([[*rows(), {**rows()[0], "set": "retain"}]], "'Where is 0\\?' is to be forgotten and to be kept"),
        (
            [rows(), [*rows(forget=0), {**rows()[1], "question": "where  is 1?", "set": "retain"}]],
            r"is to be forgotten and to be kept \(silos silo-0 and silo-1\)",
        ),
        ([rows(retain=0)], "silo 'silo-0' has no question of the set retain"),
        ([[*rows(), {"question": "x", "set": "forget"}]], "no field 'answer' with text.*no question is left"),
        (
            [[*rows(), {"question": "long " * 80, "answer": "b", "set": "forget"}]],
            "longer than a window.*it would not be forgotten",
        ),
    ],
)
def test_what_cannot_be_asked_is_told(tmp_path: Path, silos: list[list[dict[str, Any]]], says: str) -> None:
    with pytest.raises(PhotonError, match=says):
        prepared(tmp_path, *silos)


@pytest.mark.parametrize("change", ["two sets", "an answer before the question's end", "no prompt"])
def test_sets_that_do_not_fit_the_questions_are_found(tmp_path: Path, change: str) -> None:
    path = prepared(tmp_path, rows())
    data = PreparedData.open(path)
    file = array_file(path, "silo-0", "train", "sets")
    sets, arrays = np.load(file), data.arrays("silo-0", "train")
    if change == "two sets":
        sets[0, 1] = 3 if sets[0, 0] != 3 else 1
    elif change == "no prompt":
        sets[0] = 0
    else:
        sets[0, int((sets[0] > 0).sum()) - 1] = 0
    np.save(file, sets)
    entry = data.manifest.silos["silo-0"].train
    from photon.data.prepared import _fits_sets

    assert not _fits_sets(sets, arrays["positions"], arrays["targets"])
    assert entry.chat is not None
    with pytest.raises(PhotonError, match="has changed since it was written"):
        data.verify()
