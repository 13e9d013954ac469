"""Small models with random weights, and prompts of random tokens."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from photon.models.pretrained import ABBIE

WIDTH, VOCABULARY = 16, 40
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_embd": WIDTH, "n_head": 2},
    "opt": {"num_hidden_layers": 3, "hidden_size": WIDTH, "ffn_dim": 32, "num_attention_heads": 2}
    | {"word_embed_proj_dim": WIDTH, "pad_token_id": 0},
    "roberta": {"num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 24}
    | {"num_attention_heads": 2, "is_decoder": True, "pad_token_id": 1},
    **dict.fromkeys(
        ("llama", "qwen2", "olmo2", "granite", "mixtral"),
        {"num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 24}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
    ),
    "mamba": {"num_hidden_layers": 3, "hidden_size": WIDTH},
}


def random_model(kind: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a model whose parameters are all random, biases and norms too."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **ends, **{**SIZES[kind], **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def random_abbie() -> PreTrainedModel:
    """Return an AbbIE model of Llama's blocks, of which the middle one is applied twice."""
    plain = random_model("llama").config.to_diff_dict()
    fields = {name: value for name, value in plain.items() if name not in ("model_type", "architectures")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(ABBIE["llama"](**fields))
    return model.eval()


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of 3 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (count,), generator=generator)
    return [torch.randint(VOCABULARY, (int(n),), generator=generator).tolist() for n in lengths]
