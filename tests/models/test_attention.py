"""Attention is causal without a mask where it may be, keeps its mask where it must; products do the same."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from photon.models.abbie import AbbieGPT2Config, AbbieGPT2LMHeadModel
from photon.models.attention import PRODUCTS, one_text_a_row, takes_products, use_attention
from photon.models.loss import causal_loss, run_apart

LENGTH = 17
LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
GPT2 = {
    "vocab_size": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "llama": LlamaConfig(**LLAMA),
    "grouped queries": LlamaConfig(**LLAMA, num_key_value_heads=2),
    "a window that is never left": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=64),
    "a window that is left": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=8),
}
NO_MASK = [name for name in CONFIGS if name != "a window that is left"] + ["abbie"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "abbie":
        return AbbieGPT2LMHeadModel(AbbieGPT2Config(**GPT2)).train()
    return AutoModelForCausalLM.from_config(CONFIGS[name]).train()


def tokens(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def traced(model: nn.Module) -> tuple[nn.Module, list[dict]]:
    """Compile a model; the list gets what each attention of the graph is told beside its tensors."""
    seen: list[dict] = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                seen.append(dict(node.kwargs))
        return graph

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), seen


def packed(length: int) -> torch.Tensor:
    return (torch.arange(length) % 6).expand(2, -1).contiguous()


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NO_MASK)
def test_the_compiled_graph_is_causal_without_a_mask(name):
    model = build(name)
    compiled, seen = traced(model)
    loss = causal_loss(compiled, tokens())
    assert len(seen) >= 2
    assert all(one.get("attn_mask") is None and one["is_causal"] is True for one in seen)
    torch.testing.assert_close(loss, causal_loss(model, tokens()), rtol=1e-6, atol=1e-6)
    expected = model(input_ids=tokens(), labels=tokens()).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_window_that_is_left_keeps_its_mask():
    model = build("a window that is left")
    compiled, seen = traced(model)
    loss = causal_loss(compiled, tokens())
    assert seen
    assert all(isinstance(one["attn_mask"], torch.fx.Node) and not one["is_causal"] for one in seen)
    torch.testing.assert_close(loss, model(input_ids=tokens(), labels=tokens()).loss, rtol=1e-5, atol=1e-6)
    # It matters: without its mask the loss would be another one.
    whole = AutoModelForCausalLM.from_config(CONFIGS["a window that is never left"])
    whole.load_state_dict(model.state_dict())
    assert abs(causal_loss(whole, tokens()) - loss) > 1e-4


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["gpt2", "llama", "abbie"])
def test_texts_that_share_a_row_keep_their_mask_in_the_graph(name):
    model, positions = build(name), packed(LENGTH)
    compiled, seen = traced(model)
    # One model serves both kinds of rows, in turn: each kind has a graph of its own.
    causal_loss(compiled, tokens())
    logits = run_apart(compiled, tokens(), positions).logits
    assert isinstance(seen[-1]["attn_mask"], torch.fx.Node)
    torch.testing.assert_close(logits, run_apart(model, tokens(), positions).logits, rtol=1e-5, atol=1e-5)
    alone = model(input_ids=tokens()[:, 6:12]).logits
    torch.testing.assert_close(logits[:, 6:12], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_the_promise_everything_is_as_transformers_has_it():
    model = build("llama")
    compiled, seen = traced(model)
    compiled(input_ids=tokens())
    assert all(isinstance(one["attn_mask"], torch.fx.Node) for one in seen)
    with pytest.raises(ZeroDivisionError), one_text_a_row():
        _ = 1 / 0
    compiled, seen = traced(model)
    compiled(input_ids=tokens())
    assert all(isinstance(one["attn_mask"], torch.fx.Node) for one in seen)


@pytest.mark.parametrize("attention", ["sdpa", "products"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "grouped queries"])
def test_padding_is_masked_even_in_a_promise(name, attention):
    model = build(name).eval()
    use_attention(model, attention)
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[:, 12:] = 0
    with one_text_a_row():
        some = model(input_ids=tokens(), attention_mask=mask).logits[:, :12]
        other = model(input_ids=torch.cat([tokens()[:, :12], tokens()[:, :5]], 1), attention_mask=mask).logits
        left = mask.flip(1)
        padded = model(input_ids=tokens(), attention_mask=left).logits[:, 5:]
        changed = tokens().clone()
        changed[:, :5] = 3
        again = model(input_ids=changed, attention_mask=left).logits[:, 5:]
    torch.testing.assert_close(some, other[:, :12])
    torch.testing.assert_close(padded, again)


@pytest.mark.parametrize("name", [*CONFIGS, "abbie"])
def test_products_are_the_same_attention(name):
    one, other = build(name), build(name)
    use_attention(other, "products")
    assert other.config._attn_implementation == PRODUCTS
    losses = [causal_loss(model, tokens()) for model in (one, other)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    positions = packed(LENGTH)
    torch.testing.assert_close(
        run_apart(other, tokens(), positions).logits, run_apart(one, tokens(), positions).logits
    )


def test_products_are_computed_without_torchs_one_operation(monkeypatch):
    model = build("gpt2")
    use_attention(model, "products")

    def never(*_, **__):
        raise AssertionError("called")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", never)
    causal_loss(model, tokens()).backward()


def test_products_drop_shares_as_often_as_asked():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**{**GPT2, "attn_pdrop": 0.4})).train()
    use_attention(model, "products")
    torch.manual_seed(3)
    one = causal_loss(model, tokens())
    again = causal_loss(model, tokens())
    assert one != again
    torch.manual_seed(3)
    assert causal_loss(model, tokens()) == one
    model.eval()
    assert causal_loss(model, tokens()) == causal_loss(model, tokens())


@pytest.mark.parametrize("name", ["gpt2", "llama", "abbie"])
def test_products_generate_the_same_text(name):
    one, other = build(name).eval(), build(name).eval()
    use_attention(other, "products")
    found = [
        model.generate(
            tokens(1, 5), max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=63
        )
        for model in (one, other)
    ]
    assert torch.equal(*found)


def test_products_in_bf16_are_as_near_to_float32_as_torchs_operation():
    exact = causal_loss(build("llama"), tokens(8, 33))
    errors = {}
    for attention in ("sdpa", "products"):
        model = build("llama")
        use_attention(model, attention)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors[attention] = abs((causal_loss(model, tokens(8, 33)) - exact).item())
    assert errors["products"] < max(2 * errors["sdpa"], 2e-3)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        Gemma2Config(**LLAMA, head_dim=8, num_key_value_heads=2, attn_logit_softcapping=30.0),
    ],
    ids=["distances in the scores", "scores that are capped"],
)
def test_a_model_that_cannot_keeps_its_own(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    before = model.config._attn_implementation
    expected = causal_loss(model, tokens())
    if before != "sdpa":
        assert not takes_products(model)
    use_attention(model, "products")
    torch.testing.assert_close(causal_loss(model, tokens()), expected, rtol=1e-6, atol=1e-6)


def test_a_saved_model_has_the_usual_attention(tmp_path):
    model = build("llama")
    use_attention(model, "products")
    model.save_pretrained(tmp_path)
    assert PRODUCTS not in (tmp_path / "config.json").read_text()
    assert not any("attn_impl" in key for key in json.loads((tmp_path / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
