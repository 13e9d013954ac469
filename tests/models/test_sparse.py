"""Sparse layers against closed forms and plain autograd."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from photon.errors import PhotonError
from photon.models.loss import causal_loss
from photon.models.sparse import (
    LEAST_ACTIVATIONS,
    Power,
    SparseTraining,
    density,
    kept,
    largest,
    masks_of,
    parameter_name,
    prunable_names,
    prune,
)
from photon.training.groups import read_params, write_params


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2,
            n_embd=16,
            n_head=2,
            vocab_size=64,
            n_positions=16,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    ).eval()


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1,
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            vocab_size=64,
            tie_word_embeddings=tied,
        )
    ).eval()


TOKENS = torch.arange(48).view(4, 12)


@pytest.mark.parametrize("beta", [1.125, 1.25, 2.0])
def test_power_has_no_slope_at_zero_and_the_closed_form_elsewhere(beta: float) -> None:
    v = torch.tensor([-0.5, 0.0, 0.04, 1.0, 3.0], requires_grad=True)
    Power(beta)(v).sum().backward()
    expected = beta * v.detach().abs() ** (beta - 1)
    assert v.grad is not None
    assert v.grad[1] == 0
    torch.testing.assert_close(v.grad, expected)


def test_the_inverse_map_keeps_weights_and_shrinks_the_slope_as_the_paper_says() -> None:
    weights = torch.randn(1000, dtype=torch.float64) * 0.02
    mapping = Power(1.25)
    torch.testing.assert_close(mapping(mapping.right_inverse(weights)), weights)
    v = mapping.right_inverse(torch.tensor(0.02, dtype=torch.float64))
    assert float(v) == pytest.approx(0.0437, abs=1e-4)
    assert 1.25 * float(v) ** 0.25 == pytest.approx(0.572, abs=1e-3)


@pytest.mark.parametrize("model", [gpt2(), llama(), llama(tied=True)])
@pytest.mark.parametrize("method", ["power", "layer-topk", "fixed-support"])
@pytest.mark.parametrize("layers", [(), (r"\.weight$",)])
def test_attaching_changes_neither_names_nor_the_function(
    model: nn.Module, method: str, layers: tuple[str, ...]
) -> None:
    import copy

    sparse = SparseTraining(0.9, method=method, beta=1.25, layers=layers)  # type: ignore[arg-type]
    attached = copy.deepcopy(model)
    sparse.attach(attached)
    plain, names = read_params(model), prunable_names(model, layers)
    stored = read_params(attached)
    assert list(stored) == list(plain)
    torch.testing.assert_close(attached(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)
    effective = sparse.effective(stored, names)
    for name, tensor in plain.items():
        torch.testing.assert_close(effective[name], tensor)
        assert (name in names) or torch.equal(stored[name], tensor)
    write_params(attached, stored)


def test_by_default_every_linear_layer_but_the_head_is_pruned() -> None:
    assert prunable_names(gpt2(), ()) == sorted(
        f"transformer.h.{block}.{layer}.weight"
        for block in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    )
    names = prunable_names(llama(), ())
    assert len(names) == 7
    assert not any("head" in name or "embed" in name or "norm" in name for name in names)
    with pytest.raises(PhotonError, match=r"'attentoin' fits no weight"):
        prunable_names(llama(), ("attentoin",))


def test_a_tied_weight_stays_one_tensor() -> None:
    model = llama(tied=True)
    SparseTraining(0.5, beta=1.25, layers=("embed_tokens",)).attach(model)
    assert "lm_head.weight" not in read_params(model)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.parametrizations.weight.original is embedding.parametrizations.weight.original
    causal_loss(model, TOKENS).backward()
    torch.testing.assert_close(head.weight, embedding.weight)


def test_a_pruned_weight_stays_zero_under_adamw() -> None:
    model = gpt2().train()
    sparse = SparseTraining(0.9, beta=1.25)
    sparse.attach(model)
    names = prunable_names(gpt2(), ())
    masks = masks_of(read_params(model), names, 0.9, "global")
    write_params(model, prune({"params": read_params(model)}, masks)["params"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        causal_loss(model, TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = read_params(model)
    for name in names:
        assert not after[name][~masks[name]].any()
        assert after[name][masks[name]].all()


def test_without_the_map_a_pruned_weight_comes_back_and_with_a_fixed_support_it_does_not() -> None:
    for method, returns in (("layer-topk", True), ("fixed-support", False)):
        model = gpt2().train()
        SparseTraining(0.5, method=method).attach(model)  # type: ignore[arg-type]
        names = prunable_names(gpt2(), ())
        masks = masks_of(read_params(model), names, 0.5, "global")
        write_params(model, prune({"params": read_params(model)}, masks)["params"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        causal_loss(model, TOKENS).backward()
        optimizer.step()
        grown = sum(int(read_params(model)[name][~masks[name]].count_nonzero()) for name in names)
        assert (grown > 0) == returns


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 0.999])
def test_pruning_leaves_as_many_weights_as_asked(scope: str, sparsity: float) -> None:
    params = read_params(llama())
    names = prunable_names(llama(), ())
    pruned = prune({"params": params}, masks_of(params, names, sparsity, scope))["params"]  # type: ignore[arg-type]
    sizes = [params[name].numel() for name in names]
    expected = kept(sum(sizes), sparsity) if scope == "global" else sum(kept(n, sparsity) for n in sizes)
    assert sum(int(pruned[name].count_nonzero()) for name in names) == expected
    assert density(pruned, names) == pytest.approx(expected / sum(sizes))
    for name in set(params) - set(names):
        assert torch.equal(params[name], pruned[name])
    left = torch.cat([pruned[name].abs().flatten() for name in names])
    gone = torch.cat([params[name][pruned[name] == 0].abs().flatten() for name in names])
    if scope == "global" and 0 < expected < sum(sizes):
        assert left[left > 0].min() >= gone.max()


def test_of_equal_weights_the_first_stay() -> None:
    values = torch.tensor([1.0, -1.0, 1.0, 2.0, -1.0])
    assert largest(values, 3).tolist() == [True, True, False, True, False]
    assert largest(values, 0).tolist() == [False] * 5


def test_moments_go_with_their_weights_and_other_states_stay() -> None:
    masks = {"w": torch.tensor([True, False])}
    groups = {"exp_avg": {"w": torch.ones(2), "b": torch.ones(2)}, "low_rank": {"w": torch.ones(3)}}
    pruned = prune(groups, masks)
    assert pruned["exp_avg"]["w"].tolist() == [1, 0]
    assert pruned["exp_avg"]["b"].tolist() == [1, 1]
    assert pruned["low_rank"]["w"].tolist() == [1, 1, 1]


def test_the_sparsity_rises_on_a_cubic_ramp() -> None:
    sparse = SparseTraining(0.9, ramp_rounds=4)
    assert [sparse.target(t) for t in (1, 2, 4, 9)] == pytest.approx(
        [0.9 * (1 - 0.75**3), 0.9 * (1 - 0.5**3), 0.9, 0.9]
    )
    assert SparseTraining(0.9).target(1) == 0.9


class Lonely(nn.Module):
    """One linear layer that the tests attach to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.999])
