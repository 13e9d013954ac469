"""Pairs of answers: what a row may hold, and how pairs lie in windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.data.documents import Message, Pair
from photon.data.pairs import pair_of
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData
from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError

USER, GOOD, BAD = (
    {"role": role, "content": content}
    for role, content in (("user", "hi"), ("assistant", "hello"), ("assistant", "go away"))
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "hello", "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_the_same_pair_in_several_forms(row: dict[str, Any]) -> None:
    found = pair_of(row, "here")
    assert isinstance(found, Pair)
    assert found.prompt == (Message("user", "hi"),)
    assert (found.chosen, found.rejected) == (
        (Message("assistant", "hello"),),
        (Message("assistant", "go away"),),
    )
    assert found.source == "here"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object with fields"),
        ({"prompt": "hi", "chosen": "a"}, "no field 'rejected'"),
        ({"prompt": "hi", "rejected": "a"}, "no field 'chosen'"),
        ({"prompt": "hi", "chosen": "a", "rejected": None}, "no field 'rejected'"),
        ({"prompt": "hi", "chosen": "a", "rejected": " "}, "rejected: empty text"),
        ({"prompt": "hi", "chosen": "a", "rejected": 3}, "field 'rejected' holds a number, neither text nor"),
        ({"prompt": "hi", "chosen": "a", "rejected": []}, "field 'rejected' holds no message"),
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are equal"),
        ({"chosen": "a", "rejected": "b"}, "no question"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no question"),
        (
            {"prompt": "hi", "chosen": [USER], "rejected": [BAD]},
            "chosen answers with more than the assistant's",
        ),
        (
            {"chosen": [USER, GOOD], "rejected": [USER, USER, BAD]},
            "rejected answers with more than the assistant's messages, or to another question",
        ),
        (
            {"prompt": [{"role": "boss", "content": "x"}], "chosen": "a", "rejected": "b"},
            "prompt: a message has",
        ),
    ],
)
def test_what_is_no_pair_says_why(row: Any, reason: str) -> None:
    found = pair_of(row, "here")
    assert isinstance(found, str)
    assert found.startswith(reason)
    assert "\n" not in found


def prepared(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> PreparedData:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how: dict[str, Any] = {"vocab_size": 300, "sequence_length": 96, "validation_fraction": 0.2, **options}
    prepare({"a": [file]}, tmp_path / "data", seed=0, near_duplicates="none", kind="pairs", **how)
    return PreparedData.open(tmp_path / "data")


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n * n}"} for n in range(count)]


def test_windows_have_whole_pairs_and_answers_alone_are_targets(tmp_path: Path) -> None:
    data = prepared(tmp_path, rows_of(30))
    data.verify()
    tokenizer = load_tokenizer(data.tokenizer_path).tokenizer
    found = []
    for split in ("train", "validation"):
        arrays = data.arrays("a", split)
        for tokens, positions, targets, pairs in zip(*arrays.values(), strict=True):
            assert int(pairs.max()) % 2 == 0
            for side in range(1, int(pairs.max()) + 1):
                here = pairs == side
                assert positions[here].tolist() == list(range(int(here.sum())))
                answer = tokenizer.decode(tokens[here & (targets == 1)].tolist())
                question = tokenizer.decode(tokens[here & (targets == 0)].tolist())
                found.append((side % 2, question.split("\n")[1], answer.strip()))
            assert not targets[pairs == 0].any()
    expected = [(1, row["prompt"], row["chosen"]) for row in rows_of(30)]
    expected += [(0, row["prompt"], row["rejected"]) for row in rows_of(30)]
    assert sorted(found) == sorted(expected)


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    bad = [{"prompt": "q", "chosen": "same", "rejected": "same"}, {"prompt": "q", "chosen": "x"}]
    long = {"prompt": "q", "chosen": "word " * 60, "rejected": "no"}
    data = prepared(tmp_path, [*rows_of(30), *bad, bad[0], long])
    told = [skipped.reason for skipped in data.manifest.sources.skipped]
    assert any("2 of 34 rows: chosen and rejected are equal (first: row 31)" in reason for reason in told)
    assert any("1 of 34 rows: no field 'rejected'" in reason for reason in told)
    assert any("both sides together are longer" in reason for reason in told)


def test_nothing_that_can_be_used_is_one_line(tmp_path: Path) -> None:
    told = r"holds no row that can be used \(.*chosen and rejected are equal .*\): mend its rows"
    with pytest.raises(PhotonError, match=told) as refusal:
        prepared(tmp_path, [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    assert "\n" not in str(refusal.value)
    with pytest.raises(PhotonError, match=r"no train pair that can be used: both sides together") as refusal:
        prepared(tmp_path, rows_of(30), sequence_length=8)
    assert "\n" not in str(refusal.value)
    with pytest.raises(PhotonError, match=r"--text-field: pairs have the fields prompt, chosen, rejected"):
        prepared(tmp_path, rows_of(30), text_field="other")


@pytest.mark.parametrize("harm", ["swapped", "odd", "beyond"])
def test_sides_that_do_not_fit_are_found(harm: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, rows_of(30))
    from photon.data.prepared import _fits

    arrays = data.arrays("a", "train")
    pairs = np.array(arrays["pairs"])
    assert _fits(pairs, arrays["positions"])
    if harm == "swapped":
        pairs[0] = np.where(pairs[0] == 1, 2, np.where(pairs[0] == 2, 1, pairs[0]))
    elif harm == "odd":
        pairs[0][pairs[0] == pairs[0].max()] = 0
    else:
        pairs[0, -1] = 7
    assert not _fits(pairs, arrays["positions"])
