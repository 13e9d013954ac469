"""Where a run starts: from the seed, or from what came from the federation above."""

from collections.abc import Mapping
from pathlib import Path

import torch

from photon.config.schema import RunConfig
from photon.federation.assignment import Assignment
from photon.link.chains import check_names
from photon.models.build import build_model
from photon.state.checkpoint import Checkpoint
from photon.state.tensors import StateGroups, load_groups
from photon.strategy.base import Strategy
from photon.strategy.key_layers import INITIAL, key_layers, unpack_residuals
from photon.training.groups import read_params


def first_params(
    config: RunConfig, strategy: Strategy, run_dir: Path, vocab_size: int, assignment: Assignment | None
) -> tuple[dict[str, torch.Tensor], StateGroups]:
    """Return the parameters of round 0, and what the strategy keeps beside them.

    Parameters
    ----------
    vocab_size
        Tokens of the silos' tokenizer.
    assignment
        What the federation above wants, if there is one: its parameters are the first ones.

    Raises
    ------
    PhotonError
        If the model cannot be built, or a codec is for parameters that are not there.
    """
    kept: StateGroups = {}
    if assignment is not None:
        params = load_groups(assignment.groups_file(run_dir))["params"]
        layers = key_layers(config)
        initial = None if layers is None else layers.initial(None, params)
        kept = {} if initial is None else {INITIAL: initial}
    else:
        model = build_model(config.model, vocab_size, seed=config.seed)
        if strategy.sparse is not None:
            strategy.sparse.attach(model)
        params = read_params(model)
    check_names(config.link, params)
    return params, kept


def adopted(
    config: RunConfig, run_dir: Path, checkpoint: Checkpoint, assignment: Assignment
) -> tuple[Checkpoint, Mapping[str, float]]:
    """Return a checkpoint with the backbone from above and key layers that have looked at those there.

    Returns
    -------
    tuple
        The checkpoint, and figures of that look.
    """
    groups = load_groups(assignment.groups_file(run_dir))
    params, layers = groups["params"], key_layers(config)
    figures: Mapping[str, float] = {}
    if layers is not None:
        own = checkpoint.load_params()
        parts = layers.split(own)
        initial = checkpoint.load_kept().get(INITIAL)
        params, figures = layers.pull(
            {name: own[name] for name in parts.key_names},
            params,
            unpack_residuals(groups, assignment.residuals, parts),
            initial,
        )
    return assignment.adopt(run_dir, checkpoint, params), figures
