"""LoRA against an adapter written by hand, and what peft and transformers make of an export."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from photon.config.adapter import AdapterSection
from photon.errors import PhotonError
from photon.models.abbie import AbbieGPT2Config, AbbieLlamaConfig
from photon.models.adapter import add_adapter, merge_adapter, save_adapter, without_adapter
from photon.models.flops import model_flops_per_token
from photon.models.pretrained import load_pretrained
from photon.training.groups import kept_names, read_params
from tests.models.lora_by_hand import put_by_hand, trainable

SMALLEST = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, Any] = {
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2),
    "llama": LlamaConfig(**SMALLEST, intermediate_size=24),
    "llama-tied": LlamaConfig(**SMALLEST, intermediate_size=24, tie_word_embeddings=True),
    "mixtral": MixtralConfig(
        **SMALLEST, intermediate_size=24, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1
    ),
    "abbie_gpt2": AbbieGPT2Config(**SMALLEST, head_blocks=0, body_blocks=1, tail_blocks=1),
    "abbie_llama": AbbieLlamaConfig(
        **SMALLEST, intermediate_size=24, head_blocks=0, body_blocks=1, tail_blocks=1
    ),
}
SECTION = AdapterSection(rank=3, alpha=12)


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(KINDS[kind])
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config)


def with_stated_b(model: Any, section: AdapterSection = SECTION) -> Any:
    """Put adapters to a model, and numbers in the place of B's zeros: with these A would have no gradient."""
    add_adapter(model, section, seed=5)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                assert not parameter.any()
                parameter.normal_(0, 0.1, generator=draw)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_are_those_of_an_adapter_by_hand(kind: str) -> None:
    ours, theirs = with_stated_b(model_of(kind)), model_of(kind)
    initial = {name: tensor.clone() for name, tensor in read_params(ours).items()}
    by_hand = put_by_hand(theirs, initial, 12 / 3)
    tokens = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(trainable(model), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    trained = read_params(ours)
    for name, tensor in by_hand.items():
        assert torch.allclose(trained[name], tensor, rtol=0, atol=2e-6), name
        assert not torch.allclose(initial[name], tensor, rtol=0, atol=1e-3), name
    for name in kept_names(ours):
        assert torch.equal(trained[name], initial[name]), name
    assert kept_names(ours) == {name for name in trained if ".lora_" not in name}


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_model_was_and_merges_to_what_it_became(kind: str) -> None:
    plain, tokens = model_of(kind).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert torch.equal(
            add_adapter(model_of(kind), SECTION, seed=1).eval()(input_ids=tokens).logits, expected
        )
        adapted = with_stated_b(model_of(kind)).eval()
        logits = adapted(input_ids=tokens).logits
        assert not torch.allclose(logits, expected, atol=1e-2)
        merged = merge_adapter(copy.deepcopy(adapted))
        assert torch.allclose(merged(input_ids=tokens).logits, logits, rtol=0, atol=1e-5)
    assert set(read_params(merged)) == set(read_params(plain))
    assert type(merged) is type(plain)
    back, adapters = without_adapter(adapted)
    assert all(torch.equal(tensor, read_params(plain)[name]) for name, tensor in read_params(back).items())
    assert len(adapters) == 2 * sum(".lora_A." in name for name in adapters) > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "abbie_llama"])
def test_peft_and_transformers_read_what_is_kept(kind: str, tmp_path: Any) -> None:
    adapted, tokens = with_stated_b(model_of(kind)).eval(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        logits = adapted(input_ids=tokens).logits
        model, adapters = without_adapter(adapted)
        model.save_pretrained(tmp_path)
        save_adapter(tmp_path, model, SECTION, adapters)
        readers: dict[str, Callable[[], Any]] = {
            "photon": lambda: load_pretrained(tmp_path),
            "transformers": lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
            "peft": lambda: PeftModel.from_pretrained(model_of(kind), tmp_path),
        }
        for reader, read in readers.items():
            assert torch.allclose(read().eval()(input_ids=tokens).logits, logits, rtol=0, atol=1e-5), reader
    assert set(read_params(load_pretrained(tmp_path))) == set(read_params(model_of(kind)))


def test_initial_values_are_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one, same, other = (read_params(add_adapter(model_of("gpt2"), SECTION, seed=seed)) for seed in (1, 1, 2))
    name = "transformer.h.0.attn.c_attn.lora_A.default.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    add_adapter(copy.deepcopy(PLAIN), SECTION, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(state, before)


PLAIN = model_of("gpt2")


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        (
            "gpt2",
            ["c_atn"],
            "no linear layer of this gpt2; did you mean 'c_attn'?; it has c_attn, c_fc, c_proj, lm_head",
        ),
        (
            "llama",
            ["q_proj", "c_attn"],
            "'c_attn' is no linear layer of this llama; it has down_proj, gate_proj",
        ),
        ("gpt2", ["wte"], "'wte' is no linear layer"),
        ("gpt2", ["lm_head"], "lm_head shares its matrix with another layer"),
        ("llama-tied", ["q_proj", "lm_head"], "lm_head shares its matrix"),
    ],
)
def test_targets_that_make_no_sense(kind: str, targets: list[str], expected: str) -> None:
    with pytest.raises(PhotonError, match=r"adapter.target_modules: ") as refusal:
        add_adapter(model_of(kind), AdapterSection(target_modules=targets), seed=0)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_output_layer_of_its_own_may_have_one() -> None:
    model = add_adapter(model_of("llama"), AdapterSection(target_modules=["lm_head"]), seed=0)
    assert {n for n in read_params(model) if ".lora_" in n} == {
        "lm_head.lora_A.default.weight",
        "lm_head.lora_B.default.weight",
    }


def test_the_same_names_and_shapes_without_memory() -> None:
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(KINDS["llama"])
    meta = add_adapter(meta, SECTION, seed=0)
    real = add_adapter(model_of("llama"), SECTION, seed=0)
    assert all(tensor.is_meta for tensor in read_params(meta).values())
    shapes = [{n: t.shape for n, t in read_params(model).items()} for model in (meta, real)]
    assert shapes[0] == shapes[1]


def test_frozen_parameters_cost_no_gradient() -> None:
    plain, adapted = model_of("llama"), add_adapter(model_of("llama"), SECTION, seed=0)
    frozen = sum(p.numel() for p in plain.parameters())
    own = sum(p.numel() for p in adapted.parameters()) - frozen
    expected = model_flops_per_token(plain, 8) - 2 * frozen + 6 * own
    assert model_flops_per_token(adapted, 8) == expected


def test_without_peft_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = model_of("gpt2")
    model.save_pretrained(tmp_path)
    save_adapter(tmp_path, *_kept(model))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PhotonError, match=r"^adapter: needs peft .*pip install 'photon-fl\[tune\]'$"):
        add_adapter(model_of("gpt2"), SECTION, seed=0)
    with pytest.raises(PhotonError, match=r"adapter_config.json: needs peft"):
        load_pretrained(tmp_path)


def _kept(model: Any) -> tuple[Any, AdapterSection, dict[str, Tensor]]:
    plain, adapters = without_adapter(add_adapter(model, SECTION, seed=0))
    return plain, SECTION, adapters
