"""Heads on a causal language model's hidden states that read a whole text: a classifier, a projection."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from photon.errors import PhotonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
#: Names of the parts of a model that are its heads.
CLASS_HEAD, ANCHOR_HEAD = "class_head", "anchor_head"


def projection(width: int, dimension: int, layers: int) -> nn.Sequential:
    """Return a projection of so many linear layers with a ReLU between them; all but the last are as wide."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(width, dimension))


def add_heads(model: "PreTrainedModel", *, classes: int, dimension: int, layers: int) -> "PreTrainedModel":
    """Put a classifier and a projection into a model, as parts that it does not call by itself.

    Their first values are drawn from torch's global source, on the CPU; those of a meta model have none.

    Parameters
    ----------
    classes
        Classes of the classifier.
    dimension, layers
        Of the projection, as of `projection`.
    """
    width = int(model.config.get_text_config().hidden_size)
    meta = model.device.type == "meta"
    with torch.device("meta" if meta else "cpu"):
        heads = {CLASS_HEAD: nn.Linear(width, classes), ANCHOR_HEAD: projection(width, dimension, layers)}
    for name, head in heads.items():
        model.add_module(name, nn.Module.to(head, model.device))
    return model


def head_of(model: nn.Module, name: str) -> nn.Module:
    """Return a head of a model, or of what a wrapper wraps."""
    found: nn.Module = getattr(getattr(model, "module", model), name)
    return found


def is_of_head(parameter: str, head: str) -> bool:
    """Return whether a parameter's name is that of a head's."""
    return parameter.startswith(f"{head}.")


def without_heads(params: Mapping[str, T]) -> dict[str, T]:
    """Return what belongs to a model alone, by name."""
    return {
        name: one
        for name, one in params.items()
        if not is_of_head(name, CLASS_HEAD) and not is_of_head(name, ANCHOR_HEAD)
    }


def embedded(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the embeddings of token ids: (batch, tokens, width)."""
    plain: Any = getattr(model, "module", model)
    vectors: Tensor = plain.get_input_embeddings()(tokens)
    return vectors


def pooled(
    model: nn.Module, weights: Tensor, *, tokens: Tensor | None = None, vectors: Tensor | None = None
) -> Tensor:
    """Return the weighted mean of each text's last hidden states, float32 of shape (batch, width).

    Parameters
    ----------
    model
        A causal language model of transformers.
    weights
        Of each token, (batch, tokens), such as whether it is text: those of weight 0 are not seen either.
    tokens
        Token ids, (batch, tokens); or else
    vectors
        embeddings, (batch, tokens, width).
    """
    plain: Any = getattr(model, "module", model)
    backbone = plain.base_model
    if backbone is plain:
        raise PhotonError(
            f"model: a {plain.config.model_type} of transformers has no part that gives hidden states; take "
            "another model"
        )
    given = {"input_ids": tokens} if vectors is None else {"inputs_embeds": vectors}
    states: Tensor = backbone(**given, attention_mask=(weights > 0).long()).last_hidden_state.float()
    parts = weights.float()[..., None]
    return (states * parts).sum(1) / parts.sum(1)
