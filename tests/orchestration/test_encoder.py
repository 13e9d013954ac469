"""Vectors of texts: the same everywhere, in unit length, near where texts are alike."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from photon.errors import PhotonError
from photon.orchestration.encoder import NGrams, encoder_of
from photon.orchestration.method import EncoderSection

TEXTS = ["12", "21", "Lima", "La Paz", "lima ", "", "A" * 30_000]


def test_ngrams_are_of_unit_length_and_the_same_everywhere() -> None:
    encode = NGrams(16)
    vectors = encode(TEXTS)
    assert vectors.shape == (7, 16)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(7))
    assert torch.equal(vectors, encode(TEXTS))
    assert torch.equal(vectors[2], vectors[4])
    # Computed by hand from the checksums of the grams of "a" between its ends: these values may never change.
    assert sorted(NGrams(8)(["a"])[0].nonzero()[:, 0].tolist()) == sorted(
        by_hand("a", 8).nonzero()[:, 0].tolist()
    )
    assert torch.allclose(NGrams(8)(["ab"])[0], by_hand("ab", 8))


def by_hand(text: str, size: int) -> Tensor:
    framed = "\x02" + text + "\x03"
    grams = {framed[i:j] for i in range(len(framed)) for j in range(i + 1, min(i + 4, len(framed)) + 1)}
    made = torch.zeros(size)
    for gram in grams - {"\x02", "\x03"}:
        code = crc32(gram.encode())
        made[(code // 2) % size] += 1.0 if code % 2 else -1.0
    return made / made.norm()


def crc32(data: bytes) -> int:
    """The polynomial of IEEE 802.3, bit by bit."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0xEDB88320 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_other_answers_are_further_away_than_other_spellings() -> None:
    encode = NGrams(384)

    def near(one: str, other: str) -> float:
        vectors = encode([one, other])
        return float(vectors[0] @ vectors[1])

    assert near("La Paz", "la  paz") == pytest.approx(1.0)
    assert near("12", "21") < 0.6
    assert near("Lima", "Quito") < 0.3


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A sentence encoder that has learnt nothing, in the form of a real one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lima", "quito", "the", "answer", "is"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_sentence_encoder_is_the_mean_of_its_states(sentences: Path) -> None:
    encode = encoder_of(EncoderSection(kind="minilm", folder=str(sentences)))
    assert encode.size == 16
    texts = ["lima", "the answer is quito"]
    vectors = encode(texts)
    model = BertModel.from_pretrained(sentences).eval()
    tokenizer = BertTokenizerFast.from_pretrained(sentences)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = states.mean(0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)


def test_a_folder_that_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match=r"has no config.json"):
        encoder_of(EncoderSection(kind="minilm", folder=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PhotonError, match="cannot be opened") as raised:
        encoder_of(EncoderSection(kind="minilm", folder=str(tmp_path)))
    assert "\n" not in str(raised.value)
