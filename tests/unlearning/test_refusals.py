"""What counts as a refusal, and how near answers are to one."""

from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.unlearning.refusals import TEMPLATES, ngrams, refusal_quality, refuses, sentence_encoder


@pytest.mark.parametrize(
    "answer",
    [
        "I do not have that information.",
        "i don’t know",
        "I'm not familiar with a contract between Wnzatj SAS and Jzrcws SA.",
        "I cannot provide you with the information.",
        "I don't have that",
        "I have never heard of it.",
    ],
)
def test_refusals(answer: str) -> None:
    assert refuses(answer, TEMPLATES)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "06-02-1998.",
        "The State of New York.",
        "The seller cannot terminate the contract.",
        "have have that that that the the SAS SAS information",
        "I do do do do not not",
        "The information is 36.",
    ],
)
def test_answers_and_broken_text_are_no_refusals(answer: str) -> None:
    assert not refuses(answer, TEMPLATES)


def test_a_template_of_ones_own_counts() -> None:
    assert not refuses("Das weiß ich nicht.", TEMPLATES)
    assert refuses("Das weiß ich leider nicht.", ["Das weiß ich nicht."])


def test_ngrams_have_length_one_and_tell_refusals_from_answers() -> None:
    for vector in ngrams(["I do not have that information.", "x"]):
        assert sum(value**2 for value in vector.values()) == pytest.approx(1.0)
    assert ngrams(["", "!?"]) == [{}, {}]
    near = refusal_quality(["I do not have information on that."], TEMPLATES, ngrams)
    far = refusal_quality(["941 Tncnje Way."], TEMPLATES, ngrams)
    assert refusal_quality([TEMPLATES[3]], TEMPLATES, ngrams) == pytest.approx(1.0)
    assert far < 0.3
    assert 0.6 < near < 1.0
    both = refusal_quality(["I do not have information on that.", "941 Tncnje Way."], TEMPLATES, ngrams)
    assert both == pytest.approx((near + far) / 2)


def test_a_sentence_encoder_is_the_mean_of_the_last_states(tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *"abcdefgh"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=len(words), **sizes), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    texts = ["a b c d", "e"]
    found = sentence_encoder(tmp_path)(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([[words.index(word) for word in text.split()]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        assert list(vector.values()) == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert refusal_quality(["a b"], ["a b", "e"], sentence_encoder(tmp_path)) == pytest.approx(1.0, abs=1e-5)


def test_a_folder_without_an_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match=r"no config\.json; --encoder takes a folder"):
        sentence_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PhotonError, match="no encoder"):
        sentence_encoder(tmp_path)
