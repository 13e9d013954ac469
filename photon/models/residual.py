"""The residual stream of a model in bfloat16: what passes from block to block takes half the memory.

Under autocast a block's products are in bfloat16, and what it adds to is in float32, because the embeddings
that it began with are. So the stream is as narrow as the embeddings: blocks add to it in its own format.
Norms work in float32 inside and give float32, but what they give goes into products alone.
"""

from typing import Any

import torch
from torch import Tensor, nn


def narrow_residual(model: nn.Module) -> None:
    """Let the embeddings of a model give bfloat16 under autocast, and with them the residual stream.

    Parameters stay float32, and so do their gradients. Without autocast the model is what it was.

    Parameters
    ----------
    model
        A model that is trained under autocast to bfloat16.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(_to_bfloat16)


def _to_bfloat16(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
    # What reads hidden states in full, as sums of them are, does without autocast.
    return embedded.to(torch.bfloat16) if torch.is_autocast_enabled(embedded.device.type) else embedded
