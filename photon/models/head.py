"""Head and loss in one: a language model's cross-entropy whose logits never stand whole.

The logits of a batch are the largest tensor of a training step on a GPU: of 32 × 2,047 tokens and 50,368
entries in float32 13 GB, several times. Here the head itself works out the loss of some tokens at a time,
and their gradient at once, so that nothing of it is kept. It happens within the model's forward pass: what
wraps or compiles the model, wraps and compiles this. On a CPU it is slower than whole logits, so there they
stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

#: Kinds of devices on which heads work out the loss.
FUSED_ON = {"cuda"}
#: Logits that stand at a time, at most.
_LOGITS = 2**27
_NAME = "_photon_head"


@dataclass(frozen=True)
class _Task:
    """What the head is to predict: targets (tokens,), which of them count, rows of the softmax; None: all."""

    targets: Tensor
    counted: Tensor | None
    rows: Tensor | None


class FusedHead:
    """The linear head of a model, which returns the summed loss in place of logits while it has a task."""

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._task: _Task | None = None

    @contextmanager
    def predicting(self, targets: Tensor, counted: Tensor | None, rows: Tensor | None) -> Iterator[None]:
        """Let ``logits`` be the summed cross-entropy of targets, shape (1,), while the block runs.

        Parameters
        ----------
        targets
            Token ids, shape (batch, tokens).
        counted
            Which of them count, bool of the same shape; None: all.
        rows
            Rows of the head that the softmax runs over, bool; None: all.
        """
        self._task = _Task(targets.flatten(), None if counted is None else counted.flatten(), rows)
        try:
            yield
        finally:
            self._task = None

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits of states (batch, tokens, width), or their summed loss."""
        head, task = self._head, self._task
        if task is None:
            return nn.functional.linear(states, head.weight, head.bias)
        weight, bias = head.weight, head.bias
        if torch.is_autocast_enabled(states.device.type):
            dtype = torch.get_autocast_dtype(states.device.type)
            states, weight = states.to(dtype), weight.to(dtype)
        summed = _SummedLoss.apply(states.flatten(0, -2), weight, bias, task.targets, task.counted, task.rows)
        return cast(Tensor, summed)


def fuse_head(model: nn.Module, device: torch.device) -> None:
    """Let the head of a model work out the loss, if its logits are what a linear head makes.

    A model that scales or caps its logits, or whose head is something else, stays as it is.

    Parameters
    ----------
    model
        A whole model: not yet sharded, wrapped or compiled.
    device
        Where it is going to be trained.
    """
    if device.type not in FUSED_ON:
        return
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if type(head) is not nn.Linear or getattr(model, _NAME, None) is not None:
        return
    if _returns_what_comes_out(model, head):
        fused = FusedHead(head)
        head.forward = fused.forward  # type: ignore[method-assign, assignment]
        # Not as a module's attribute of its own: it is no part of what is saved.
        object.__setattr__(model, _NAME, fused)


def fused_head(model: nn.Module) -> FusedHead | None:
    """Return the head of a model, or of what wraps it, if it can work out the loss and is to do so here."""
    for within in ("_orig_mod", "module", "_orig_mod"):
        model = getattr(model, within, model)
    found: FusedHead | None = getattr(model, _NAME, None)
    return found


def _returns_what_comes_out(model: nn.Module, head: nn.Linear) -> bool:
    """Return whether the logits of a model are to the bit what comes out of its head."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, given, made: seen.append(made))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tokens = torch.tensor([[0, 1]], device=next(model.parameters()).device)
            logits = model(input_ids=tokens).logits
    finally:
        handle.remove()
        model.train(training)
    return len(seen) == 1 and seen[0].shape == logits.shape and bool((seen[0] == logits).all())


class _SummedLoss(torch.autograd.Function):
    """The summed cross-entropy of targets under a linear head, (1,), in float32.

    The gradient of every sum is known but for a factor, so it is made together with the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        counted: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros(1, dtype=torch.float32, device=states.device)
        of_states = torch.empty_like(states) if wanted else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
        of_bias = None if bias is None or not wanted else torch.zeros_like(bias, dtype=torch.float32)
        size = max(1, _LOGITS // weight.shape[0])
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(states[part], weight).float()
            if bias is not None:
                logits = logits + bias.float()
            if rows is not None:
                logits = logits.masked_fill(~rows, -torch.inf)
            index = targets[part][:, None]
            log_sum = logits.logsumexp(1, keepdim=True)
            losses = log_sum - logits.gather(1, index)
            share = None if counted is None else counted[part][:, None].float()
            total += (losses if share is None else losses * share).sum()
            if of_states is None or of_weight is None:
                continue
            slope = (logits - log_sum).exp_()
            slope = slope.scatter_add(1, index, slope.new_full(index.shape, -1.0))
            if share is not None:
                slope = slope * share
            if of_bias is not None:
                of_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            of_states[part] = slope @ weight
            of_weight += (slope.T @ states[part]).float()
        if wanted:
            ctx.save_for_backward(of_states, of_weight, of_bias)
            ctx.formats = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_states, of_weight, of_bias = ctx.saved_tensors
        factor = gradients[0]
        weight, bias = ctx.formats
        return (
            # The factor may be too small for the format of the states, whose product with it is not.
            (of_states.float() * factor).to(of_states.dtype),
            (of_weight * factor).to(weight),
            None if of_bias is None else (of_bias * factor).to(bias),
            None,
            None,
            None,
        )
