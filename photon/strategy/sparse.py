"""What strategies for sparse models share: an outer step that keeps zeros, and figures on supports."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import combinations
from statistics import fmean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.data.silo_data import SiloData
from photon.models.sparse import (
    Activations,
    Method,
    Scope,
    SparseTraining,
    density,
    masks_of,
    prunable_names,
    prune,
)
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Aggregate, Reply, Strategy, sparse_training
from photon.strategy.contract import PARAMS
from photon.strategy.local import Finish, Groups, Kept, LocalMethod, LocalState, Request, Start
from photon.strategy.outer import Tensors
from photon.strategy.photon import OuterResult, Photon
from photon.training.devices import GroupResult


class Sparse(Photon):
    """Photon with silos that prune their weights after local training.

    The mean of pruned replies is zero where all of them are: the global model has the union of their
    supports. Averaging keeps that; any other outer optimizer would fill it again, so its step is confined to
    the union.

    Parameters
    ----------
    config
        The run's configuration.
    sparsity
        Share of the prunable weights that a silo sets to zero, ŝ.
    layers
        Regular expressions of the layers to prune, by name; None: every linear layer but the output head.
    scope
        ``"global"``: the largest of all prunable weights stay; ``"layer"``: those of each layer.
    ramp_rounds
        Rounds over which the share rises to ``sparsity``; 0: none.
    weighting, local_state, fold
        As in `Photon`. A weight that a silo has pruned is a zero to the fold.
    """

    folds_updates: ClassVar[bool] = False
    #: As in `SparseTraining`.
    method: ClassVar[Method] = "power"
    activations: ClassVar[Activations] = "off"

    def __init__(
        self,
        config: RunConfig,
        *,
        sparsity: float = 0.95,
        layers: list[str] | None = None,
        scope: Scope = "global",
        ramp_rounds: int = 0,
        weighting: Literal["tokens", "uniform"] = "tokens",
        local_state: LocalState = "keep",
        fold: dict[str, Any] | None = None,
    ) -> None:
        if local_state == "sync":
            raise ValueError("local_state=sync: moments of pruned weights are not averaged; set keep")
        if config.link.uplink_payload == "update":
            raise ValueError(
                "link.uplink_payload=update: what is sparse are the weights; use link=sparse or link=dense"
            )
        super().__init__(config, weighting=weighting, local_state=local_state, fold=fold)
        self.sparse: SparseTraining = SparseTraining(
            sparsity,
            method=self.method,
            activations=self.activations,
            layers=tuple(layers or ()),
            scope=scope,
            ramp_rounds=ramp_rounds,
        )

    @cached_property
    def local(self) -> LocalMethod:
        """The silo's half."""
        return PrunedWeights(self.config, self.local_state, self.sparse)

    def problem_within(self, above: Strategy) -> str | None:
        """Refuse another function of the weights than that of the federation above."""
        return self._another_model(above, "what comes from above is")

    def _another_model(self, other: Strategy, which: str) -> str | None:
        """Return how the model of the same weights differs from that of other settings, or None."""
        assert other.sparse is not None, "of the same class"
        old, new = other.sparse, self.sparse
        if (old.beta, old.layers) == (new.beta, new.layers) or (old.beta, new.beta) == (1.0, 1.0):
            return None
        return (
            f"strategy: {which} the weights of beta={old.beta:g} and layers={list(old.layers) or None}, "
            f"which are another model under beta={new.beta:g} and layers={list(new.layers) or None}"
        )

    def problem_after(self, before: Strategy, checkpoint: Checkpoint) -> str | None:
        """Refuse another function of the weights: what a checkpoint holds is v, and the model is W."""
        return self._another_model(before, "the checkpoint holds")

    def exported(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return W in the place of v."""
        return self.sparse.effective(
            checkpoint.load_params(), prunable(self.config, checkpoint.state.vocab_size)
        )

    def step_outer(self, server_round: int, checkpoint: Checkpoint, mean: Tensors) -> OuterResult:
        """Step the outer optimizer within the union of the silos' supports."""
        names = prunable(self.config, checkpoint.state.vocab_size)
        outside = {name: mean[name] == 0 for name in names}
        params, step, groups, scalars = super().step_outer(server_round, checkpoint, mean)
        for name in names:
            params[name].masked_fill_(outside[name], 0.0)
        return params, step, groups, scalars

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Aggregate as Photon does; and compare the supports."""
        names = prunable(self.config, checkpoint.state.vocab_size)
        supports = Supports(names, checkpoint.load_params())
        aggregate = super().aggregate_train(server_round, checkpoint, _watched(replies, supports))
        densities = {f"density/{name}": density(aggregate.params, [name]) for name in names}
        densities["density/all"] = density(aggregate.params, names)
        return replace(aggregate, figures={**aggregate.figures, **densities, **supports.figures()})


class PrunedWeights(LocalMethod):
    """The silo's half: weights that are pruned after the local steps, and no moments of absent ones.

    Parameters
    ----------
    config, local_state
        As in `LocalMethod`.
    sparse
        How the model is trained.
    """

    one_device_only = "a sparse strategy trains in one process"

    def __init__(self, config: RunConfig, local_state: LocalState, sparse: SparseTraining) -> None:
        super().__init__(config, local_state)
        self.sparse = sparse

    def attach(self, model: nn.Module) -> None:
        """Train v in the place of each prunable W."""
        self.sparse.attach(model)

    def start(self, received: Groups, kept: Kept | None, request: Request, data: SiloData) -> Start:
        """Zero the moments of weights that all silos have pruned: they would bring the weights back."""
        start = super().start(received, kept, request, data)
        if start.optimizer is None:
            return start
        names = prunable(self.config, data.vocab_size)
        present = {name: start.params[name] != 0 for name in names}
        return replace(
            start, optimizer=prune(start.optimizer, present), context=prune(start.context, present)
        )

    def finish(self, start: Start, trained: GroupResult, request: Request) -> Finish:
        """Prune the trained weights, and their moments with them."""
        names = prunable(self.config, request.vocab_size)
        masks = masks_of(trained.params, names, self.sparse.target(request.round), self.sparse.scope)
        pruned = prune({PARAMS: trained.params, **trained.groups}, masks)
        params = pruned.pop(PARAMS)
        return super().finish(start, replace(trained, params=params, groups=pruned), request)


class Supports:
    """Compare supports: of the silos with one another, and with what they received.

    Parameters
    ----------
    names
        The prunable weights.
    received
        The parameters that the silos started from.
    """

    def __init__(self, names: list[str], received: Mapping[str, torch.Tensor]) -> None:
        self._names = names
        self._received = _bits(received, names)
        self._silos: list[np.ndarray[Any, np.dtype[np.uint8]]] = []

    def add(self, params: Mapping[str, torch.Tensor]) -> None:
        """Note where the weights of a silo are not zero."""
        self._silos.append(_bits(params, self._names))

    def figures(self) -> dict[str, float]:
        """Return the mean intersection over union of two silos' masks, and the weights that grew again."""
        regrown = [_count(bits & ~self._received) for bits in self._silos]
        figures = {"regrown/mean": fmean(regrown)}
        if len(self._silos) > 1:
            pairs = list(combinations(self._silos, 2))
            figures["mask_iou/all"] = fmean(_count(a & b) / max(1, _count(a | b)) for a, b in pairs)
        return figures


def _watched(replies: Iterator[Reply], supports: Supports) -> Iterator[Reply]:
    for reply in replies:
        supports.add(reply.groups["params"])
        yield reply
        del reply


def _bits(params: Mapping[str, torch.Tensor], names: list[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a bit for each prunable weight: one where it is not zero."""
    return np.concatenate([np.packbits((params[name] != 0).flatten().numpy()) for name in names])


def _count(bits: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    return int(np.bitwise_count(bits).sum())


def prunable(config: RunConfig, vocab_size: int) -> list[str]:
    """Return the names of the parameters that a run of a sparse strategy prunes."""
    return list(_prunable(config.text, vocab_size))


@lru_cache(maxsize=2)
def _prunable(config_text: str, vocab_size: int) -> tuple[str, ...]:
    from photon.objective.configured import model_of

    config = parse(config_text)
    sparse = sparse_training(config)
    assert sparse is not None, "for runs of sparse strategies"
    model = model_of(config, vocab_size, "meta")
    return tuple(prunable_names(model, sparse.layers))
