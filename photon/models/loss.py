"""The loss of a causal language model, without a step that a CPU could spare."""

from typing import Any

import torch
from torch import nn


def causal_loss(
    model: nn.Module, input_ids: torch.Tensor, vocabulary: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean cross-entropy of predicting every token but the first from those before it.

    Equal to ``model(input_ids, labels=input_ids).loss`` and cheaper: the last token, which predicts
    nothing, does not enter the model, and on a CPU the loss makes one pass over the logits less.

    Parameters
    ----------
    model
        A causal language model, or a wrapper of one that returns what it returns.
    input_ids
        Token ids, shape (batch, sequence length).
    vocabulary
        Tokens that the softmax runs over, bool of shape (rows of the head,): all of ``input_ids`` are among
        them. None: every row.

    Returns
    -------
    torch.Tensor
        Scalar, float32, nats per predicted token.
    """
    logits = model(input_ids=input_ids[:, :-1]).logits.float().flatten(0, 1)
    if vocabulary is not None:
        logits = logits.masked_fill(~vocabulary, -torch.inf)
    targets = input_ids[:, 1:].reshape(-1)
    if logits.device.type == "cpu":
        return _CrossEntropy.apply(logits, targets)
    return nn.functional.cross_entropy(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy that keeps the probabilities and turns them into the gradient in place.

    torch's own keeps the log-probabilities, exponentiates all of them a second time on the way back, and
    allocates the gradient anew, which on a CPU costs more in page faults than in arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        index = targets[:, None]
        probabilities = logits.softmax(1)
        # The largest probability is at least 1/V, so this logarithm is exact where the target's underflows.
        log_sum = logits.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log()
        ctx.save_for_backward(probabilities, index)
        return (log_sum - logits.gather(1, index)).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        probabilities, index = ctx.saved_tensors
        slope = probabilities.scatter_add_(1, index, probabilities.new_full(index.shape, -1.0))
        return slope.mul_(gradients[0] / len(index)), None
