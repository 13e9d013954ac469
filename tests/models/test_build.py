import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from photon.config.compose import compose
from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.models.build import build_model, parameter_count, self_contained, transformers_config
from photon.models.fields import written
from photon.models.loss import causal_loss
from photon.models.pretrained import positions_of
from photon.training.schedule import WsdSchedule, build_schedule

VOCABULARY = 300

#: The sizes that the Photon papers state.
PAPER = {
    "photon-75m": 74_985_344,
    "photon-125m": 125_311_488,
    "photon-350m": 355_985_408,
    "photon-1.3b": 1_315_950_592,
    "photon-3b": 2_651_837_440,
    "photon-7b": 6_658_859_008,
    "photon-13b": 12_853_954_560,
}


def preset(name: str, *overrides: str) -> ModelSection:
    return compose([f"model={name}", *overrides]).model


def small(**architecture: Any) -> ModelSection:
    tiny = preset("tiny")
    assert tiny.architecture is not None
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "initializer_range": 0.02} | architecture
    return tiny.model_copy(update={"architecture": tiny.architecture | shape, "sequence_length": 16})


def from_file(path: Path, fields: Any, **changes: Any) -> ModelSection:
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    update = {"config_file": str(path), "sequence_length": 16} | changes
    return preset("custom").model_copy(update=update)


LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_presets_have_the_papers_sizes(name: str) -> None:
    section = preset(name)
    model = build_model(section, VOCABULARY, seed=0, device="meta")
    config = model.config
    d, layers, rows, positions = config.hidden_size, config.num_hidden_layers, config.vocab_size, 2048
    if name == "photon-75m":
        positions = 1024
    formula = 12 * d * d * layers + rows * d + positions * d + 13 * d * layers + 2 * d
    assert parameter_count(model) == PAPER[name] == formula
    assert rows == 50_368
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert config._attn_implementation == "sdpa"
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-135m", 135), ("llama-720m", 720), ("llama-1.7b", 1714)]
)
def test_llama_shaped_presets_have_the_size_in_their_name(name: str, millions: int) -> None:
    section = preset(name)
    config = transformers_config(section, VOCABULARY)
    d, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = d * config.num_key_value_heads // heads
    block = 2 * d * d + 2 * d * keys + 3 * d * hidden + 2 * d
    expected = block * config.num_hidden_layers + config.vocab_size * d + d
    count = parameter_count(build_model(section, VOCABULARY, seed=0, device="meta"))
    assert count == expected
    assert round(count / 1e6) == millions
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}


def test_the_quickstart_model_is_small() -> None:
    model = build_model(preset("tiny"), 8192, seed=0, device="meta")
    embeddings = (8192 + 128) * model.config.hidden_size
    assert 1_000_000 < parameter_count(model) - embeddings < 1_500_000


@pytest.mark.parametrize(("tokens", "rows"), [(257, 320), (320, 320), (8192, 8192), (8193, 8256)])
def test_the_vocabulary_is_padded_to_a_multiple_of_64(tokens: int, rows: int) -> None:
    assert transformers_config(small(), tokens).vocab_size == rows


def test_weights_depend_on_the_seed_alone() -> None:
    first = build_model(small(), VOCABULARY, seed=1)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = build_model(small(), VOCABULARY, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    other = build_model(small(), VOCABULARY, seed=2)
    weights = [list(model.parameters()) for model in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}


def test_residual_projections_start_smaller() -> None:
    model = build_model(small(n_layer=8, n_embd=64), VOCABULARY, seed=0)
    block = model.transformer.h[0]
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 16**0.5, rel=0.05)


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_causal_loss_is_the_loss_of_transformers(shape: str, tmp_path: Path) -> None:
    section = small() if shape == "gpt2" else from_file(tmp_path / "config.json", LLAMA)
    model = build_model(section, VOCABULARY, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform predictions, so that a wrong shift would show
    tokens = torch.randint(0, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0))
    expected = model(tokens, labels=tokens).loss
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = causal_loss(model, tokens)
    (2 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        scale = float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=0, atol=2e-5 * scale)