def test_activation_pruning_is_exact_but_for_the_weight(sparsity: float) -> None:
    x = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    upstream = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(3))
    model = Lonely()
    with torch.no_grad():
        model.linear.weight.mul_(largest(model.linear.weight, kept(48, sparsity)))
    measured = 1 - kept(48, sparsity) / 48
    functional.linear(x, model.linear.weight, model.linear.bias).backward(upstream)
    exact = [tensor.grad.clone() for tensor in (x, model.linear.bias, model.linear.weight)]  # type: ignore[union-attr]
    for tensor in (x, model.linear.bias, model.linear.weight):
        tensor.grad = None
    weight = model.linear.weight.detach().clone()
    SparseTraining(0.5, activations="measured").attach(model)  # type: ignore[arg-type]
    model(x).backward(upstream)
    assert x.grad is not None
    assert model.linear.bias.grad is not None
    assert torch.equal(x.grad, exact[0])
    assert torch.equal(model.linear.bias.grad, exact[1])
    count = math.ceil(max(1 - measured, LEAST_ACTIVATIONS) * x.numel())
    top = x.detach() * largest(x, count)
    expected = torch.einsum("abo,abi->oi", upstream, top)
    torch.testing.assert_close(model.linear.weight.grad, expected)
    assert torch.equal(model.linear.weight, weight)
    if sparsity == 0:
        assert torch.equal(model.linear.weight.grad, exact[2])
    else:
        assert not torch.allclose(model.linear.weight.grad, exact[2])


