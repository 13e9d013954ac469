"""What a silo does not train: rows of tokens that its text lacks, and weights that it prunes."""

from dataclasses import replace

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.link.messages import TrainOrder
from photon.models.sparse import masks_of, prune
from photon.models.vocabulary import choose_rows, token_parameters
from photon.strategy.base import sparse_training, strategy_of
from photon.strategy.sparse import prunable
from photon.training.devices import GroupResult
from photon.training.groups import OptimizerState, Tensors


def own_vocabulary(
    order: TrainOrder, params: Tensors, data: PreparedData, config: RunConfig
) -> torch.Tensor | None:
    """Return which rows of the embedding are of tokens in the training text: bool, (rows,).

    None: the strategy does not trim. An embedding may have more rows than the tokenizer has tokens.
    """
    if not strategy_of(config).trims:
        return None
    vocabulary = torch.zeros(len(params[token_parameters(config.model)[0]]), dtype=torch.bool)
    vocabulary[: data.manifest.vocab_size] = torch.from_numpy(data.vocabulary(order.members))
    return vocabulary


def without_absent(
    state: OptimizerState | None, params: Tensors, data: PreparedData, config: RunConfig
) -> OptimizerState | None:
    """Zero the moments of weights that all clients have pruned: they would bring the weights back."""
    if state is None or sparse_training(config) is None:
        return state
    groups, scalars = state
    names = prunable(config, data.manifest.vocab_size)
    return prune(groups, {name: params[name] != 0 for name in names}), scalars


def masked(
    fitted: GroupResult,
    order: TrainOrder,
    params: Tensors,
    data: PreparedData,
    config: RunConfig,
    vocabulary: torch.Tensor | None,
) -> GroupResult:
    """Undo what the strategy does not want trained."""
    if vocabulary is not None:
        return _trimmed(fitted, params, vocabulary, config)
    sparse = sparse_training(config)
    if sparse is None:
        return fitted
    names = prunable(config, data.manifest.vocab_size)
    return _pruned(fitted, masks_of(fitted.params, names, sparse.target(order.round), sparse.scope))


def _trimmed(
    fitted: GroupResult, received: Tensors, vocabulary: torch.Tensor, config: RunConfig
) -> GroupResult:
    """Put rows outside the vocabulary back: no gradient has reached them, but weight decay has."""
    rows = {}
    for name in token_parameters(config.model):
        trained = fitted.params[name]
        rows[name] = choose_rows(vocabulary.to(trained.device), trained, received[name].to(trained.device))
    return replace(fitted, params=fitted.params | rows)


def _pruned(fitted: GroupResult, masks: Tensors) -> GroupResult:
    pruned = prune({"params": fitted.params, **fitted.groups}, masks)
    return replace(fitted, params=pruned.pop("params"), groups=pruned)
