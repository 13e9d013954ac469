import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from photon.data.documents import Document
from photon.data.prepare import prepare, prepare_documents, unigram_loss
from photon.data.prepared import PreparedData, file_sha256
from photon.data.tokenizer import train_tokenizer
from photon.errors import PhotonError

SMALL = {"vocab_size": 300, "sequence_length": 16, "validation_fraction": 0.2}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def prepared(corpus, tmp_path) -> PreparedData:
    prepare_documents(corpus, tmp_path / "data", **SMALL)
    return PreparedData.open(tmp_path / "data")


def test_windows_are_the_documents_each_followed_by_the_end_of_sequence(corpus, prepared):
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_path)
    prepared.verify()
    for silo in prepared.silo_names:
        found: dict[str, list[str]] = {}
        for split in ("train", "validation"):
            windows = prepared.windows(silo, split)
            entry = getattr(prepared.manifest.silos[silo], split)
            assert windows.shape == (entry.sequences, 17)
            assert windows.dtype == np.uint16
            assert entry.tokens == 16 * entry.sequences
            assert np.array_equal(windows[:-1, -1], windows[1:, 0]), "all but the first token are told once"
            tokens = np.append(windows[:, :-1].reshape(-1), windows[-1, -1])
            texts = tokenizer.decode(tokens, skip_special_tokens=False).split("<|endoftext|>")
            # The end of the last document, or all of it, is in the window that is not stored.
            found[split] = texts[:-1]
            assert entry.documents - len(found[split]) in (0, 1)
        originals = {document.text for document in corpus[silo]}
        assert set(found["train"]) <= originals
        assert set(found["validation"]) <= originals
        assert not set(found["train"]) & set(found["validation"])
        assert sum(getattr(prepared.manifest.silos[silo], s).documents for s in found) == len(originals)


def test_the_manifest_counts_and_the_losses_are_those_of_a_plain_computation(prepared):
    manifest = prepared.manifest
    train, scored = (
        {
            s: Counter(prepared.windows(s, "train")[:, first:].reshape(-1).tolist())
            for s in prepared.silo_names
        }
        for first in (0, 1)
    )
    union: Counter[int] = sum(scored.values(), Counter())
    total_loss = total_tokens = 0.0
    for silo in prepared.silo_names:
        assert prepared.unigram(silo).tolist() == [train[silo][i] for i in range(manifest.vocab_size)]
        validation = prepared.windows(silo, "validation")[:, 1:].reshape(-1).tolist()
        for counts, loss in ((union, "unigram_loss"), (scored[silo], "own_unigram_loss")):
            denominator = counts.total() + manifest.vocab_size
            expected = -math.fsum(math.log((counts[t] + 1) / denominator) for t in validation) / len(
                validation
            )
            assert getattr(manifest.silos[silo], loss) == pytest.approx(expected, rel=1e-12)
        total_loss += manifest.silos[silo].unigram_loss * len(validation)
        total_tokens += len(validation)
    assert manifest.unigram_loss == pytest.approx(total_loss / total_tokens, rel=1e-12)
    assert manifest.unigram_perplexity == pytest.approx(math.exp(manifest.unigram_loss), rel=1e-12)
    assert manifest.tokenizer_sha256 == file_sha256(prepared.tokenizer_path / "tokenizer.json")


def test_unigram_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    assert unigram_loss(np.zeros(50, dtype=np.int64), np.arange(50)) == pytest.approx(math.log(50))


