"""Texts with labels: what is read, how windows are written, and what a folder's checks find."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from photon.commands.data import app
from photon.data.documents import Labelled
from photon.data.labelled import labelled_of
from photon.data.prepare import prepare
from photon.data.prepared import PreparedData, array_file
from photon.errors import PhotonError

ROWS = [
    {"text": f"number {number} of {number % 7} in all " * (1 + number % 5), "of": number % 3}
    for number in range(40)
]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Write rows with labels, rows without, and a plain text."""
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    without = [{"text": row["text"].replace("number", "word")} for row in ROWS]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in without))
    (tmp_path / "none" / "plain.txt").write_text("a text of its own, as plain as can be")
    return tmp_path


def prepared(texts: Path) -> PreparedData:
    prepare(
        {"given": [texts / "given.jsonl"], "none": [texts / "none"]},
        texts / "data",
        vocab_size=300,
        sequence_length=16,
        validation_fraction=0.2,
        near_duplicates="none",
        kind="labelled",
        label_field="of",
    )
    return PreparedData.open(texts / "data")


def test_each_window_is_one_text_and_has_its_label(texts: Path) -> None:
    data = prepared(texts)
    data.verify()
    assert data.manifest.kind == "labelled"
    assert data.manifest.classes == ["0", "1", "2"]
    tokenizer = Tokenizer.from_file(str(data.tokenizer_path / "tokenizer.json"))
    by_text = {row["text"]: str(row["of"]) for row in ROWS}
    found = 0
    for split in ("train", "validation"):
        arrays = data.arrays("given", split)
        entry = getattr(data.manifest.silos["given"], split)
        assert entry.documents == entry.sequences == len(arrays["tokens"])
        assert arrays["lengths"].shape == arrays["labels"].shape == (entry.sequences, 1)
        assert entry.labels.labelled == entry.sequences
        for tokens, length, label in zip(
            arrays["tokens"], arrays["lengths"][:, 0], arrays["labels"][:, 0], strict=True
        ):
            beginning = tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=False)
            whole = [text for text in by_text if text.startswith(beginning)]
            assert whole
            assert data.manifest.classes[label] in {by_text[text] for text in whole}
            assert length == min(16, *(len(tokenizer.encode(text).ids) for text in whole))
            assert (tokens[length:] == data.manifest.eos_token_id).all()
            found += 1
        assert (data.arrays("none", split)["labels"] == -1).all()
    assert found == len(ROWS)
    assert sum(len(data.windows("none", split)) for split in ("train", "validation")) == len(ROWS) + 1


def test_a_label_is_a_name_a_whole_number_or_nothing() -> None:
    for value, label in (("a b", "a b"), (3, "3"), (True, "True"), (None, None)):
        assert labelled_of({"text": "t", "of": value}, "here", "text", "of") == Labelled("here", "t", label)
    assert labelled_of({"text": "t"}, "here", "text", "of") == Labelled("here", "t", None)
    assert labelled_of({"text": "t", "x": {"y": "z"}}, "here", "text", "x.y") == Labelled("here", "t", "z")
    for value, told in (
        (0.5, "not whole"),
        ([1], "a list"),
        ("", "empty"),
        ("a\nb", "no name"),
        ("x" * 200, "no name"),
    ):
        found = labelled_of({"text": "t", "of": value}, "here", "text", "of")
        assert isinstance(found, str)
        assert told in found


def test_what_was_changed_is_found(texts: Path) -> None:
    data = prepared(texts)
    for name, place, value in (("labels", 0, 7), ("lengths", 0, 99)):
        file = array_file(data.path, "given", "train", name)
        whole = np.load(file)
        changed = whole.copy()
        changed[place] = value
        np.save(file, changed)
        with pytest.raises(PhotonError, match=rf"train-{name}\.npy has changed since it was written"):
            PreparedData.open(data.path)
        np.save(file, whole)
    PreparedData.open(data.path)


def test_the_command_takes_labels_and_says_what_does_not_go_with_them(texts: Path) -> None:
    given = ["--silo", f"a={texts / 'given.jsonl'}", "--silo", f"b={texts / 'none'}"]
    common = ["--vocab-size", "300", "--sequence-length", "16", "--near-duplicates", "none"]
    result = CliRunner().invoke(
        app, ["prepare", "--output", str(texts / "out"), "--labelled", "of", *given, *common]
    )
    assert result.exit_code == 0, result.output
    assert PreparedData.open(texts / "out").manifest.classes == ["0", "1", "2"]
    for words, told in (
        (["--labelled", "of", "--kind", "chat", *given], "--labelled and --kind chat exclude each other"),
        (["--kind", "labelled", *given], "--labelled: names the field with the labels"),
        (["--labelled", "of", "--embedded"], "--kind labelled reads rows"),
    ):
        failed = CliRunner().invoke(app, ["prepare", "--output", str(texts / "other"), *words])
        assert told in str(failed.exception)
