"""Sparse training: weights that are re-parameterised, pruned by magnitude, and met by pruned activations.

What is trained, averaged and kept is v, under the name that the plain model has for the weight; the layer
computes with W, a function of v. SparsyFed (2504.05153) has W = sign(v)|v|^β, whose slope is zero where v is:
what was pruned stays pruned, on every silo, without a mask being kept or sent.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from photon.config.expression import expression
from photon.errors import PhotonError

Activations = Literal["off", "measured", "constant"]
Method = Literal["power", "layer-topk", "fixed-support"]
Scope = Literal["global", "layer"]

#: At least this share of a layer's inputs takes part in its weights' gradient (ε).
LEAST_ACTIVATIONS = 0.01

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORIGINAL = re.compile(r"\.parametrizations\.(\w+)\.original$")


class Power(nn.Module):
    """W = sign(v)|v|^β, and its inverse.

    ∂W/∂v = β|v|^(β−1) is zero at v = 0. (The equal v·|v|^(β−1) has no slope there that a computer can find.)
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, v: Tensor) -> Tensor:
        """Return W."""
        return v.sign() * v.abs().pow(self.beta)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return v of given weights: sign(W)|W|^(1/β)."""
        return weight.sign() * weight.abs().pow(1 / self.beta)


class LayerTopK(nn.Module):
    """ZeroFL: at every training step the layer keeps its largest weights, and all weights get a gradient."""

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        self.sparsity = sparsity

    def forward(self, v: Tensor) -> Tensor:
        """Zero the smallest of ``v`` in place while training; return it."""
        if self.training and torch.is_grad_enabled() and v.device.type != "meta":
            count = kept(v.numel(), self.sparsity)
            # A layer that is applied several times in a step, as one of AbbIE's body is, is written to once:
            # the backward pass wants what the earlier applications computed with.
            if int(v.detach().count_nonzero()) > count:
                with torch.no_grad():
                    v.mul_(largest(v, count))
        return v.view_as(v)


class FixedSupport(nn.Module):
    """FLASH: what is zero gets no gradient."""

    def forward(self, v: Tensor) -> Tensor:
        """Return W = v; its slope is 1 where v is not zero."""
        return v * (v != 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return v of given weights: the weights."""
        return weight


