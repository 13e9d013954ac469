import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, GPT2TokenizerFast

from photon.data.tokenizer import _pieces, load_tokenizer, train_tokenizer
from photon.errors import PhotonError

TRICKY = [
    "Hello world",
    " leading and trailing  ",
    "tabs\tand\n\n\nlines\r\n",
    "Ünïcödé 日本語 🙂 \u200b",
    "it's 1,234.5% of x_y<|endoftext|>z",
    "",
]


@pytest.fixture
def trained(make_text):
    return train_tokenizer([make_text(i) for i in range(20)] + ["Hello world, hello world"] * 3, 400)


def test_a_trained_tokenizer_writes_every_text_back(trained):
    for text, ids in zip(TRICKY, trained.encode(TRICKY), strict=True):
        assert trained.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert all(0 <= token < trained.vocab_size for token in ids)
    assert trained.vocab_size == 400
    assert (trained.eos_token, trained.eos_token_id) == ("<|endoftext|>", 0)


def test_text_that_spells_the_end_of_text_does_not_end_it(trained):
    ids = trained.encode(["before <|endoftext|> after"])[0]
    assert trained.eos_token_id not in ids


def test_training_is_the_same_in_another_process(make_text, trained):
    # Another hash seed and another number of threads, which order hash maps differently.
    texts = [make_text(i) for i in range(20)] + ["Hello world, hello world"] * 3
    code = (
        "import json, sys; from photon.data.tokenizer import train_tokenizer; "
        "sys.stdout.buffer.write(train_tokenizer(json.load(sys.stdin), 400).tokenizer.to_str().encode())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(texts).encode(),
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "77", "RAYON_NUM_THREADS": "1"},
    )
    assert result.stdout.decode() == trained.tokenizer.to_str()


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(PhotonError, match="need 257"):
        train_tokenizer(["text"], 256)


def test_transformers_loads_what_is_saved(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.eos_token_id, loaded.bos_token_id, len(loaded)) == (0, 0, 400)
    plain = [text for text in TRICKY if "<|endoftext|>" not in text]
    assert [loaded(text)["input_ids"] for text in plain] == trained.encode(plain)
    assert loaded.decode(trained.encode([TRICKY[3]])[0]) == TRICKY[3]
    assert loaded.decode([0, *trained.encode(["Hello"])[0]], skip_special_tokens=True) == "Hello"


def gpt2_folder(folder: Path, trained) -> Path:
    """Write the tokenizer as GPT-2's is: vocab.json with the end of text in it, and merges.txt."""
    folder.mkdir()
    trained.tokenizer.model.save(str(folder))
    assert sorted(file.name for file in folder.iterdir()) == ["merges.txt", "vocab.json"]
    return folder


def test_a_gpt2_folder_encodes_as_transformers_does(trained, tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", trained)
    loaded = load_tokenizer(folder)
    reference = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    plain = [text for text in TRICKY if "<|endoftext|>" not in text]
    assert len(reference("Hello world")["input_ids"]) > 1
    assert loaded.encode(plain) == [reference(text)["input_ids"] for text in plain]
    assert (loaded.eos_token_id, loaded.vocab_size) == (0, 400)


@pytest.mark.parametrize("bare", [True, False])
def test_a_neox_tokenizer_json_keeps_its_ids_and_end_of_text(trained, tmp_path, bare):
    # NeoX: end of text with id 0, and padding, truncation and a template that must not reach the data.
    tokenizer = Tokenizer.from_str(trained.tokenizer.to_str())
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json" if bare else tmp_path)
    assert loaded.encode(TRICKY) == trained.encode(TRICKY)
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)


@pytest.mark.parametrize("value", ["<|stop|>", {"content": "<|stop|>", "lstrip": False}])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_of_sequence_is_the_one_that_the_folder_names(trained, tmp_path, name, value):
    trained.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps({"eos_token": value}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.vocab_size) == ("<|stop|>", 400, 401)
    loaded.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").eos_token_id == 400


