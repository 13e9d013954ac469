import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from photon.data.documents import Document
from photon.data.prepare import prepare_documents
from photon.data.text_lost import check_lost
from photon.data.tokenizer import load_tokenizer, train_tokenizer
from photon.errors import PhotonError

SMALL = {"sequence_length": 16, "validation_fraction": 0.2}


@pytest.fixture
def load(corpus, tmp_path):
    """Return a function that trains a tokenizer on the silo "low" and loads it as a given one."""

    def make(tokenizer: Tokenizer, trainer):
        tokenizer.train_from_iterator([document.text for document in corpus["low"]], trainer)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(tmp_path / "tokenizer.json")

    return make


def characters(load, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return load(tokenizer, trainers.BpeTrainer(vocab_size=200, show_progress=False))


def test_what_a_byte_level_tokenizer_loses_is_nothing(corpus):
    tokenizer = train_tokenizer([document.text for document in corpus["low"]], 300)
    odd = [Document("odd", "Gr\u00fc\u00dfe \u4f60\u597d \U0001f642 <|endoftext|>\r\n\tx")]
    assert check_lost(tokenizer, {**corpus, "odd": odd}, 0.0) == {"low": 0.0, "high": 0.0, "odd": 0.0}


def test_the_share_is_that_of_the_characters_that_are_gone(load, corpus):
    tokenizer = characters(load)
    draw = random.Random(0)
    texts = [document.text.replace("\n", " ") for document in corpus["low"]]
    spoilt = ["".join("\u00fc" if draw.random() < 0.1 else char for char in text) for text in texts]
    gone = sum(text.count("\u00fc") for text in spoilt) / sum(map(len, spoilt))
    shares = check_lost(
        tokenizer,
        {"whole": [Document("", text) for text in texts], "spoilt": [Document("", text) for text in spoilt]},
        1.0,
    )
    assert shares["whole"] == 0.0
    # Of both texts, 2 (n - gone n) / (n + n - gone n) agree.
    assert shares["spoilt"] == pytest.approx(gone / (2 - gone), rel=0.05)


def test_lower_case_and_unknown_words_are_lost_text(load, corpus):
    upper = {"a": [Document("", document.text.upper()) for document in corpus["low"]]}
    assert check_lost(characters(load, normalizers.Lowercase()), upper, 1.0)["a"] > 0.5
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown = load(words, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    assert check_lost(unknown, {"high": corpus["high"]}, 1.0)["high"] > 0.5


def test_a_silo_whose_text_is_lost_is_named_and_told_how_to_go_on(load, corpus, tmp_path):
    characters(load)
    options = {"tokenizer": tmp_path / "tokenizer.json", **SMALL}
    corpus = {
        name: [Document(document.source, document.text.replace("\n", " ")) for document in documents]
        for name, documents in corpus.items()
    }
    with pytest.raises(PhotonError, match=r"loses \d+\.\d% of the text of silo 'high' \('.*' comes back as"):
        prepare_documents(corpus, tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()
    mixed = {"mixed": [*corpus["low"], *corpus["high"][:4]]}
    with pytest.raises(PhotonError, match="silo 'mixed'") as caught:
        prepare_documents(mixed, tmp_path / "data", **options)
    told = float(str(caught.value).rsplit("--tokenizer-loss ", 1)[1])
    manifest = prepare_documents(mixed, tmp_path / "data", tokenizer_loss=told, **options)
    assert told - 0.02 <= manifest.silos["mixed"].text_lost <= told
