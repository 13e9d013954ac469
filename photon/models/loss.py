"""The loss of a causal language model, without a step that a CPU could spare."""

from typing import Any, NamedTuple

import torch
from torch import nn

from photon.models.attention import one_text_a_row
from photon.models.experts import experts_of
from photon.models.head import FusedHead, fused_head

#: In place of a target that is not counted.
_IGNORED = -100


class CausalLosses(NamedTuple):
    """The losses of a causal language model on a batch, scalars in float32.

    Attributes
    ----------
    total
        What is trained: the cross-entropy, and the auxiliary loss times its coefficient.
    cross_entropy
        Nats per predicted token.
    auxiliary
        How unevenly the router of a mixture of experts chooses them, as transformers measures it over the
        batch; None: the model has no such loss.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    auxiliary: torch.Tensor | None


def run_apart(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor | None, **others: Any
) -> Any:
    """Call a model so that texts which share a row do not see each other, and return what it returns.

    A text begins where the positions begin anew. transformers looks for that where it has neither a mask nor
    a cache, and a configuration may ask for a cache.

    Parameters
    ----------
    input_ids
        Token ids, shape (batch, tokens).
    positions
        Place of each token in its text, of the shape of the token ids; None: each row is one text.
    others
        What else the model is called with.
    """
    if positions is not None:
        return model(input_ids=input_ids, position_ids=positions, use_cache=False, **others)
    with one_text_a_row():
        return model(input_ids=input_ids, **others)


def causal_loss(
    model: nn.Module, input_ids: torch.Tensor, vocabulary: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the ``total`` of `causal_losses`."""
    return causal_losses(model, input_ids, vocabulary).total


def causal_losses(
    model: nn.Module,
    input_ids: torch.Tensor,
    vocabulary: torch.Tensor | None = None,
    *,
    targets: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> CausalLosses:
    """Return the mean cross-entropy of predicting every token but the first from those before it.

    The total is ``model(input_ids, labels=input_ids).loss`` and cheaper: the last token, which predicts
    nothing, does not enter the model, and on a CPU the loss makes one pass over the logits less. Of a mixture
    of experts whose configuration gives the router's auxiliary loss a coefficient, that is in the total; it
    counts every token of the batch, so there the last one enters, too.

    Parameters
    ----------
    model
        A causal language model, or a wrapper of one that returns what it returns.
    input_ids
        Token ids, shape (batch, sequence length).
    vocabulary
        Tokens that the softmax runs over, bool of shape (rows of the head,): all of ``input_ids`` are among
        them. None: every row.
    targets
        Which tokens of ``input_ids`` the mean is over, bool of its shape; the first of a row is predicted
        from nothing, and never counts. None: all. Without any the loss is 0.
    positions
        Place of each token in its text, of the shape of ``input_ids``: where it is 0 another one begins,
        which does not see those before it. None: each row is one text.
    """
    # A wrapper for several devices has the model within.
    experts = experts_of(getattr(getattr(model, "module", model), "config", None))
    if experts is None or not experts.coefficient:
        places = None if positions is None else positions[:, :-1]
        if (head := fused_head(model)) is not None:
            cross_entropy = _fused(head, model, input_ids, vocabulary, targets, places)
            return CausalLosses(cross_entropy, cross_entropy, None)
        logits = run_apart(model, input_ids[:, :-1], places).logits
        cross_entropy = _cross_entropy(logits, input_ids, vocabulary, targets)
        return CausalLosses(cross_entropy, cross_entropy, None)
    output = run_apart(model, input_ids, positions, output_router_logits=True)
    cross_entropy = _cross_entropy(output.logits[:, :-1], input_ids, vocabulary, targets)
    auxiliary = getattr(output, "aux_loss", None)
    if not isinstance(auxiliary, torch.Tensor):
        # Some configurations have the coefficient, and the model has no use for it.
        return CausalLosses(cross_entropy, cross_entropy, None)
    return CausalLosses(cross_entropy + experts.coefficient * auxiliary, cross_entropy, auxiliary)


def _fused(
    head: FusedHead,
    model: nn.Module,
    input_ids: torch.Tensor,
    vocabulary: torch.Tensor | None,
    chosen: torch.Tensor | None,
    places: torch.Tensor | None,
) -> torch.Tensor:
    """Return the mean cross-entropy, as the model's head works it out."""
    expected = input_ids[:, 1:]
    counted = None if chosen is None else chosen[:, 1:]
    with head.predicting(expected, counted, vocabulary):
        total: torch.Tensor = run_apart(model, input_ids[:, :-1], places).logits.sum()
    return total / (expected.numel() if counted is None else counted.sum().clamp_min(1))


def _cross_entropy(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    vocabulary: torch.Tensor | None,
    chosen: torch.Tensor | None,
) -> torch.Tensor:
    if chosen is not None and logits.device.type == "cpu":
        # Most tokens may be no targets. On a GPU their number would have to be waited for.
        kept = chosen[:, 1:]
        count = int(kept.sum())
        if count == 0:
            return logits.float().sum() * 0.0
        if 2 * count <= kept.numel():
            return _cross_entropy_of(logits[kept].float(), input_ids[:, 1:][kept], vocabulary)
        # To copy most of the logits, and their gradient back, costs more than the softmax of all.
        weights = None if count == kept.numel() else kept.reshape(-1) / count
        targets = input_ids[:, 1:].reshape(-1)
        return _cross_entropy_of(logits.float().flatten(0, 1), targets, vocabulary, weights=weights)
    targets = input_ids[:, 1:]
    if chosen is None:
        return _cross_entropy_of(logits.float().flatten(0, 1), targets.reshape(-1), vocabulary)
    targets = targets.masked_fill(~chosen[:, 1:], _IGNORED).reshape(-1)
    total = _cross_entropy_of(logits.float().flatten(0, 1), targets, vocabulary, reduction="sum")
    return total / chosen[:, 1:].sum().clamp_min(1)


def _cross_entropy_of(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: torch.Tensor | None,
    reduction: str = "mean",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of targets, (n,), under logits, (n, rows).

    ``weights`` are those of each target in the mean, float32 of shape (n,), which sum to 1, on a CPU alone.
    """
    if vocabulary is not None:
        logits = logits.masked_fill(~vocabulary, -torch.inf)
    if logits.device.type == "cpu" and reduction == "mean":
        return _CrossEntropy.apply(logits, targets, weights)
    return nn.functional.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction=reduction)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy that keeps the probabilities and turns them into the gradient in place.

    torch's own keeps the log-probabilities, exponentiates all of them a second time on the way back, and
    allocates the gradient anew, which on a CPU costs more in page faults than in arithmetic.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        index = targets[:, None]
        probabilities = logits.softmax(1)
        # The largest probability is at least 1/V, so this logarithm is exact where the target's underflows.
        log_sum = logits.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log()
        ctx.save_for_backward(probabilities, index, weights)
        losses = log_sum - logits.gather(1, index)
        if weights is None:
            return losses.mean()
        # A token that is no target may be one that the softmax leaves out.
        return torch.where(weights > 0, losses[:, 0], 0.0) @ weights

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        probabilities, index, weights = ctx.saved_tensors
        slope = probabilities.scatter_add_(1, index, probabilities.new_full(index.shape, -1.0))
        scale = gradients[0] / len(index) if weights is None else (gradients[0] * weights)[:, None]
        return slope.mul_(scale), None, None
