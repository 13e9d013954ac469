"""Files that look sound and are not: each costs what is wrong in it, is named, and nothing is guessed."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from photon.commands.data import app
from photon.data.prepare import prepare
from photon.data.row_kinds import RowReader
from photon.data.text_files import read_documents
from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError


def read(path, **options):
    """Return the texts of a path, and what was left out."""
    documents = []
    skipped = read_documents(path, documents, RowReader(**options))
    return [document.text for document in documents], [f"{one.file}: {one.reason}" for one in skipped]


def test_a_field_with_two_values_costs_the_row_where_it_is_wanted(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"text": "one", "text": "other"}\n'
        '{"text": "two", "id": 1, "id": NaN, "nan": NaN}\n'
        '{"text": "three", "text": "three"}\n'
    )
    texts, told = read(tmp_path / "x.jsonl")
    assert texts == ["two", "three"]
    assert told == ["x.jsonl: 1 of 3 rows: text field 'text' holds two values, no text (first: row 1)"]
    _, told = read(tmp_path / "x.jsonl", kind="labelled", label_field="id")
    assert "x.jsonl: 1 of 3 rows: label field 'id' holds two values (first: row 2)" in told


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_table_with_a_column_twice_is_refused_where_it_is_wanted(tmp_path, name):
    table = pa.table([["one"], ["two"], ["three"]], names=["text", "text", "body"])
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    with pytest.raises(PhotonError, match="it has the column 'text' twice"):
        read(tmp_path / name)
    assert read(tmp_path / name, text_field="body")[0] == ["three"]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_table_whose_names_are_no_text_is_one_line(tmp_path, name):
    table = pa.table({"text": ["one"], "another": ["two"]})
    if name == "x.parquet":
        pq.write_table(table, tmp_path / name, store_schema=False)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as file, pa.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    data = (tmp_path / name).read_bytes().replace(b"another", b"an\xffther")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PhotonError, match=r"not a readable (parquet|Arrow) file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("broken", "texts"),
    [
        ('{"text": "x", "meta": [{"text": "in"}, {"text": "side"}], oops}', ["one", "two"]),
        (r'{"text": "f(a, {\"text\": 1})" oops}', ["one", "two"]),
        # Where a text never ends, nobody knows where the row does.
        ('{"text": "x, "meta": {}', ["one", "two"]),
    ],
)
def test_what_is_inside_of_a_broken_row_is_no_row(tmp_path, broken, texts):
    (tmp_path / "x.json").write_text(f'[{{"text": "one"}}, {broken}, {{"text": "two"}}]')
    found, told = read(tmp_path / "x.json")
    assert found == texts
    assert told == ["x.json: 1 of 3 rows: not JSON (first: row 2)"]


def test_many_broken_rows_whose_ends_do_not_show_are_counted(tmp_path):
    """Each of them would have all that follows it read."""
    rows = ['{"text": "a b", "x": {"y": nope'] * 5_000
    (tmp_path / "x.json").write_text(f"[{','.join(rows)},{json.dumps({'text': 'good'})}]")
    texts, told = read(tmp_path / "x.json")
    assert texts == ["good"]
    assert told == ["x.json: 5,000 of 5,001 rows: not JSON (first: row 1)"]


ROWS = [{"text": "one", "id": 1}, {"text": "two", "id": 2}]


@pytest.mark.parametrize(
    ("data", "called"),
    [
        (json.dumps(ROWS), "JSON: name it .json"),
        (json.dumps(ROWS, indent=1), "JSON: name it .json"),
        (json.dumps({"text": "one"}) + "\n", "JSON: name it .json"),
        ("\n".join(json.dumps(row, indent=1) for row in ROWS), "JSON: name it .json"),
        ("\n\n" + "\n\n".join(map(json.dumps, ROWS)), "JSON, a row on each line: name it .jsonl"),
        (json.dumps(ROWS)[:-5] + "…", None),
        ('{"title": "front matter"}\n\nA page of prose.\n', None),
        ("{}\n\n{} {} are braces.", None),
        ("[1] A note.", None),
        ("[see below]", None),
    ],
)
def test_json_by_the_name_of_a_text_is_not_trained_as_its_syntax(tmp_path, data, called):
    (tmp_path / "x.txt").write_text(data)
    if called is None:
        assert read(tmp_path / "x.txt") == ([data], [])
    else:
        with pytest.raises(PhotonError) as caught:
            read(tmp_path / "x.txt")
        assert f"x.txt: holds {called} to have its fields read" in str(caught.value)


def test_samples_of_an_archive_say_one_thing_and_have_no_byte_order_mark(tmp_path):
    samples = {
        "a.txt": b"\xef\xbb\xbfone",
        "b.json": b'\xef\xbb\xbf{"text": "two"}',
        "c.json": b'{"text": "this"}',
        "c.txt": b"that",
        "d.json": b'{"text": "same", "cls": 5}',
        "d.txt": b"same\n",
        "d.cls": b"5",
    }
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in samples.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    texts, told = read(tmp_path / "x.tar")
    assert texts == ["one", "two", "same\n"]
    said = "text field 'text' holds two values, one of them in its .json, no text"
    assert told == [f"x.tar: 1 of 4 rows: {said} (first: row 3)"]


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json", "index.json"])
def test_a_pipe_in_the_place_of_an_index_is_named_and_not_waited_for(tmp_path, name):
    (tmp_path / "x.txt").write_text("one")
    (tmp_path / "dataset_info.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    texts, told = read(tmp_path)
    assert texts == ["one"]
    assert any(name in line and "regular file" in line for line in told)


def test_a_link_that_nobody_may_follow_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to("locked/y.txt")
    stat = os.stat

    def refuse(path, *arguments, **options):
        if str(path).endswith("link.txt") and options.get("follow_symlinks", True):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr("os.stat", refuse)
    assert read(tmp_path) == (["one"], ["link.txt: Permission denied"])


def tokenizer_of(folder, model, **config):
    """Write a tokenizer that cuts text at white space."""
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str())
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


LETTERS = [(sign, -3.0) for sign in "▁Helloworldabc</s>"]


@pytest.mark.parametrize(
    ("config", "shown"), [({"eos_token": ""}, "''"), ({"eos_token": ["</s>"]}, r"\['</s>'\]")]
)
def test_an_end_of_text_that_is_no_text_is_named(tmp_path, config, shown):
    folder = tokenizer_of(tmp_path / "t", models.Unigram([("<unk>", 0.0), *LETTERS], 0), **config)
    with pytest.raises(PhotonError, match=f"eos_token of the tokenizer .* is {shown}, no text: write one"):
        load_tokenizer(folder)


def test_a_vocabulary_with_holes_or_doubles_is_refused(tmp_path):
    words = {"<unk>": 0, "▁Hello": 1, "▁world": 2}
    folder = tokenizer_of(tmp_path / "t", models.WordLevel({**words, "far": 4_000_000_000}, "<unk>"))
    with pytest.raises(PhotonError, match="has a token of number 4000000000: at most"):
        load_tokenizer(folder)
    folder = tokenizer_of(tmp_path / "t", models.WordLevel({**words, "twin": 2}, "<unk>"))
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["model"]["vocab"] = {**words, "twin": 2}
    file.write_text(json.dumps(saved))
    with pytest.raises(PhotonError, match="gives two tokens one number"):
        load_tokenizer(folder)


def test_that_a_text_can_spell_the_end_of_text_is_said(tmp_path):
    spelt = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *LETTERS], 0)
    loaded = load_tokenizer(tokenizer_of(tmp_path / "a", spelt, eos_token="</s>"))
    assert loaded.notes == ("a text that spells </s> ends there: the tokenizer writes it so",)
    words = models.WordLevel({"<unk>": 0, "</s>": 1, "▁Hello": 2}, "<unk>")
    assert load_tokenizer(tokenizer_of(tmp_path / "b", words, eos_token="</s>")).notes == ()


def test_labels_that_no_text_has_are_said(tmp_path, make_text):
    rows = (json.dumps({"text": make_text(number), "topic": "a"}) for number in range(20))
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    options = {"kind": "labelled", "vocab_size": 300, "sequence_length": 16, "validation_fraction": 0.3}
    found = prepare({"a": [tmp_path / "x.jsonl"]}, tmp_path / "d", label_field="topc", **options)
    assert found.notes == ["no text has a label: is --labelled the name of the field?"]
    found = prepare({"a": [tmp_path / "x.jsonl"]}, tmp_path / "e", label_field="topic", **options)
    assert found.notes == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--silo", "a=x.txt", "--text-field", ""], "--text-field names nothing"),
        (["--silo", "a=x.txt", "--labelled", ""], "--labelled names nothing"),
        (["--silo", "a=x.txt", "--hub-limit", "5"], "belong to --hub"),
        (["--hub", "c4", "--hub-limit", "0"], "--hub-limit 0 takes nothing"),
        (["--embedded", "--text-field", "body"], "the embedded corpus has no fields"),
    ],
)
def test_options_that_would_do_nothing_are_refused(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["prepare", "--output", str(tmp_path / "d"), *arguments])
    assert isinstance(result.exception, PhotonError)
    assert message in str(result.exception)


def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "d").symlink_to("d")
    with pytest.raises(PhotonError, match="is a link to itself"):
        prepare({"a": [tmp_path]}, tmp_path / "d")
