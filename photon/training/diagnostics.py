"""Figures that a client can measure of itself, beyond loss and gradient norm."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from photon.training.groups import StateGroups


def state_norms(groups: StateGroups) -> dict[str, float]:
    """Return the norm of each state group of the local optimizer, such as ``exp_avg_norm``."""
    return {
        f"{group}_norm": math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors.values()))
        for group, tensors in groups.items()
    }


@torch.no_grad()
def activation_norms(model: PreTrainedModel, windows: torch.Tensor) -> Mapping[str, float]:
    """Return the root mean square over tokens of the activations' norm, entering and leaving the model.

    Parameters
    ----------
    model
        The model; what enters is its token embedding's output, what leaves is its head's input.
    windows
        Token ids, shape (batch, sequence length), on the model's device.
    """
    seen: dict[str, float] = {}

    def note(name: str, activations: torch.Tensor) -> None:
        norms = torch.linalg.vector_norm(activations.float(), dim=-1)
        seen[name] = float(norms.square().mean().sqrt())

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings, nn.Module)
    hooks = [embeddings.register_forward_hook(lambda _, __, output: note("activation_norm_in", output))]
    if isinstance(head, nn.Module):
        hooks.append(head.register_forward_pre_hook(lambda _, given: note("activation_norm_out", given[0])))
    try:
        model(input_ids=windows)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
