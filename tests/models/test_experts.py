"""Mixtures of experts: the router's auxiliary loss is trained, and what a token passes through is counted."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from photon.config.compose import compose
from photon.models.build import build_model
from photon.models.experts import experts_of
from photon.models.flops import model_flops_per_token
from photon.models.loss import causal_losses

ROWS, LENGTH = 256, 64
TOKENS = torch.randint(0, ROWS, (4, LENGTH), generator=torch.Generator().manual_seed(0))

MIXTRAL = (
    "{model_type: mixtral, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 512, "
    "num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 8, num_experts_per_tok: 2, "
)
OLMOE = (
    "{model_type: olmoe, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 32, "
    "num_attention_heads: 4, num_key_value_heads: 2, num_experts: 8, num_experts_per_tok: 2, "
)
QWEN = (
    "{model_type: qwen2_moe, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 96, "
    "num_attention_heads: 4, num_key_value_heads: 2, num_experts: 8, num_experts_per_tok: 2, "
    "moe_intermediate_size: 32, shared_expert_intermediate_size: 48, mlp_only_layers: [0], "
)
GRANITE = (
    "{model_type: granitemoe, num_hidden_layers: 2, hidden_size: 64, intermediate_size: 32, "
    "num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 8, num_experts_per_tok: 2, "
)


def build(architecture: str, coefficient: float, device: str = "cpu") -> nn.Module:
    config = compose(
        [
            "model=custom",
            f"model.architecture={architecture}router_aux_loss_coef: {coefficient}}}",
            f"model.sequence_length={LENGTH}",
            "model.recipe.warmup_steps=1",
            f"model.vocab_size={ROWS}",
        ]
    )
    return build_model(config.model, ROWS, seed=0, device=device)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("architecture", [MIXTRAL, OLMOE, QWEN, GRANITE])
def test_loss_and_gradient_are_those_of_transformers(architecture: str) -> None:
    model = build(architecture, 10.0)
    expected = model(input_ids=TOKENS, labels=TOKENS, output_router_logits=True)
    expected.loss.backward()
    theirs = gradients(model)
    losses = causal_losses(model, TOKENS)
    losses.total.backward()
    assert losses.total.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert losses.auxiliary is not None
    assert losses.auxiliary.item() == pytest.approx(expected.aux_loss.item(), rel=1e-6)
    assert losses.total.item() - losses.cross_entropy.item() > 1
    for name, ours in gradients(model).items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(ours, theirs[name], rtol=0, atol=2e-5 * scale, msg=name)


def test_the_coefficient_reaches_the_router_alone_that_has_one() -> None:
    found = []
    for coefficient in (0.0, 1000.0):
        model = build(MIXTRAL, coefficient)
        losses = causal_losses(model, TOKENS)
        losses.total.backward()
        found.append((losses, gradients(model)))
    (without, plain), (with_it, pushed) = found
    assert without.auxiliary is None
    assert without.total is without.cross_entropy
    assert with_it.cross_entropy.item() == pytest.approx(without.cross_entropy.item(), rel=1e-6)
    router = next(name for name in plain if name.endswith("gate.weight"))
    assert pushed[router].norm() > 10 * plain[router].norm()


def _by_hand(mlp: list[int]) -> float:
    """FLOPs per token for layers with so many MLP parameters that a token passes through."""
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64
    norms = 2 * 64
    parameters = 2 * ROWS * 64 + 64 + sum(attention + norms + one for one in mlp)
    return 3.0 * (2 * parameters + 4 * len(mlp) * 64 * LENGTH)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_active_experts(device: str) -> None:
    mixtral = 64 * 8 + 2 * (3 * 64 * 512)
    assert model_flops_per_token(build(MIXTRAL, 0.0, device), LENGTH) == _by_hand([mixtral, mixtral])
    granite = 64 * 8 + 2 * (3 * 64 * 32)
    assert model_flops_per_token(build(GRANITE, 0.0, device), LENGTH) == _by_hand([granite, granite])


def test_shared_experts_and_dense_layers_count_whole() -> None:
    # Biases of queries, keys and values; the first layer is dense.
    biases = 64 + 32 + 32
    dense = 3 * 64 * 96 + biases
    sparse = 64 * 8 + 2 * (3 * 64 * 32) + 3 * 64 * 48 + 64 + biases
    assert model_flops_per_token(build(QWEN, 0.0, "meta"), LENGTH) == _by_hand([dense, sparse])


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, None),
        ({"num_local_experts": 1, "num_experts_per_tok": 1}, None),
        ({"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": None}, (8, 2, 0.0)),
        ({"ffn_config": SimpleNamespace(moe_num_experts=4, moe_top_k=1)}, (4, 1, 0.0)),
    ],
)
def test_what_a_configuration_says(fields: dict, found: tuple | None) -> None:
    experts = experts_of(SimpleNamespace(**fields))
    assert (experts and (experts.total, experts.active, experts.coefficient)) == found
