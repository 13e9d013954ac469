"""What was trained, what is exported, and what tools make of a prompt: the same tokens."""

import json
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GenerationMixin, pipeline

from photon.config.schema import RunConfig
from photon.data.documents import Document
from photon.data.prepare import prepare_documents
from photon.data.prepared import PreparedData
from photon.data.tokenizer import load_tokenizer
from photon.evaluation.export import export_model
from photon.evaluation.generate import generate_text
from photon.evaluation.load import TrainedModel, check_tokenizer
from photon.models.build import build_model
from photon.serving.model import ServedModel, Settings
from photon.training.groups import read_params

PROMPTS = ["the text", " a space first", "Grüße, 世界!", "two  spaces\n\nand lines\n", "x"]
CONFIG = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}


def byte_level(add_prefix_space: bool = False, dropout: float | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(dropout=dropout))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trained(tokenizer, trainers.BpeTrainer, initial_alphabet=alphabet)


def trained(tokenizer: Tokenizer, trainer: Any, **options: Any) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    texts = [*PROMPTS, "the text of a text " * 9, *map(str, range(400))]
    maker = trainer(vocab_size=700, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(texts * 3, maker)
    return tokenizer


def template(tokenizer: Tokenizer, form: str) -> Tokenizer:
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    return tokenizer


def dropout_and_bos() -> tuple[Tokenizer, dict[str, Any]]:
    return template(byte_level(dropout=0.3), "<s> $A"), CONFIG


def prefix_space_of_its_configuration() -> tuple[Tokenizer, dict[str, Any]]:
    return byte_level(), {"eos_token": "</s>", "add_prefix_space": True, "tokenizer_class": "GPT2Tokenizer"}


def pieces_and_eos() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trained(tokenizer, trainers.UnigramTrainer, unk_token="<unk>")
    return template(tokenizer, "$A </s>"), CONFIG


def bytes_where_it_knows_nothing() -> tuple[Tokenizer, dict[str, Any]]:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(plain)
    trained(tokenizer, trainers.BpeTrainer, initial_alphabet=[f"<0x{byte:02X}>" for byte in range(256)])
    content = json.loads(tokenizer.to_str())
    known = content["model"]["vocab"]
    for byte in range(256):
        known.setdefault(f"<0x{byte:02X}>", len(known))
    return template(Tokenizer.from_str(json.dumps(content)), "<s> $A"), {**CONFIG, "add_bos_token": True}


@pytest.fixture(
    params=[
        *(dropout_and_bos, prefix_space_of_its_configuration),
        *(pieces_and_eos, bytes_where_it_knows_nothing),
    ]
)
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Hugging Face folder with a tokenizer."""
    tokenizer, config = request.param()
    folder = tmp_path / "given"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def data(given: Path, tmp_path: Path) -> PreparedData:
    documents = [Document(str(number), f"{PROMPTS[number % 5]} {number}") for number in range(400)]
    prepare_documents(
        {"a": documents},
        tmp_path / "data",
        tokenizer=given,
        sequence_length=16,
        validation_fraction=0.3,
        near_duplicates="none",
    )
    return PreparedData.open(tmp_path / "data")


@pytest.fixture
def export(data: PreparedData, small_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    section, size = small_config().model, data.manifest.vocab_size
    params = read_params(build_model(section, size, seed=0))
    export_model(params, section, size, data.tokenizer_path, tmp_path / "export", {})
    return tmp_path / "export"


def test_every_tool_makes_the_tokens_that_were_trained(
    data: PreparedData, given: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load_tokenizer(given).encode(PROMPTS)
    assert load_tokenizer(given).encode(PROMPTS) == wanted, "no chance is left"
    # What was trained: the documents' tokens and ends, and nothing between them.
    exported = AutoTokenizer.from_pretrained(export)
    # A window's last token is the first of the next.
    windows = np.concatenate(
        [data.windows("a", split)[:, :-1].flatten() for split in ("train", "validation")]
    )
    ends = np.flatnonzero(windows == exported.eos_token_id)
    found = [windows[a + 1 : b].tolist() for a, b in pairwise(ends)]
    texts = [f"{PROMPTS[number % 5]} {number}" for number in range(400)]
    known = [exported(text)["input_ids"] for text in texts]
    assert sum(ids in known for ids in found) >= len(found) - 1  # one pair lies across train and validation
    assert len(found) > 380
    # lm-eval, which asks for special tokens with add_bos_token alone, and the pipeline.
    assert [exported.encode(text, add_special_tokens=False) for text in PROMPTS] == wanted
    assert [exported.encode(text, add_special_tokens=True) for text in PROMPTS] == wanted
    generator = pipeline("text-generation", model=str(export), device="cpu")
    assert [generator.preprocess(text)["input_ids"][0].tolist() for text in PROMPTS] == wanted
    # photon generate
    asked: list[list[int]] = []

    def generate(self: object, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        asked.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    for text in PROMPTS:
        generate_text(export, text)
    assert asked == wanted


@pytest.mark.few(2)
def test_an_answer_in_pieces_is_the_text_in_one(export: Path) -> None:
    """Where pieces meet, and where they follow the prompt, no space is lost."""
    model = ServedModel(export, torch.device("cpu"))
    compared = 0
    for prompt, seed in product(PROMPTS, range(4)):
        ids = model.encode(prompt)
        answer = "".join(model.answer(ids, Settings(most=3, top_k=50, temperature=0.8, seed=seed)))
        whole = generate_text(export, prompt, max_new_tokens=3, seed=seed)
        if "\ufffd" not in whole:  # bytes that are no text: what comes of them depends on those that follow
            assert model.tokenizer.decode(ids) + answer == whole
            compared += 1
    assert compared


def test_the_given_tokenizer_is_known_as_the_one_of_the_data(data: PreparedData, given: Path) -> None:
    check_tokenizer(TrainedModel(None, "given", "0" * 64, given / "tokenizer.json"), data)  # type: ignore[arg-type]


def test_prepared_with_its_own_output_it_is_the_same_to_the_byte(
    data: PreparedData, given: Path, tmp_path: Path
) -> None:
    load_tokenizer(data.tokenizer_path).save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (data.tokenizer_path / name).read_bytes()
