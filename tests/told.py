"""The loss of windows of running text, written out."""

from typing import Any

import torch
from torch import Tensor


def told_loss(model: Any, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens that follow those that a model is given, scalar.

    Parameters
    ----------
    windows
        Token ids, (windows, tokens).
    """
    logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
