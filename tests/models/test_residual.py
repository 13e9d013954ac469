"""A residual stream in bfloat16: its format, what it costs in exactness, and what asks for it."""

import pytest
import torch

from photon.config.compose import compose
from photon.errors import PhotonError
from photon.models.residual import narrow_residual
from photon.silo.runtime import trained_model

SMALL = ["model.sequence_length=16", "model.recipe.warmup_steps=1"]
LLAMA_LIKE = (
    "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, head_dim: 8, tie_word_embeddings: {tied}"
)
MODELS = {
    "gpt2": ["model.architecture.n_layer=2", "model.architecture.n_embd=32", "model.architecture.n_head=2"],
    "abbie": ["model=abbie-tiny"],
    **{
        kind: [
            "model=custom",
            f"model.architecture={{model_type: {kind}, {LLAMA_LIKE.format(tied=tied)}}}",
        ]
        for kind, tied in (("llama", "false"), ("qwen3", "true"))
    },
}


def built(kind):
    config = compose([*MODELS[kind], *SMALL, "model.vocab_size=96"])
    return trained_model(config, 96, torch.device("cpu"))


def stream_of(model, *, autocast=True):
    """Return the formats of what blocks give, and the gradient, of one pass."""
    kinds, formats = set(model._no_split_modules or ()), set()
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    assert blocks

    def see(_, __, output):
        formats.add((output[0] if isinstance(output, tuple) else output).dtype)

    handles = [block.register_forward_hook(see) for block in blocks]
    tokens = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=tokens, labels=tokens).loss.backward()
    for handle in handles:
        handle.remove()
    gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
    model.zero_grad()
    return formats, gradient


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_stream_is_narrow_and_the_gradient_nearly_the_same(kind):
    model = built(kind)
    formats, expected = stream_of(model)
    assert formats == {torch.float32}
    narrow_residual(model)
    formats, found = stream_of(model)
    assert formats == {torch.bfloat16}
    assert {one.dtype for one in model.parameters()} == {found.dtype} == {torch.float32}
    assert not torch.equal(found, expected)
    assert torch.cosine_similarity(found, expected, 0) > 0.995


def test_without_autocast_it_is_the_model_that_it_was():
    model = built("gpt2")
    _, expected = stream_of(model, autocast=False)
    narrow_residual(model)
    formats, found = stream_of(model, autocast=False)
    assert formats == {torch.float32}
    assert torch.equal(found, expected)


def test_a_run_asks_for_it_and_another_model_is_trained(run_small):
    bf16 = ["training.precision=bf16", "telemetry.sample_tokens=0"]
    wide, narrow = run_small(*bf16, name="wide"), run_small(*bf16, "training.residual=bf16", name="narrow")
    assert narrow["weights_sha256"] != wide["weights_sha256"]
    assert narrow["perplexity"]["final"] == pytest.approx(wide["perplexity"]["final"], rel=0.01)


def test_it_is_refused_where_the_pass_is_wide():
    with pytest.raises(PhotonError, match=r"training\.residual=bf16: the forward pass is in fp32; set"):
        compose(["training.residual=bf16", "training.precision=fp32"])


def test_a_mode_without_compiling_is_refused():
    with pytest.raises(PhotonError, match=r"compile_mode=.*: nothing is compiled; set training.compile=true"):
        compose(["training.compile_mode=max-autotune-no-cudagraphs"])
