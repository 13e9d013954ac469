"""Validation loss of a model on packed windows of text."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from photon.models.loss import run_apart
from photon.telemetry.events import perplexity_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from photon.training.precision import Precision

# Logits are by far the largest tensor of an evaluation, and beyond this much they only cost memory.
_LOGITS_BYTES = {"cpu": 2**24, "cuda": 2**30}


class Score(NamedTuple):
    """How well a model predicts some text.

    Attributes
    ----------
    nll : float
        Summed negative log-likelihood in nats.
    tokens : int
        Tokens predicted: all of a window but its first, or those of them that are targets.
    """

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a float."""
        return perplexity_of(self.loss)


@dataclass(frozen=True)
class OwnTokens:
    """The tokens of the text that a model was trained on, where its softmax ran over these alone.

    To be a distribution over all tokens it leaves a share u to those that it has never seen:

        p(t) = (1 − u) · softmax(t) for one of its own tokens,   p(t) = u / others for any other one.

    Attributes
    ----------
    tokens
        bool, of shape (rows of the head,).
    unseen
        u.
    others
        Tokens of the tokenizer that are not among them.
    """

    tokens: torch.Tensor
    unseen: float
    others: int

    @classmethod
    def of(cls, counts: np.ndarray, rows: int) -> "OwnTokens":
        """Return them for counts of the training text's tokens, (vocab_size,).

        u is Good and Turing's estimate, the share of the text that are tokens which occur once, smoothed so
        that it is neither 0 nor 1; 0 if there are no other tokens.
        """
        tokens = torch.zeros(rows, dtype=torch.bool)
        tokens[: len(counts)] = torch.from_numpy(counts > 0)
        others = int((counts == 0).sum())
        once, all_of_them = int((counts == 1).sum()), int(counts.sum())
        return cls(tokens, (once + 1) / (all_of_them + 2) if others else 0.0, others)

    def losses(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the negative log-likelihood of each target: (n,), for logits of shape (n, rows)."""
        known = self.tokens.to(logits.device)
        losses = nn.functional.cross_entropy(
            logits.masked_fill(~known, -torch.inf), targets, reduction="none"
        )
        if not self.others:
            return losses
        elsewhere = math.log(self.others) - math.log(self.unseen)
        return torch.where(known[targets], losses - math.log1p(-self.unseen), elsewhere)


def evaluate_windows(
    model: "PreTrainedModel",
    windows: np.ndarray,
    *,
    batch_size: int,
    device: torch.device | str,
    precision: "Precision",
    limit: int | None = None,
    own: OwnTokens | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Score:
    """Return the negative log-likelihood of windows and the number of tokens predicted.

    Deterministic: the same windows are read in the same order every time. The model is evaluated without
    gradients and left in the mode, training or evaluation, that it was in.

    Parameters
    ----------
    model
        A causal language model on ``device``.
    windows
        Token ids, shape (windows, sequence length), any integer type; may be memory-mapped.
    batch_size
        Most windows per forward pass; fewer where their logits would be large.
    device
        Where the model is.
    precision
        ``"fp32"``, ``"bf16"`` or ``"fp16"``: format of the forward pass. The likelihood is float32, its sum
        float64.
    limit
        Most windows to read, evenly spaced over all of them; None reads all.
    own
        Tokens that the softmax runs over; None: all.
    beside
        Of conversations, the ``positions`` and ``targets`` of the tokens, as `photon.data.prepared` has them:
        none sees another, and targets alone are predicted.
    """
    device = torch.device(device)
    arrays = {"tokens": windows, **(beside or {})}
    total, count = 0.0, 0
    with reading(model, device, precision):
        for batch in batches_of(arrays, model, batch_size=batch_size, device=device, limit=limit):
            summed, counted = _summed_loss(model, batch, own)
            total, count = total + summed, count + counted
    return Score(total, count)


@contextmanager
def reading(model: "PreTrainedModel", device: torch.device, precision: "Precision") -> Iterator[None]:
    """Evaluate a model in this block, without gradients; leave it in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _autocast(device, precision):
            yield
    finally:
        model.train(was_training)


def batches_of(
    arrays: Mapping[str, np.ndarray],
    model: "PreTrainedModel",
    *,
    batch_size: int,
    device: torch.device,
    limit: int | None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the windows of arrays, or ``limit`` evenly spaced ones, int64 on a device, a pass at a time."""
    tokens = arrays["tokens"]
    rows = _evenly_spaced(len(tokens), limit)
    step = _windows_per_pass(batch_size, tokens.shape[1], model.config.vocab_size, device)
    for start in range(0, len(rows), step):
        taken = rows[start : start + step]
        yield {
            name: torch.from_numpy(array[taken].astype(np.int64)).to(device) for name, array in arrays.items()
        }


def _evenly_spaced(count: int, limit: int | None) -> np.ndarray:
    taken = count if limit is None else min(limit, count)
    return np.arange(taken) * count // max(taken, 1)


def _windows_per_pass(batch_size: int, sequence_length: int, vocab_size: int, device: torch.device) -> int:
    budget = _LOGITS_BYTES["cuda" if device.type == "cuda" else "cpu"]
    return max(1, min(batch_size, budget // (4 * sequence_length * vocab_size)))


def _autocast(device: torch.device, precision: "Precision") -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def _summed_loss(
    model: nn.Module, batch: Mapping[str, torch.Tensor], own: OwnTokens | None
) -> tuple[float, int]:
    """Return the summed loss of a batch, and of how many tokens."""
    input_ids = batch["tokens"]
    places = batch["positions"][:, :-1] if "positions" in batch else None
    logits = run_apart(model, input_ids[:, :-1], places).logits
    targets = input_ids[:, 1:]
    if "targets" in batch:
        counted = batch["targets"][:, 1:] == 1
        logits, targets = logits[counted].float(), targets[counted]
    else:
        logits, targets = logits.float().flatten(0, 1), targets.reshape(-1)
    if own is None:
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        losses = own.losses(logits, targets)
    return float(losses.sum(dtype=torch.float64)), len(targets)