def test_causal_loss_survives_a_probability_of_zero() -> None:
    class Certain(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., 0] = 500.0  # exp(-500) is zero in float32
            return type("Output", (), {"logits": logits.requires_grad_()})

    assert causal_loss(Certain(), torch.tensor([[0, 1, 0]])).item() == pytest.approx(250.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layers": 3}, "model.architecture.n_layers: unknown field; did you mean 'n_layer'?"),
        ({"model_type": "gtp2"}, "'gtp2' is no causal language model of transformers; did you mean 'gpt2'?"),
        ({"n_head": 3}, "must be divisible by num_heads"),
        ({"n_embd": "wide"}, "gpt2 refuses it (Validation error for field 'n_embd'"),
        ({"n_embd": -16}, "negative dimension"),
        ({"activation_function": "gelo"}, "gelo"),
        ({"vocab_size": 300}, "set model.vocab_size instead"),
        ({"n_positions": 8}, "model.sequence_length=16: model.architecture has only 8 positions"),
        ({"model_type": "gemma3"}, "name the type of its text part"),
    ],
)
def test_a_wrong_architecture_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PhotonError) as caught:
        build_model(small(**change), VOCABULARY, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 200}, "a vocabulary of 200 is smaller than the tokenizer, which has 300 entries"),
        ({"architecture": None}, "no architecture"),
        ({"config_file": "x.json"}, "use model=custom"),
        ({"architecture": None, "config_file": "missing.json"}, "missing.json: cannot read it"),
        ({"warm_start": "missing"}, "missing: no such folder"),
    ],
)
def test_a_wrong_section_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        build_model(small().model_copy(update=change), VOCABULARY, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected a JSON object"),
        ({}, "model_type=None"),
        ({"model_type": "gpt2", "n_embed": 16}, "unknown field 'n_embed'; did you mean 'n_embd'?"),
        (LLAMA | {"max_position_embeddings": 8}, "has only 8 positions"),
    ],
)
def test_a_wrong_config_file_is_named(fields: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(PhotonError) as caught:
        build_model(from_file(path, fields), VOCABULARY, seed=0)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 5e5, "vocab_size": 32_000, "pad_token_id": 7},
        {"model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
        {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
        {"model_type": "bloom", "hidden_size": 16, "n_head": 2, "n_layer": 1},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_a_file_of_any_kind_gives_a_causal_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(from_file(tmp_path / "config.json", fields), VOCABULARY, seed=0).eval()
    assert model.config.vocab_size == 320
    assert model.dtype == torch.float32
    tokens = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, -1] += 1
    logits = model(tokens).logits
    torch.testing.assert_close(logits[:, :-1], model(changed).logits[:, :-1])
    assert not torch.allclose(logits[:, -1], model(changed).logits[:, -1])


MAMBA = {
    "model_type": "mamba2",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "state_size": 4,
    "num_heads": 4,
    "head_dim": 8,
    "n_groups": 1,
    "chunk_size": 8,
}


@pytest.mark.parametrize("infinity", [{"__float__": "Infinity"}, float("inf")], ids=["tagged", "plain"])
def test_an_infinity_is_one_wherever_it_comes_from(infinity: Any, tmp_path: Path) -> None:
    fields = MAMBA | {"time_step_limit": [0.125, infinity]}
    file = from_file(tmp_path / "config.json", fields)
    for section in (file, ModelSection.model_validate(file.model_dump() | stated(fields))):
        travelling = ModelSection.model_validate_json(self_contained(section, VOCABULARY).model_dump_json())
        for one in (section, travelling):
            assert tuple(transformers_config(one, VOCABULARY).time_step_limit) == (0.125, float("inf"))


def stated(fields: dict[str, Any]) -> dict[str, Any]:
    return {"config_file": None, "architecture": fields}


def test_a_field_of_another_name_and_a_foreign_one_travel(tmp_path: Path) -> None:
    # transformers writes num_experts as num_local_experts, and keeps what it does not know.
    fields = {"model_type": "qwen3_moe", "num_local_experts": 6, "num_experts_per_tok": 3, "some_note": 7}
    section = from_file(tmp_path / "config.json", fields | {"num_hidden_layers": 1, "hidden_size": 16})
    travelling = self_contained(section, VOCABULARY)
    config = transformers_config(travelling, VOCABULARY)
    assert (config.num_experts, config.num_experts_per_tok, config.some_note) == (6, 3, 7)
    fetching = from_file(tmp_path / "config.json", LLAMA | {"auto_map": {"AutoConfig": "code.Config"}})
    assert "auto_map" not in (self_contained(fetching, VOCABULARY).architecture or {})


def test_what_a_silo_would_build_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = from_file(tmp_path / "config.json", LLAMA | {"rms_norm_eps": 0.5})

    def forgetful(config: Any) -> dict[str, Any]:
        return {name: value for name, value in written(config).items() if name != "rms_norm_eps"}

    monkeypatch.setattr("photon.models.build.written", forgetful)
    with pytest.raises(PhotonError, match="does not read rms_norm_eps of a llama as it writes it"):
        self_contained(section, VOCABULARY)


def test_padding_that_a_type_needs_is_no_token_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    reformer = transformers_config(from_file(file, {"model_type": "reformer"}), VOCABULARY)
    assert reformer.pad_token_id == 319  # 300 tokens, 320 rows
    # Positions begin behind the padding's id.
    roberta = {"model_type": "roberta", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    section = from_file(file, roberta | {"pad_token_id": 3})
    model = build_model(section, VOCABULARY, seed=0)
    assert model.config.max_position_embeddings == 16 + 4
    assert model(torch.arange(100, 116)[None]).logits.shape == (1, 16, 320)
    with pytest.raises(PhotonError, match="has only 15 positions"):
        build_model(from_file(file, roberta | {"max_position_embeddings": 17}), VOCABULARY, seed=0)
    assert transformers_config(from_file(file, LLAMA), VOCABULARY).pad_token_id is None


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("origin", ["preset", "file", "warm start"])
def test_a_self_contained_section_builds_the_same_model(origin: str, tmp_path: Path) -> None:
    section = small()
    if origin == "file":
        section = from_file(tmp_path / "config.json", LLAMA | {"rope_theta": 5e5})
    if origin == "warm start":
        build_model(section, VOCABULARY, seed=3).save_pretrained(tmp_path)
        section = section.model_copy(update={"architecture": None, "warm_start": str(tmp_path)})
    resolved = self_contained(section, VOCABULARY)
    assert resolved.config_file is resolved.warm_start is None
    ModelSection.model_validate(json.loads(resolved.model_dump_json()))  # it travels as text
    plain = section if origin != "warm start" else small()
    assert same_weights(build_model(resolved, VOCABULARY, seed=1), build_model(plain, VOCABULARY, seed=1))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_model(small(), VOCABULARY, seed=3).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("architecture", ["stated", "from the folder"])
def test_warm_start_takes_the_weights(architecture: str, saved: Path) -> None:
    section = small().model_copy(update={"warm_start": str(saved)})
    if architecture == "from the folder":
        section = section.model_copy(update={"architecture": None})
    started = build_model(section, VOCABULARY, seed=0)
    assert same_weights(started, build_model(small(), VOCABULARY, seed=3))


def test_what_is_of_training_alone_may_be_another(saved: Path) -> None:
    """Dropout and first values are choices of the run; no value of a weight is of them."""
    section = small(resid_pdrop=0.3, initializer_range=0.5).model_copy(update={"warm_start": str(saved)})
    assert same_weights(build_model(section, VOCABULARY, seed=0), build_model(small(), VOCABULARY, seed=3))


def add(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(())}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["h.0.attn.masked_bias", "h.1.attn.rotary_emb.inv_freq", "h.1.attn.bias"])
def test_a_table_of_earlier_versions_is_left_out(
    name: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(saved, f"transformer.{name}".replace(".rotary_emb", ""))
    started = build_model(small().model_copy(update={"warm_start": str(saved)}), VOCABULARY, seed=0)
    assert same_weights(started, build_model(small(), VOCABULARY, seed=3))
    if name != "h.1.attn.bias":  # which transformers itself passes over
        assert "was left out (1 such)" in caplog.text


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.scale", "h.7.attn.masked_bias", "h.0.mlp.gate.weight"])
def test_a_weight_that_the_model_has_not_is_refused(name: str, saved: Path) -> None:
    add(saved, f"transformer.{name}")
    with pytest.raises(PhotonError, match=re.escape(f"has the unknown weight transformer.{name}")):
        build_model(small().model_copy(update={"warm_start": str(saved)}), VOCABULARY, seed=0)


def test_a_bias_that_a_layer_has_not_is_refused(tmp_path: Path) -> None:
    section = from_file(tmp_path / "config.json", LLAMA)
    build_model(section, VOCABULARY, seed=0).save_pretrained(tmp_path / "saved")
    add(tmp_path / "saved", "model.layers.0.self_attn.q_proj.bias")
    with pytest.raises(
        PhotonError, match=r"has the unknown weight model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        build_model(section.model_copy(update={"warm_start": str(tmp_path / "saved")}), VOCABULARY, seed=0)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_warm_start_with_an_output_of_its_own_is_not_taken_for_a_tied_one(tmp_path: Path) -> None:
    """Silos build the model from the section, and would not know that parameter."""
    section = small()
    untied = {**(section.architecture or {}), "tie_word_embeddings": False}
    model = build_model(section.model_copy(update={"architecture": untied}), VOCABULARY, seed=1)
    model.save_pretrained(tmp_path)
    update = {"warm_start": str(tmp_path)}
    with pytest.raises(PhotonError, match=r"has a lm_head.weight of its own.*tie_word_embeddings=false"):
        build_model(section.model_copy(update=update), VOCABULARY, seed=0)
    own = section.model_copy(update={**update, "architecture": untied})
    started = build_model(own, VOCABULARY, seed=0).state_dict()
    assert all(torch.equal(tensor, started[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("architecture", "vocabulary", "damage", "message"),
    [
        ({"n_inner": 24}, 300, None, "mlp.c_fc.bias has shape (64,), but the model section asks for (24,)"),
        ({"n_layer": 1}, 300, None, "has the unknown weight transformer.h.1."),
        ({"n_layer": 3}, 300, None, "lacks transformer.h.2."),
        ({"n_head": 4}, 300, None, "trained with n_head=2, and the model section has 4; use model=custom"),
        ({"activation_function": "relu"}, 300, None, "activation_function=gelu, and the model section has"),
        ({"layer_norm_epsilon": 0.1}, 300, None, "layer_norm_epsilon=1e-05, and the model section has 0.1"),
        ({}, 400, None, "a vocabulary of 320 is smaller than the tokenizer, which has 400 entries"),
        ({}, 300, cut, "cannot load the weights"),
        ({}, 300, lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors in it"),
        ({}, 300, lambda folder: (folder / "config.json").unlink(), "config.json: cannot read it"),
    ],
)
def test_a_warm_start_that_does_not_fit_is_named(
    architecture: dict[str, Any],
    vocabulary: int,
    damage: Callable[[Path], None] | None,
    message: str,
    saved: Path,
) -> None:
    section = small(**architecture)
    if vocabulary > 320:
        section = section.model_copy(update={"architecture": None})
    if damage:
        damage(saved)
    with pytest.raises(PhotonError) as caught:
        build_model(section.model_copy(update={"warm_start": str(saved)}), vocabulary, seed=0)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "warmup"),
    [("llama-135m", 1024, 3072, 512), ("llama-1.7b", 1024, 20_480, 2048), ("llama-720m", 512, 38_912, 2048)],
)
def test_llama_presets_have_the_papers_batch_over_four_silos_and_its_schedule(
    name: str, batch: int, steps: int, warmup: int
) -> None:
    """Not stretched: a local step is a step."""
    config = compose([f"model={name}", "schedule=desloc", "cohort=4"])
    assert 4 * config.training.batch_size == batch == config.model.recipe.batch_size
    schedule = build_schedule(config.schedule.as_mapping(), 10**6, config.training.batch_size)
    assert isinstance(schedule, WsdSchedule)
    assert (schedule.steps, schedule.warmup_steps) == (steps, warmup)
    assert schedule(steps - round(0.1 * steps) - 1) == 1.0
    assert schedule(steps - round(0.025 * steps)) == pytest.approx(1 - 0.75**0.5, abs=1e-3)
    assert config.optimizer.as_mapping()["lr"] == 0.003


@pytest.mark.parametrize("kind", ["bert", "camembert", "gpt2", "roberta", "xlm-roberta"])
def test_a_model_takes_as_many_tokens_as_is_said_and_no_more(kind: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    config = AutoConfig.for_model(
        kind, **small, max_position_embeddings=12, pad_token_id=1, is_decoder=True, eos_token_id=0
    )
    model, positions = AutoModelForCausalLM.from_config(config).eval(), positions_of(config)
    assert positions is not None
    model(input_ids=torch.full((1, positions), 5))
    with pytest.raises((IndexError, RuntimeError), match=r"out of|expanded size of the tensor"):
        model(input_ids=torch.full((1, positions + 1), 5))


def test_without_a_bound_on_positions_there_is_none() -> None:
    assert positions_of(AutoConfig.for_model("bloom")) is None