@dataclass(frozen=True)
class SparseTraining:
    """How a model is trained sparse.

    Attributes
    ----------
    sparsity
        Share of the prunable weights that are zero after local training, ŝ.
    method
        ``"power"``: W = sign(v)|v|^``beta`` (with ``beta`` 1 the plain layer); ``"layer-topk"``:
        :class:`LayerTopK`; ``"fixed-support"``: :class:`FixedSupport`.
    beta
        β of ``"power"``.
    activations
        Which inputs of a layer take part in the gradient of its weights: all (``"off"``), or the largest, as
        many as the layer has weights that are not zero (``"measured"``), or 1 − ŝ of them (``"constant"``).
    layers
        Regular expressions for names of weights to prune; none: every linear layer but the output head, and
        every 2-D convolution.
    scope
        Whether a threshold holds for all prunable weights together or for each layer.
    ramp_rounds
        Rounds over which the sparsity rises to ŝ, 0: none.
    """

    sparsity: float
    method: Method = "power"
    beta: float = 1.0
    activations: Activations = "off"
    layers: tuple[str, ...] = ()
    scope: Scope = "global"
    ramp_rounds: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: expected at least 0 and below 1")
        if self.beta < 1:
            raise ValueError(f"beta={self.beta}: expected at least 1")
        if self.ramp_rounds < 0:
            raise ValueError(f"ramp_rounds={self.ramp_rounds}: expected at least 0")

    def target(self, server_round: int) -> float:
        """Return the sparsity after a round (counted from 1): ŝ(1 − (1 − t/T)³) on the way up."""
        if server_round >= self.ramp_rounds:
            return self.sparsity
        return self.sparsity * (1 - (1 - server_round / self.ramp_rounds) ** 3)

    def parametrization(self) -> nn.Module | None:
        """Return the map from v to W; None: the weights themselves."""
        if self.method == "layer-topk":
            return LayerTopK(self.sparsity)
        if self.method == "fixed-support":
            return FixedSupport()
        return Power(self.beta) if self.beta > 1 else None

    def attach(self, model: nn.Module) -> None:
        """Turn the weights of ``model`` into v, with the same function of the input.

        Raises
        ------
        PhotonError
            If a pattern of ``layers`` fits no weight, or activations are pruned before a convolution that
            does not pad with a number of zeros.
        """
        seen: set[int] = set()
        for name, module in _prunable_modules(model, self.layers).items():
            if self.activations != "off" and isinstance(module, nn.Conv2d):
                _check_padding(name, module)
            mapping = self.parametrization()
            if mapping is not None:
                _register(module, mapping, again=id(module.weight) in seen)
                # torch keeps the parameter, so that a weight that two modules share (a tied head) stays one.
                seen.add(id(module.parametrizations["weight"].original))  # type: ignore[index, union-attr]
            if self.activations != "off" and _is_plain(module):
                constant = self.sparsity if self.activations == "constant" else None
                module.forward = partial(_forward, module, module.forward, constant)

    def effective(self, params: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
        """Return parameters with W in the place of v, for the plain model."""
        if self.method != "power" or self.beta == 1:
            return dict(params)
        mapping = Power(self.beta)
        return {name: mapping(tensor) if name in names else tensor for name, tensor in params.items()}


def parameter_name(name: str) -> str:
    """Return what the plain model calls a parameter of a parametrized one."""
    return _ORIGINAL.sub(r".\1", name)


def prunable_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return the names of the weights that are pruned, in order.

    Parameters
    ----------
    model
        The model, perhaps on the meta device.
    layers
        Regular expressions for names; none: every linear layer but the output head, and every 2-D
        convolution.

    Raises
    ------
    PhotonError
        If an expression fits no weight, or is none.
    """
    # Of a tied weight the one name that the parameter goes by.
    own = {name for name, _ in model.named_parameters()}
    return sorted(own & set(_prunable_modules(model, tuple(layers))))


def _register(module: nn.Module, mapping: nn.Module, *, again: bool) -> None:
    """Let ``mapping`` make the weight; ``again``: the parameter is v already."""
    weight: Any = module.weight
    v = weight.detach().clone()
    with torch.no_grad():  # trying a map must not train with it
        parametrize.register_parametrization(module, "weight", mapping)
        if again:
            weight.copy_(v)


def _prunable_modules(model: nn.Module, layers: tuple[str, ...]) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D  # here: a configuration is checked without transformers

    output_embeddings = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings is not None else None
    weights = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Embedding) and module.weight.requires_grad
    }
    if not layers:
        return {n: m for n, m in weights.items() if not isinstance(m, nn.Embedding) and m is not head}
    found: dict[str, nn.Module] = {}
    for pattern in layers:
        wanted = expression(pattern, "strategy.layers")
        fitting = {name: module for name, module in weights.items() if wanted.search(name)}
        if not fitting:
            raise PhotonError(
                f"strategy.layers: {pattern!r} fits no weight; there are {', '.join(sorted(weights)[:6])}, …"
            )
        found |= fitting
    # Both names of a tied weight, so that both modules compute with it.
    tied = {id(module.weight) for module in found.values()}
    return found | {name: module for name, module in weights.items() if id(module.weight) in tied}


def kept(numbers: int, sparsity: float) -> int:
    """Return how many of ``numbers`` weights are left: (1 − ŝ)n, rounded."""
    return round((1 - sparsity) * numbers)


def largest(values: Tensor, count: int) -> Tensor:
    """Return where the ``count`` largest magnitudes are (bool, as ``values``); of equal ones the first."""
    magnitudes = values.detach().abs().flatten()
    if count >= magnitudes.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = _largest_but(magnitudes, count)
    mask = magnitudes > threshold
    equal = (magnitudes == threshold).nonzero().flatten()
    mask[equal[: count - int(mask.sum())]] = True
    return mask.view_as(values)


def _largest_but(magnitudes: Tensor, count: int) -> Tensor:
    """Return the ``count``-th largest of numbers that are not negative, of shape (n,)."""
    place = magnitudes.numel() - count
    if magnitudes.device.type != "cpu":
        return magnitudes.kthvalue(place + 1).values
    # Their bits are ordered as they are, and numpy's partial sort is ten times as fast as torch's.
    bits = magnitudes.view(_BITS[magnitudes.itemsize])
    return torch.from_numpy(np.partition(bits.numpy(), place)[place : place + 1]).view(magnitudes.dtype)[0]


def masks_of(
    params: Mapping[str, Tensor], names: Collection[str], sparsity: float, scope: Scope
) -> dict[str, Tensor]:
    """Return where the weights are that magnitude pruning keeps.

    Parameters
    ----------
    params
        Parameters by name.
    names
        Those that are pruned.
    sparsity
        Share to prune.
    scope
        One threshold for all, or one for each layer.
    """
    own = {name: params[name] for name in names}
    if scope == "layer":
        return {name: largest(v, kept(v.numel(), sparsity)) for name, v in own.items()}
    flat = torch.cat([v.detach().flatten() for v in own.values()])
    parts = largest(flat, kept(flat.numel(), sparsity)).split([v.numel() for v in own.values()])
    return {name: mask.view_as(v) for (name, v), mask in zip(own.items(), parts, strict=True)}


def prune(
    groups: Mapping[str, Mapping[str, Tensor]], masks: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return state groups with zeros where ``masks`` are false.

    Moments go with their weights: one that stayed would bring the weight back at the next step.
    """
    return {
        group: {
            name: torch.where(masks[name], tensor, 0.0)
            if name in masks and tensor.shape == masks[name].shape
            else tensor
            for name, tensor in tensors.items()
        }
        for group, tensors in groups.items()
    }


def density(params: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Return the share of the prunable weights that are not zero."""
    own = [params[name] for name in names]
    numbers = sum(tensor.numel() for tensor in own)
    return sum(int(tensor.count_nonzero()) for tensor in own) / numbers if numbers else 1.0


# --- activation pruning -------------------------------------------------------------------------------


def _top(x: Tensor, count: int) -> Tensor:
    """Return ``x`` with zeros below its ``count``-th largest magnitude; what equals that stays."""
    magnitudes = x.detach().abs()
    return torch.where(magnitudes >= _largest_but(magnitudes.flatten(), count), x, 0.0)


class _PrunedInput(torch.autograd.Function):
    """y = xWᵀ + b, with ∂L/∂W = gᵀ·Top_k(x) and all else exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int) -> Tensor:
        ctx.save_for_backward(_top(x, count), weight)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pruned, weight = ctx.saved_tensors
        (gradient,) = gradients
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            (flat @ weight).view_as(pruned) if needs_x else None,
            flat.t() @ pruned.reshape(-1, pruned.shape[-1]) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            None,
        )


class _PrunedConvInput(torch.autograd.Function):
    """y = x ∗ W + b, with ∂L/∂W = Top_k(x) ∗ g and all else exact."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int, module: nn.Conv2d
    ) -> Tensor:
        ctx.save_for_backward(_top(x, count), weight)
        ctx.module = module
        return functional.conv2d(
            x, weight, bias, module.stride, module.padding, module.dilation, module.groups
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pruned, weight = ctx.saved_tensors
        module = ctx.module
        # What autograd itself calls. Only the weight's gradient looks at the input.
        found = torch.ops.aten.convolution_backward(
            gradients[0],
            pruned,
            weight,
            [module.out_channels],
            module.stride,
            module.padding,
            module.dilation,
            False,
            [0, 0],
            module.groups,
            ctx.needs_input_grad[:3],
        )
        return *found, None, None


def _check_padding(name: str, module: nn.Conv2d) -> None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise PhotonError(
            f"strategy.activation_pruning: {name} pads with {module.padding!r} ({module.padding_mode}); "
            "give the convolution a number of zeros, or set strategy.activation_pruning=false"
        )


def _is_plain(module: nn.Module) -> bool:
    """Return whether a layer computes what its class says: a few models have linear layers that do not."""
    from transformers.pytorch_utils import Conv1D  # here: a configuration is checked without transformers

    return type(module).forward in (nn.Linear.forward, Conv1D.forward, nn.Conv2d.forward)


def _forward(module: Any, plain: Any, constant: float | None, x: Tensor) -> Tensor:
    """Run a layer; while it trains, keep only the largest inputs for the gradient of its weight."""
    if not (module.training and torch.is_grad_enabled()):
        return plain(x)
    weight, bias = module.weight, module.bias
    sparsity = 1 - int(weight.count_nonzero()) / weight.numel() if constant is None else constant
    count = math.ceil(max(1 - sparsity, LEAST_ACTIVATIONS) * x.numel())
    if count >= x.numel():
        return plain(x)
    if not isinstance(module, nn.Linear | nn.Conv2d):  # Conv1D of transformers has it the other way round
        weight = weight.t()
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if isinstance(module, nn.Conv2d):
        return _PrunedConvInput.apply(x, weight, bias, count, module)
    return _PrunedInput.apply(x, weight, bias, count)