@pytest.mark.parametrize("partition", ["by-source", "iid:3", "dirichlet:3:0.5"])
def test_two_runs_give_the_same_bytes_and_another_seed_gives_others(corpus, tmp_path, partition):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        prepare_documents(corpus, tmp_path / name, partition=partition, seed=seed, **SMALL)
    one, two, three = (folder_bytes(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["manifest.json"] != three["manifest.json"]
    silos = json.loads(one["manifest.json"])["silos"]
    assert len(silos) == {"by-source": 2, "iid:3": 3, "dirichlet:3:0.5": 3}[partition]
    assert sum(silo[s]["documents"] for silo in silos.values() for s in ("train", "validation")) == 60


@pytest.mark.few(1)
@pytest.mark.parametrize("given", ["trained", "with dropout"])
def test_any_number_of_threads_gives_the_same_bytes(corpus, tmp_path, given):
    options = {**SMALL}
    if given == "with dropout":
        tokenizer = train_tokenizer([document.text for document in corpus["low"]], 300).tokenizer
        tokenizer.model.dropout = 0.2
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = {"sequence_length": 16, "tokenizer": str(tmp_path / "tokenizer.json")}
    job = {name: [[d.source, d.text] for d in silo] for name, silo in corpus.items()}
    code = (
        "import json, sys; from pathlib import Path; from photon.data.documents import Document\n"
        "from photon.data.prepare import prepare_documents\n"
        "job, options = json.load(sys.stdin)\n"
        "options |= {'tokenizer': Path(options['tokenizer'])} if 'tokenizer' in options else {}\n"
        "corpus = {name: [Document(*document) for document in silo] for name, silo in job.items()}\n"
        "prepare_documents(corpus, Path(sys.argv[1]), **options)"
    )
    for workers in ("1", "4"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / workers)],
            input=json.dumps([job, options]).encode(),
            check=True,
            cwd=Path(__file__).parents[2],
            env={
                **os.environ,
                "PYTHONHASHSEED": workers,
                "RAYON_NUM_THREADS": workers,
                "TOKENIZERS_PARALLELISM": "false" if workers == "1" else "true",
            },
        )
    one, four = folder_bytes(tmp_path / "1"), folder_bytes(tmp_path / "4")
    assert one == four
    notes = json.loads(one["manifest.json"])["notes"]
    assert [note.split(" was ")[0] for note in notes] == (
        ["the tokenizer's dropout of 0.2"] if given == "with dropout" else []
    )


@pytest.mark.few(1)
@pytest.mark.parametrize("given", ["own", "another"])
def test_any_number_of_processes_gives_the_same_bytes(corpus, tmp_path, given, monkeypatch):
    monkeypatch.setattr("photon.data.shards.ENOUGH", 2_000)
    options: dict[str, object] = {**SMALL}
    if given == "another":
        # One whose words are not looked up: it begins each text with a space.
        tokenizer = train_tokenizer([document.text for document in corpus["low"]], 300).tokenizer
        tokenizer.pre_tokenizer.add_prefix_space = True
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        options = {"sequence_length": 16, "tokenizer": tmp_path / "tokenizer.json"}
    for workers in (1, 3):
        prepare_documents(corpus, tmp_path / f"w{workers}", workers=workers, **options)
    assert folder_bytes(tmp_path / "w1") == folder_bytes(tmp_path / "w3")


def test_data_of_earlier_versions_is_still_read(prepared):
    manifest = json.loads((prepared.path / "manifest.json").read_text())
    for new in ("notes", "near_duplicates"):
        del manifest[new]
    for silo in manifest["silos"].values():
        del silo["text_lost"]
    (prepared.path / "manifest.json").write_text(json.dumps(manifest))
    read = PreparedData.open(prepared.path).manifest
    assert (read.notes, read.near_duplicates, read.silos["low"].text_lost) == ([], "words", None)


def test_the_order_in_which_silos_are_given_does_not_matter(corpus, tmp_path):
    prepare_documents(corpus, tmp_path / "one", **SMALL)
    prepare_documents(dict(reversed(corpus.items())), tmp_path / "two", **SMALL)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_a_vocabulary_beyond_65536_is_stored_as_uint32(corpus, tmp_path, prepared):
    large = json.loads((prepared.tokenizer_path / "tokenizer.json").read_text())
    for number in range(70_000 - 300):
        large["model"]["vocab"][f"unused{number}"] = 300 + number
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(large))
    manifest = prepare_documents(corpus, tmp_path / "large", tokenizer=file, sequence_length=16)
    data = PreparedData.open(tmp_path / "large")
    data.verify()
    assert (manifest.dtype, manifest.vocab_size, manifest.eos_token_id) == ("uint32", 70_000, 0)
    assert data.windows("low", "train").dtype == np.uint32
    assert data.unigram("low").shape == (70_000,)