@pytest.mark.parametrize("activations", ["measured", "constant"])
def test_a_hundredth_of_the_inputs_counts_however_few_weights_are_left(activations: Any) -> None:
    model = nn.Sequential(nn.Linear(1000, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0] = 1.0
    SparseTraining(0.9999, activations=activations).attach(model)
    x = torch.linspace(1, 2, 1000)[None]
    model(x).sum().backward()
    counts = model[0].weight.grad.count_nonzero(1)
    assert counts.tolist() == [10, 10, 10]
    assert model[0].weight.grad[:, -10:].count_nonzero() == 30  # the largest inputs


class Grouped(nn.Linear):
    """A layer that is called linear and computes otherwise, as some models have it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", input[:, : self.in_features], self.weight)


def test_a_linear_layer_that_computes_otherwise_keeps_its_activations() -> None:
    model = nn.Sequential(Grouped(8, 6))
    x = torch.randn(5, 11, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    expected.sum().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    SparseTraining(0.5, activations="constant").attach(model)
    model.train()(x).sum().backward()
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight.grad, gradient)


def test_what_is_frozen_is_not_pruned() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[1].weight.requires_grad_(False)
    assert prunable_names(model, []) == ["0.weight"]
    SparseTraining(0.5, beta=1.25).attach(model)
    assert [name for name, _ in model.named_parameters() if "parametrizations" in name] == [
        "0.parametrizations.weight.original"
    ]


CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "stride": 2, "bias": False},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel_size": 3, "groups": 2},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.75, 0.999])
def test_activation_pruning_of_a_convolution_is_exact_but_for_the_weight(
    settings: dict[str, Any], sparsity: float
) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, **settings)
    total = conv.weight.numel()
    with torch.no_grad():
        conv.weight.mul_(largest(conv.weight, kept(total, sparsity)))
    x = torch.randn(3, 4, 9, 8, requires_grad=True)
    upstream = torch.randn_like(conv(x))
    conv(x).backward(upstream)
    own = [tensor for tensor in (x, conv.bias, conv.weight) if tensor is not None]
    exact = [tensor.grad.clone() for tensor in own]  # type: ignore[union-attr]
    for tensor in own:
        tensor.grad = None
    SparseTraining(0.5, activations="measured").attach(nn.Sequential(conv))
    y = conv(x)
    assert torch.equal(y, functional.conv2d(x, *convolution_arguments(conv)))
    y.backward(upstream)
    for tensor, before in zip(own[:-1], exact[:-1], strict=True):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, before)
    count = math.ceil(max(kept(total, sparsity) / total, LEAST_ACTIVATIONS) * x.numel())
    expected = weight_gradient(conv, x.detach() * largest(x, count), upstream)
    torch.testing.assert_close(conv.weight.grad, expected)
    assert torch.equal(conv.weight.grad, exact[-1]) == (sparsity == 0)  # type: ignore[arg-type]


def convolution_arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups


def weight_gradient(conv: nn.Conv2d, x: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """∂L/∂W as a product of matrices: what every weight met, by what came back."""
    met = functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)  # type: ignore[arg-type]
    met = met.view(len(x), conv.groups, -1, met.shape[-1])
    back = upstream.view(len(x), conv.groups, conv.out_channels // conv.groups, -1)
    return torch.einsum("ngop,ngip->goi", back, met).reshape(conv.weight.shape)


def test_convolutions_are_pruned_and_stay_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 5)
    )
    x = torch.randn(6, 3, 6, 6)
    names = prunable_names(model, ())
    assert names == ["0.weight", "3.weight", "5.weight"]
    before = model.eval()(x)
    SparseTraining(0.8, beta=1.25, activations="measured").attach(model)
    torch.testing.assert_close(model(x), before)
    model.train()
    masks = masks_of(read_params(model), names, 0.8, "layer")
    write_params(model, prune({"params": read_params(model)}, masks)["params"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
    start = {name: tensor.clone() for name, tensor in read_params(model).items()}
    for _ in range(10):
        functional.cross_entropy(model(x), torch.arange(6) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = read_params(model)
    for name in names:
        assert not after[name][~masks[name]].any()
        assert not torch.equal(after[name], start[name])


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_a_convolution_that_pads_otherwise_is_refused(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, **settings))
    with pytest.raises(PhotonError, match=r"activation_pruning: 0\.weight pads with"):
        SparseTraining(0.5, activations="measured").attach(model)
    SparseTraining(0.5, beta=1.25).attach(model)
    model(torch.randn(1, 2, 5, 5)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_threshold_is_the_one_of_a_sort(dtype: torch.dtype) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(4)).to(dtype)
    values[::7] = 0.0
    ordered = values.abs().sort(descending=True).values
    for count in (1, 37, 499):
        mask = largest(values, count)
        assert int(mask.sum()) == count
        assert values[mask].abs().min() == ordered[count - 1]
        assert values[~mask].abs().max() == ordered[count]


def test_activations_are_left_alone_while_evaluating() -> None:
    model, plain = Lonely().eval(), Lonely().eval()
    SparseTraining(0.9, activations="constant").attach(model)  # type: ignore[arg-type]
    x = torch.randn(3, 8)
    (model(x).sum()).backward()
    (plain(x).sum()).backward()
    assert torch.equal(model.linear.weight.grad, plain.linear.weight.grad)


def test_the_second_matrix_layout_gives_the_same_gradients() -> None:
    """GPT-2 keeps its matrices transposed."""
    dense, pruned = gpt2().train(), gpt2().train()
    SparseTraining(0.0, activations="constant").attach(pruned)
    causal_loss(dense, TOKENS).backward()
    causal_loss(pruned, TOKENS).backward()
    half = gpt2().train()
    SparseTraining(0.5, activations="constant").attach(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        causal_loss(half, TOKENS).backward()
    for (name, one), other, third in zip(
        dense.named_parameters(), pruned.parameters(), half.parameters(), strict=True
    ):
        assert one.grad is not None
        assert third.grad is not None
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]
        assert third.grad.shape == one.grad.shape
        cosine = functional.cosine_similarity(one.grad.flatten(), third.grad.flatten(), dim=0)
        assert cosine > 0.7, name


def test_names_of_parametrized_weights() -> None:
    assert parameter_name("h.0.mlp.parametrizations.weight.original") == "h.0.mlp.weight"
    assert parameter_name("h.0.mlp.weight") == "h.0.mlp.weight"


@pytest.mark.parametrize("settings", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": 0.5, "beta": 0.9}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SparseTraining(**settings)  # type: ignore[arg-type]
