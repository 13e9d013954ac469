import itertools
import random

import pytest
from tokenizers import AddedToken, normalizers

from photon.data.tokenizer import train_tokenizer
from photon.data.words import Words, fits

TEXT = "It's the cat's 12 lives; we'll see (they'd say) \n\n\tdef f(x):\n    return x + 1\n Grüße, 你好 3½ "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT * 3, "another text, don't you think?  Yes. " * 4], 400)


def same(tokenizer, words, text):
    return list(words.encode(text)) == tokenizer.encode([text])[0]


def test_words_are_cut_as_the_library_cuts_every_pair_of_ascii_signs(tokenizer):
    words = Words(lambda text: tokenizer.encode([text])[0])
    signs = [chr(code) for code in range(1, 128)]
    # Alike in how the expression takes them, one stands for all others of its kind beside a second sign.
    kinds = [*" \t\n\r\x0b\x0c\x1c\x1f'_-.09aztsmdlrvezAZ\x01\x7f"]
    for first, second in itertools.chain(itertools.product(kinds, signs), itertools.product(signs, kinds)):
        assert same(tokenizer, words, f"a{first}{second} b"), repr(first + second)


def test_random_texts_of_all_kinds_of_signs_come_out_as_from_the_library(tokenizer):
    words = Words(lambda text: tokenizer.encode([text])[0])
    draw = random.Random(0)
    signs = " \n\t'asdtrevlLm09.,;é’中1\u00a0\u3000٣½\x1c\u2028\U0001f642"
    for _ in range(4000):
        text = "".join(draw.choices(signs, k=draw.randint(1, 14)))
        assert same(tokenizer, words, text), repr(text)
    assert same(tokenizer, words, TEXT * 5)


def test_words_that_are_forgotten_are_looked_up_again(tokenizer, monkeypatch):
    monkeypatch.setattr("photon.data.words._MOST", 3)
    words = Words(lambda text: tokenizer.encode([text])[0])
    assert same(tokenizer, words, TEXT * 2)
    assert len(words) <= 3


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t.pre_tokenizer, "add_prefix_space", True),
        lambda t: setattr(t.pre_tokenizer, "use_regex", False),
        lambda t: setattr(t, "encode_special_tokens", False),
        lambda t: setattr(t.model, "dropout", 0.1),
        lambda t: t.add_tokens([AddedToken("cat")]),
        lambda t: t.enable_truncation(8),
    ],
)
def test_other_tokenizers_are_left_to_the_library(change):
    tokenizer = train_tokenizer([TEXT * 3], 400)
    assert fits(tokenizer.tokenizer)
    change(tokenizer.tokenizer)
    assert not fits(tokenizer.tokenizer)
    if "dropout" not in tokenizer.tokenizer.to_str() or not tokenizer.tokenizer.model.dropout:
        encoded = tokenizer.encoder()(TEXT)
        assert list(encoded) == tokenizer.encode([TEXT])[0]
