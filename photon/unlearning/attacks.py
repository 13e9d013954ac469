"""What somebody who has the changed model can bring back: suppression is not deletion."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from photon.unlearning.problem import Edit
from photon.unlearning.questions import Encoded


@contextmanager
def subtracted(edits: Sequence[Edit]) -> Iterator[None]:
    """Take c·r away from what each changed block gives, for every token: the change is known exactly."""
    handles = [
        edit.site.block.register_forward_hook(
            lambda _, __, output, shift=edit.choice.coefficient * edit.vector: _minus(output, shift)
        )
        for edit in edits
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _minus(output: Any, shift: Tensor) -> Any:
    if isinstance(output, tuple):
        return (_minus(output[0], shift), *output[1:])
    return output - shift.to(output.device, output.dtype)


@contextmanager
def skipped(edits: Sequence[Edit]) -> Iterator[None]:
    """Let each changed block give what goes into it."""

    def passed(_: nn.Module, given: Any, named: Any, output: Any) -> Any:
        state = given[0] if given else named["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handles = [edit.site.block.register_forward_hook(passed, with_kwargs=True) for edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantised(model: PreTrainedModel, bits: int = 4) -> PreTrainedModel:
    """Return a copy of a model whose linear maps within the blocks are rounded to few bits.

    Each output of a map has a scale: w ≈ s q, with q an integer from −(2^(bits − 1) − 1) to its opposite.
    """
    made = copy.deepcopy(model)
    most = 2 ** (bits - 1) - 1
    head = made.get_output_embeddings()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / most
                weight.copy_((weight / scale).round().clamp(-most, most) * scale)
    return made


def relearned(
    model: PreTrainedModel,
    shown: Sequence[Encoded],
    *,
    steps: int = 10,
    lr: float = 3e-4,
) -> PreTrainedModel:
    """Return a copy of a model that was tuned on a few of the answers that it was to forget.

    Parameters
    ----------
    model
        The changed model.
    shown
        Questions with their answers, all in one batch.
    steps, lr
        Of AdamW, without weight decay.
    """
    made = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(made.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        answer_loss(made, shown).backward()
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
    return made


def answer_losses(model: PreTrainedModel, some: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of each question's answer, and its tokens, both (n,)."""
    device = next(model.parameters()).device
    length = max(len(one.prompt) + len(one.gold) for one in some)
    tokens = torch.zeros((len(some), length), dtype=torch.int64)
    targets = torch.zeros_like(tokens, dtype=torch.bool)
    for row, one in enumerate(some):
        text = [*one.prompt, *one.gold]
        tokens[row, : len(text)] = torch.tensor(text)
        targets[row, len(one.prompt) : len(text)] = True
    tokens, targets = tokens.to(device), targets.to(device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
    )
    counted = targets[:, 1:]
    return (losses.view(counted.shape) * counted).sum(1), counted.sum(1)


def answer_loss(model: PreTrainedModel, some: Sequence[Encoded]) -> Tensor:
    """Return the mean negative log-likelihood of the answers' tokens, a scalar."""
    losses, tokens = answer_losses(model, some)
    return losses.sum() / tokens.sum()
