import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast

from photon.data.tokenizer import load_tokenizer, train_tokenizer
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
