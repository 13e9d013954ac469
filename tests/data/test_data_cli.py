import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from photon.commands.data import app
from photon.data.documents import Document
from photon.data.prepared import PreparedData
from photon.errors import PhotonError

SMALL = ["--sequence-length", "16", "--validation-fraction", "0.2"]


def run(*arguments: object) -> str:
    """Run `photon data`; return its output, or raise what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def texts(make_text, tmp_path) -> Path:
    folder = tmp_path / "texts"
    (folder / "books").mkdir(parents=True)
    for number in range(12):
        (folder / "books" / f"{number}.txt").write_text(make_text(number))
    rows = [
        {"text": make_text(100 + n, alphabet="qrstuvwxyz"), "lang": "de" if n % 2 else "fr"}
        for n in range(24)
    ]
    (folder / "news.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return folder


def test_silos_from_files_are_prepared_and_shown(texts, tmp_path):
    output = run(
        *("prepare", "--output", tmp_path / "data", *SMALL, "--vocab-size", 300),
        *("--silo", f"books={texts}/books", "--silo", f"news={texts}/news.jsonl.gz"),
    )
    data = PreparedData.open(tmp_path / "data")
    assert data.silo_names == ["books", "news"]
    assert (data.manifest.vocab_size, data.manifest.sequence_length, data.manifest.seed) == (300, 16, 0)
    assert f"{data.manifest.silos['news'].train.tokens:,}" in output
    shown = run("inspect", tmp_path / "data", "--verify", "--samples", 1)
    assert "agree with the manifest" in shown
    assert "books, train window 0" in shown


def test_a_repeated_name_adds_to_one_silo(texts, tmp_path):
    run(
        *("prepare", "--output", tmp_path / "data", *SMALL, "--vocab-size", 300),
        *("--silo", f"all={texts}/books", "--silo", f"all={texts}/news.jsonl.gz"),
    )
    silo = PreparedData.open(tmp_path / "data").manifest.silos["all"]
    assert silo.train.documents + silo.validation.documents == 36


@pytest.mark.parametrize(
    ("partition", "names"),
    [
        ("iid:3", ["silo-0", "silo-1", "silo-2"]),
        ("dirichlet:2:0.5", ["silo-0", "silo-1"]),
        ("field:lang", ["de", "fr"]),
    ],
)
def test_partitions(texts, tmp_path, partition, names):
    run(
        *("prepare", "--output", tmp_path / "data", *SMALL, "--vocab-size", 300),
        *("--silo", f"news={texts}/news.jsonl.gz", "--partition", partition),
    )
    assert PreparedData.open(tmp_path / "data").silo_names == names


def test_a_tokenizer_can_be_taken_from_other_prepared_data(texts, tmp_path):
    silo = ["--silo", f"books={texts}/books"]
    run("prepare", "--output", tmp_path / "one", *SMALL, *silo, "--vocab-size", 280)
    run("prepare", "--output", tmp_path / "two", *SMALL, *silo, "--tokenizer", tmp_path / "one" / "tokenizer")
    one, two = (PreparedData.open(tmp_path / name).manifest for name in ("one", "two"))
    assert one.tokenizer_sha256 == two.tokenizer_sha256
    assert one.silos == two.silos


def test_a_corpus_of_the_hub_from_local_copies(texts, tmp_path):
    base = ["prepare", *SMALL, "--vocab-size", 300, "--hub-files", f"{texts}/news.jsonl.gz"]
    run(*base, "--output", tmp_path / "c4", "--hub", "c4", "--hub-limit", 20)
    silo = PreparedData.open(tmp_path / "c4").manifest.silos["c4"]
    assert silo.train.documents + silo.validation.documents == 20
    run(
        *base, "--output", tmp_path / "own", "--hub", "json", "--partition", "field:lang", "--hub-limit-mb", 1
    )
    assert PreparedData.open(tmp_path / "own").silo_names == ["de", "fr"]


def test_the_embedded_corpus_is_prepared(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("photon.data.embedded.embedded_documents", lambda: corpus)
    run("prepare", "--output", tmp_path / "data", *SMALL, "--vocab-size", 300, "--embedded")
    assert PreparedData.open(tmp_path / "data").silo_names == ["high", "low"]


def test_prepared_data_is_replaced_only_if_asked(texts, tmp_path):
    base = [
        "prepare",
        "--output",
        tmp_path / "data",
        *SMALL,
        "--vocab-size",
        300,
        "--silo",
        f"a={texts}/books",
    ]
    run(*base)
    with pytest.raises(PhotonError, match="give --overwrite or another --output"):
        run(*base, "--seed", 3)
    run(*base, "--seed", 3, "--overwrite")
    assert PreparedData.open(tmp_path / "data").manifest.seed == 3


SILO = ["--silo", "a=TEXTS/books"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the text in one way"),
        ([*SILO, "--embedded"], "give the text in one way"),
        ([*SILO, "--hub", "c4"], "give the text in one way"),
        ([*SILO, "--vocab-size", "300", "--tokenizer", "x"], "exclude each other"),
        ([*SILO, "--hub-files", "x"], "belong to --hub"),
        ([*SILO, "--partition", "random"], "is not understood"),
        ([*SILO, "--tokenizer", "nowhere"], "nowhere does not exist"),
        (["--silo", "books"], "is not NAME=PATH"),
        (["--silo", "=x"], "is not NAME=PATH"),
        (["--silo", "a=nowhere"], "nowhere does not exist"),
        (["--silo", "a b=TEXTS/books"], "cannot be a folder name"),
        (["--silo", "a\n=TEXTS/books"], "cannot be a folder name"),
        (["--silo", "a=no\nwhere"], r"no\\nwhere does not exist"),
        (["--silo", "a=~nobody-of-this-name/x"], "names no path .*home"),
        ([*SILO, "--near-duplicates", "letters"], "use words, digits or none"),
        ([*SILO, "--tokenizer-loss", "2"], "a share from 0 to 1"),
        ([*SILO, "--validation-fraction", "nan"], "validation fraction nan is out of range"),
        ([*SILO, "--seed", str(10**400)], "seed 10+ is too large"),
        ([*SILO, "--sequence-length", str(10**400)], "sequence length 10+ is out of range"),
        ([*SILO, "--partition", f"iid:{'9' * 30}"], "documents cannot fill"),
        ([*SILO, "--partition", f"iid:{'9' * 6000}"], "is not understood"),
        ([*SILO, "--vocab-size", str(10**400)], "vocabulary of 10+ is too large"),
        (["--hub", "json", "--hub-files", "TEXTS/*.gz", "--hub-limit-mb", "nan"], "nan is out of range"),
        (["--hub", "json", "--hub-files", "TEXTS/*.gz", "--hub-limit-mb", "inf"], "inf is out of range"),
        (["--embedded", "--partition", "field:x"], "has no fields"),
        (["--hub", "c5"], "is not known"),
        ([*SILO, "--sequence-length", "100000"], "fewer than one window of 100001"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(texts, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("photon.data.embedded.embedded_documents", lambda: {"a": [Document("a", "b")]})
    arguments = [argument.replace("TEXTS", str(texts)) for argument in arguments]
    with pytest.raises(PhotonError, match=message) as caught:
        run("prepare", "--output", tmp_path / "data", *arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_help_teaches_with_an_example_and_imports_nothing_heavy():
    assert "photon data prepare --output" in run("prepare", "--help")
    assert "photon data inspect" in run("inspect", "--help")
    code = (
        "import sys, photon.commands.data; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'tokenizers', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "[]"
