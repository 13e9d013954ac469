"""Whatever causal language model transformers has, server, silos and transformers itself compute the same."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from photon.config.compose import compose
from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.evaluation.export import export_model
from photon.models.build import build_model, self_contained
from photon.models.flops import model_flops_per_token
from photon.models.loss import causal_loss
from photon.models.pretrained import load_pretrained, quiet_transformers
from photon.training.groups import kept_names, read_params, write_params
from tests.models.causal_types import LENGTH, SKIPPED, VOCABULARY, save

#: Tokens of the tokenizer, fewer than rows of the embedding: the last row may be a type's padding.
TOKENS = VOCABULARY - 8

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

#: One type of each kind; the others take a minute more (``pytest -m slow``).
SAMPLE = [
    "apertus",
    "bailing_hybrid",
    "bart",
    "big_bird",
    "blt",
    "cwm",
    "dbrx",
    "deepseek_v4",
    "ernie4_5_moe",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "granitemoe_swa",
    "kimi_linear",
    "llama",
    "longcat_flash",
    "mamba2",
    "modernbert-decoder",
    "nemotron_h",
    "qwen3_moe",
    "reformer",
    "roberta",
    "roformer",
    "xlm",
    "zamba2",
]

#: Types that transformers itself does not read by the other names of their fields.
ONE_NAME = ["dbrx"]

CASES = [
    pytest.param(one, marks=[] if one in SAMPLE else pytest.mark.slow) for one in TYPES if one not in SKIPPED
]


@pytest.fixture(scope="module")
def section() -> ModelSection:
    overrides = ["model=custom", f"model.sequence_length={LENGTH}", "model.recipe.warmup_steps=1"]
    return compose(overrides).model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {f"w{token}": token for token in range(TOKENS)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    # From 5 on, because the first ids are the padding of some types.
    return torch.randint(5, TOKENS, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=draw((2, LENGTH), 2), use_cache=False).logits


def same(one: Tensor, other: Tensor) -> bool:
    # Where tensors lie in memory may change the last bit.
    return torch.allclose(one, other, rtol=0, atol=2e-6)


def of_transformers(folder: Path) -> Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def by_other_names(folder: Path) -> bool:
    """Write each field of a saved configuration under its other name; return whether one has another."""
    path = folder / "config.json"
    written = json.loads(path.read_text())
    aliases = {kept: alias for alias, kept in CONFIG_MAPPING[written["model_type"]].attribute_map.items()}
    renamed = {aliases.get(name, name): value for name, value in written.items()}
    path.write_text(json.dumps(renamed))
    return renamed != written


@pytest.mark.few(8)
@pytest.mark.parametrize("model_type", CASES)
def test_server_silo_and_transformers_compute_the_same(
    model_type: str, section: ModelSection, tokenizer: Path, tmp_path: Path
) -> None:
    with quiet_transformers():
        folder = tmp_path / "saved"
        save(model_type, folder)
        expected = of_transformers(folder)
        warm = section.model_copy(update={"warm_start": str(folder)})
        server = build_model(warm, TOKENS, seed=0)
        assert same(logits(server), expected)

        travelling = ModelSection.model_validate_json(self_contained(warm, TOKENS).model_dump_json())
        assert travelling.warm_start is travelling.config_file is None
        silo = build_model(travelling, TOKENS, seed=5)
        write_params(silo, read_params(server))
        assert same(logits(silo), expected)
        on_meta = build_model(travelling, TOKENS, seed=0, device="meta")
        assert kept_names(server) == kept_names(silo) == kept_names(on_meta)

        loss = causal_loss(silo.train(), draw((2, LENGTH), 3))
        loss.backward()
        assert torch.isfinite(loss)
        assert model_flops_per_token(silo, LENGTH) > 0

        exported = tmp_path / "exported"
        export_model(read_params(server), travelling, TOKENS, tokenizer, exported, {})
        assert same(of_transformers(exported), expected)
        assert same(logits(load_pretrained(exported)), expected)

        if model_type not in ONE_NAME and by_other_names(folder):
            other = of_transformers(folder)
            assert same(logits(build_model(warm, TOKENS, seed=0)), other)
            silo = build_model(self_contained(warm, TOKENS), TOKENS, seed=6)
            write_params(silo, read_params(build_model(warm, TOKENS, seed=0)))
            assert same(logits(silo), other)


def test_every_type_is_tried() -> None:
    assert set(SAMPLE) < set(TYPES)
    assert set(SKIPPED) < set(TYPES)
    assert len(SKIPPED) < 20


@pytest.mark.parametrize("model_type", SKIPPED)
def test_a_type_that_is_left_out_is_refused_by_name(
    model_type: str, section: ModelSection, tmp_path: Path
) -> None:
    assert model_type in TYPES
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": model_type}))
    chosen = section.model_copy(update={"config_file": str(file)})
    with pytest.raises(PhotonError, match=f"{model_type} is not a text model by itself"):
        build_model(chosen, TOKENS, seed=0, device="meta")