@pytest.mark.parametrize(
    ("flag", "kind"), [(True, "GPT2Tokenizer"), (True, "RobertaTokenizer"), (False, None)]
)
@pytest.mark.parametrize("as_json", [True, False])
def test_add_prefix_space_counts_as_in_transformers(trained, tmp_path, flag, kind, as_json):
    folder = gpt2_folder(tmp_path / "own", trained)
    if as_json:
        trained.tokenizer.save(str(folder / "tokenizer.json"))
    kind = kind or "GPT2Tokenizer"
    config = {"add_prefix_space": flag, "tokenizer_class": kind, "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = AutoTokenizer.from_pretrained(folder)
    plain = [text for text in TRICKY if "<|endoftext|>" not in text]
    wanted = [reference(text, add_special_tokens=False)["input_ids"] for text in plain]
    assert load_tokenizer(folder).encode(plain) == wanted
    assert (wanted != trained.encode(plain)) == flag


def test_chance_and_templates_are_taken_out_and_said(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained.tokenizer.to_str())
    tokenizer.model.dropout = 0.5
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert {tuple(loaded.encode(["Hello world, hello"])[0]) for _ in range(20)} == {
        tuple(trained.encode(["Hello world, hello"])[0])
    }
    assert len(loaded.notes) == 2
    assert "dropout of 0.5" in loaded.notes[0]
    assert "template (<|endoftext|>)" in loaded.notes[1]
    loaded.save(tmp_path / "again")
    written = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert written("Hello")["input_ids"] == trained.encode(["Hello"])[0]
    assert load_tokenizer(tmp_path / "again").notes == ()


@pytest.mark.parametrize("model", ["wordlevel", "wordpiece", "unigram"])
def test_a_tokenizer_that_gives_up_at_a_text_is_one_line(tmp_path, model):
    words = {"</s>": 0, "Hello": 1, "world": 2}
    scores = [("</s>", 0.0), ("Hello", -1.0), ("world", -1.0)]
    tokenizer = Tokenizer(
        {
            "wordlevel": lambda: models.WordLevel(words),
            "wordpiece": lambda: models.WordPiece(words, unk_token="[UNK]"),
            "unigram": lambda: models.Unigram(scores, None),
        }[model]()
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PhotonError, match="cannot write this text") as caught:
        load_tokenizer(tmp_path).encode(["Grüße"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", ["word", "spaces", "one letter", "lines"])
def test_one_endless_word_does_not_stall_training(shape):
    letters = random.Random(0)
    size = 400_000
    text = {
        "word": lambda: "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=size)),
        "spaces": lambda: " " * size,
        "one letter": lambda: "a" * size,
        "lines": lambda: "\n" * size,
    }[shape]()
    started = time.monotonic()
    trained = train_tokenizer([text, "some other text"], 400)
    assert time.monotonic() - started < 15  # minutes, with time that grows with the square
    assert trained.tokenizer.decode(trained.encode([text])[0]) == text


def test_long_lines_are_cut_between_words_and_all_is_learnt_from():
    text = "".join(f" word{number}" for number in range(5000)) + "\n" + "x" * 20_000 + "\nend"
    pieces = list(_pieces([text]))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 8192
    assert all(piece[0] in " x" for piece in pieces[:-1])


def without_vocabulary(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


BROKEN = {
    "nothing": (lambda folder: None, "holds neither tokenizer.json nor vocab.json"),
    "only vocab": (lambda folder: (folder / "vocab.json").write_text("{}"), "holds neither"),
    "no json": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        "not a tokenizer that can be used",
    ),
    "other json": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "not a tokenizer that can be used",
    ),
    "deep config": (
        lambda folder: (
            without_vocabulary(folder),
            (folder / "tokenizer_config.json").write_text("[" * 10**5),
        ),
        "tokenizer_config.json cannot be read",
    ),
    "words that end": (
        lambda folder: BPE({"a</w>": 0, "a": 1, "b": 2, "ab</w>": 3}, []).save(str(folder)),
        "vocab.json is no byte-level vocabulary",
    ),
    "encodes nothing": (without_vocabulary, 'encodes "Hello world" to nothing'),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_tokenizer_is_an_error(tmp_path, kind):
    write, message = BROKEN[kind]
    write(tmp_path)
    with pytest.raises(PhotonError, match=message):
        load_tokenizer(tmp_path)


def test_files_that_do_not_fit_together_are_an_error(trained, tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", trained)
    (folder / "vocab.json").write_text('{"<|endoftext|>": 0}')
    with pytest.raises(PhotonError, match=r"to nothing|can be used"):
        load_tokenizer(folder)
    with pytest.raises(PhotonError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