def test_files_are_read_and_what_was_skipped_is_in_the_manifest(make_text, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number:02d}.txt").write_text(make_text(number))
    (texts / "copy.txt").write_text(make_text(3))
    (texts / "bad.txt").write_bytes(b"\xff\xff")
    rows = "".join(json.dumps({"body": make_text(50 + n)}) + "\n" for n in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    with pytest.raises(PhotonError, match=r"rows\.jsonl holds no row that can be used"):
        prepare({"a": [texts], "b": [tmp_path / "rows.jsonl"]}, tmp_path / "out", **SMALL)
    sources = {"a": [texts, texts], "b": [tmp_path / "rows.jsonl"]}
    (tmp_path / "rows.jsonl").write_text(rows.replace('"body"', '"text"'))
    manifest = prepare(sources, tmp_path / "out", **SMALL)
    assert [(s.name, s.file) for s in manifest.sources.skipped] == [("a", "bad.txt"), ("a", "bad.txt")]
    assert [(s.name, s.documents, s.duplicates) for s in manifest.sources.read] == [
        ("a", 12, 14),
        ("b", 12, 0),
    ]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_field_makes_the_silos(make_text, tmp_path):
    rows = [{"text": make_text(n), "lang": ["de", "fr", "pt br"][n % 3]} for n in range(36)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = prepare({"x": [tmp_path / "rows.jsonl"]}, tmp_path / "out", partition="field:lang", **SMALL)
    assert {
        name: silo.train.documents + silo.validation.documents for name, silo in manifest.silos.items()
    } == {
        "de": 12,
        "fr": 12,
        "pt-br": 12,
    }


BAD_OPTIONS = {
    "sequence_length": (1, "from 2 to"),
    "validation_fraction": (0.0, "validation fraction 0.0 is out of range"),
    "seed": (-1, "seed -1 is negative"),
    "vocab_size": (100, "too small"),
    "partition": ("iid", "is not understood"),
    "tokenizer": (Path("nowhere"), "does not exist"),
    "near_duplicates": ("letters", "use words, digits or none"),
    "tokenizer_loss": (1.5, "a share from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_out_of_range_is_an_error_and_nothing_is_left(corpus, tmp_path, name):
    value, message = BAD_OPTIONS[name]
    with pytest.raises(PhotonError, match=message):
        prepare_documents(corpus, tmp_path / "data", **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": []}, "silo 'low' holds no documents"),
        (
            {"tiny": [Document("t", "one two"), Document("t", "three four")]},
            "silo 'tiny' has .* tokens, fewer than",
        ),
        ({"../up": [Document("t", "x")]}, "cannot be a folder name"),
        ({"up\n": [Document("t", "x")]}, "cannot be a folder name"),
        ({"one": [Document("t", "a single document " * 50)]}, "silo 'one' has one document.*give it several"),
    ],
)
def test_a_silo_that_cannot_be_used_is_named_and_nothing_is_left(corpus, tmp_path, change, message):
    with pytest.raises(PhotonError, match=message):
        prepare_documents({**corpus, **change}, tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_silo_that_only_repeats_another_is_an_error(corpus, tmp_path):
    with pytest.raises(PhotonError, match="silo 'twin' repeats text of another silo"):
        prepare_documents({**corpus, "twin": corpus["low"]}, tmp_path / "data", **SMALL)


def test_only_prepared_data_is_overwritten_and_only_if_asked(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "empty").mkdir()
    for name in ("mine", "file"):
        with pytest.raises(PhotonError, match="give a"):
            prepare_documents(corpus, tmp_path / name, overwrite=True, **SMALL)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    prepare_documents(corpus, tmp_path / "empty", **SMALL)
    with pytest.raises(PhotonError, match="--overwrite"):
        prepare_documents(corpus, tmp_path / "empty", **SMALL)
    before = folder_bytes(tmp_path / "empty")
    prepare_documents(corpus, tmp_path / "empty", overwrite=True, seed=1, **SMALL)
    assert folder_bytes(tmp_path / "empty") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "mine"]


def test_a_full_disk_is_one_clear_error(corpus, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("photon.data.prepare.np.save", full)
    with pytest.raises(PhotonError, match=r"No space left on device.*free some space"):
        prepare_documents(corpus, tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []
