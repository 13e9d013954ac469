"""Muon's step with matrices of one shape orthogonalised together."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Elements of matrices that are orthogonalised together, at most. A CPU is as fast with a large matrix alone.
_TOGETHER = {"cpu": 2**18, "cuda": 2**26}


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, whose products for all matrices of one shape are one batch.

    On a GPU many small products become a few large ones, and on a CPU the calls of a small model do. Matrices
    that are sharded over devices are stepped by torch, one by one.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there; return what ``closure`` returns, if there is one."""
        if any(isinstance(one, DTensor) for group in self.param_groups for one in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in _of_one_shape(group["params"]):
                self._step(group, parameters)
        return loss

    def _step(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Step matrices of one shape: θ ← (1 − ηλ) θ − η' NS(m), or with Nesterov NS of a mean of m and g."""
        rows, columns = parameters[0].shape
        wide = rows <= columns
        together = torch.empty(
            (len(parameters), min(rows, columns), max(rows, columns)),
            dtype=product_format(parameters[0].device),
            device=parameters[0].device,
        )
        for slot, parameter in zip(together, parameters, strict=True):
            gradient, state = parameter.grad, self.state[parameter]
            assert gradient is not None, "they were chosen for it"
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
            momentum = state["momentum_buffer"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            slot.copy_(update if wide else update.mT)
        orthogonal = orthogonalised(
            together, group["ns_coefficients"], steps=group["ns_steps"], eps=group["eps"]
        )
        rate = group["lr"] * _size(group["adjust_lr_fn"], rows, columns)
        for update, parameter in zip(orthogonal, parameters, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update if wide else update.mT, alpha=-rate)


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], *, steps: int, eps: float
) -> Tensor:
    """Return nearly orthogonal matrices by Newton and Schulz' iteration, X ← a X + (b A + c A²) X, A = X Xᵀ.

    Parameters
    ----------
    matrices
        (count, rows, columns) with rows ≤ columns, in the format of the products; they are overwritten.
    coefficients
        a, b, c.
    eps
        Smallest norm that is divided by.
    """
    a, b, c = coefficients
    found = matrices.div_(matrices.norm(dim=(1, 2), keepdim=True).clamp(min=eps))
    add: Callable[..., Tensor] = torch.baddbmm
    if alone := len(found) == 1:
        # A batch of one is slower than a matrix.
        found, add = found[0], torch.addmm
    for _ in range(steps):
        gram = found @ found.mT
        factor = add(gram, gram, gram, beta=b, alpha=c)
        found = add(found, factor, found, beta=a)
    return found[None] if alone else found


def product_format(device: torch.device) -> torch.dtype:
    """Return the format of the products: bfloat16, which is all they need, where the device has it.

    A CPU without it would take many times as long to emulate it. There products are float32, as
    `torch.set_float32_matmul_precision` has them.
    """
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return torch.bfloat16


def flops(rows: int, columns: int, steps: int = 5) -> float:
    """Return the floating-point operations of orthogonalising a matrix."""
    small, large = sorted((rows, columns))
    return float(steps * (4 * small * small * large + 2 * small**3))


def _of_one_shape(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters that have a gradient, by shape, device and type, not too many at a time."""
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for one in parameters:
        if one.grad is not None:
            alike.setdefault((one.shape, one.device, one.dtype), []).append(one)
    for same in alike.values():
        most = _TOGETHER.get(same[0].device.type, _TOGETHER["cuda"])
        count = max(1, most // max(1, same[0].numel()))
        for start in range(0, len(same), count):
            yield same[start : start + count]


def _size(adjust: str | None, rows: int, columns: int) -> float:
    """Return the factor of the learning rate for a matrix, as torch's ``adjust_lr_fn`` has it."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
