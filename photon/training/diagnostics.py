"""Figures that a silo can measure of itself, beyond loss and gradient norm."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from photon.optim.low_rank import basis_similarity
from photon.training.groups import StateGroups

Groups = Mapping[str, Mapping[str, Tensor]]


def state_norms(groups: StateGroups) -> dict[str, float]:
    """Return the norm of each state group of the local optimizer, such as ``exp_avg_norm``."""
    return {f"{group}_norm": _norm(tensors.values()) for group, tensors in groups.items()}


def state_changes(before: Groups, after: Groups) -> dict[str, float]:
    """Return ‖s − s₀‖ / ‖s₀‖ of each state group over a round, such as ``exp_avg_change``.

    A group that was zero, or not there, has none.
    """
    changes = {}
    for group, tensors in after.items():
        old = before.get(group, {})
        size = _norm(old.values())
        if size > 0 and old.keys() == tensors.keys():
            changes[f"{group}_change"] = (
                _norm(t.cpu() - old[name].cpu() for name, t in tensors.items()) / size
            )
    return changes


def momentum_cosines(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], momenta: Groups
) -> dict[str, float]:
    """Return the cosine of a silo's pseudo-gradient with each first moment, such as ``exp_avg_cosine``.

    It is high where the moments know the direction in which the whole round goes.

    Parameters
    ----------
    before, after
        The parameters at the start and at the end of the round; their difference is the pseudo-gradient.
    momenta
        State groups of the local optimizer at the start of the round. Tensors of other shapes than their
        parameters, such as LoRDO's, are left out, and groups without any other.
    """
    cosines = {}
    for group, tensors in momenta.items():
        if group == "exp_avg_sq" or not group.startswith(("exp_avg", "momentum")):
            continue
        own = {name: tensor for name, tensor in tensors.items() if tensor.shape == after[name].shape}
        dots, squares, moments = [], [], []
        for name, tensor in own.items():
            change, moment = (before[name] - after[name].cpu()).flatten(), tensor.cpu().flatten()
            dots.append(float(change @ moment))
            squares.append(float(change @ change))
            moments.append(float(moment @ moment))
        if (size := math.sqrt(sum(squares) * sum(moments))) > 0:
            cosines[f"{group}_cosine"] = sum(dots) / size
    return cosines


def basis_similarities(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how much of LoRDO's subspaces a round has kept, as ``basis_similarity``: 1 is stagnation.

    The mean over matrices of `photon.optim.low_rank.basis_similarity`.
    """
    both = before.keys() & after.keys()
    if not both:
        return {}
    similarities = (basis_similarity(before[name].cpu(), after[name].cpu()) for name in sorted(both))
    return {"basis_similarity": math.fsum(similarities) / len(both)}


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors))


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
