"""Where a run starts: from the seed, or from what came from the federation above."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from photon.config.decided import agreed
from photon.config.schema import RunConfig
from photon.evaluation.load import check_tokenizer_beside
from photon.federation.assignment import Assignment
from photon.files.atomic import write_text
from photon.link.pipelines import check_names
from photon.models.build import self_contained, without_files
from photon.objective.configured import model_of
from photon.state.checkpoint import Checkpoint, Received, ServerState
from photon.state.received import tensors_hash
from photon.state.tensors import StateGroups, load_groups, save_groups
from photon.state.unlearned import Unlearned, read_unlearned
from photon.strategy.base import Strategy
from photon.strategy.contract import PARAMS, check_promises
from photon.training.groups import read_params


def sent_config(config: RunConfig, vocab_size: int | None = None) -> RunConfig:
    """Return a run's configuration as nodes get it: without listeners and tasks, and without names of files.

    Parameters
    ----------
    vocab_size
        Tokens of the silos' tokenizer; None: it is not known yet.
    """
    model = without_files(config.model) if vocab_size is None else self_contained(config.model, vocab_size)
    telemetry = config.telemetry.model_copy(update={"listeners": None})
    # Tasks are the aggregator's own, and so is the folder of their files.
    evaluation = config.evaluation.model_copy(update={"tasks": [], "task_data": None})
    return config.model_copy(update={"telemetry": telemetry, "model": model, "evaluation": evaluation})


def settled(config: RunConfig, state: ServerState, run_dir: Path) -> RunConfig:
    """Return a run's configuration with what was decided for all of its silos, where it leaves that open.

    That is written down, too, so that the run goes on, or is done again, with it.

    Silos of a deployed run are machines of their own: what each has decided is in the ledger alone. So it is
    with the silos of a federation within another, which is given what holds for all.
    """
    decided = agreed(state.decided.values())
    if decided is None or config.federation.engine == "deployment" or config.federation.parent is not None:
        return config
    training = decided.applied_to(config.training)
    if training != config.training:
        config = config.model_copy(update={"training": training})
        write_text(run_dir / "config.yaml", config.text)
    return config


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
        If the model cannot be built, the data was prepared with another tokenizer than the model to start
        from, a codec is for parameters that are not there, or something would leave the silos without the
        noise or the masks that the run promises.
    """
    kept: StateGroups = {}
    if assignment is not None:
        params = load_groups(assignment.groups_file(run_dir))[PARAMS]
        kept = strategy.local.begins_with(params)
    else:
        if config.model.warm_start is not None and config.data.path is not None:
            check_tokenizer_beside(Path(config.model.warm_start), Path(config.data.path))
        model = model_of(config, vocab_size)
        strategy.local.attach(model)
        params = read_params(model)
    check_names(config.link, params)
    shapes = {name: tensor.shape for name, tensor in params.items()}
    check_promises(strategy.contract(1, shapes), config.privacy)
    return params, kept


def unlearned_before(config: RunConfig) -> list[Unlearned]:
    """Return what was taken out of the model that a run starts from.

    Raises
    ------
    PhotonError
        If the list beside that model cannot be read.
    """
    start = config.model.warm_start
    return [] if start is None else read_unlearned(Path(start))


def adopted(
    strategy: Strategy, run_dir: Path, checkpoint: Checkpoint, assignment: Assignment
) -> tuple[Checkpoint, Mapping[str, float]]:
    """Return a checkpoint that goes on from what came from above, as the strategy's half at a silo says.

    Returns
    -------
    tuple
        The checkpoint, and figures of how it was taken up.
    """
    groups = load_groups(assignment.groups_file(run_dir))
    params, figures = strategy.local.adopt(
        checkpoint.load_params(), checkpoint.load_kept(), groups, assignment.routed
    )
    return assignment.adopt(run_dir, checkpoint, params), figures


def with_own(
    run_dir: Path, checkpoint: Checkpoint, trained: StateGroups, given: StateGroups | None = None
) -> Checkpoint:
    """Return a checkpoint from which the round goes on after the federation has trained on its own text.

    Parameters
    ----------
    trained
        ``params`` are in the place of the checkpoint's.
    given
        What that has for the others of the round.
    """
    start = run_dir / "own.safetensors"
    save_groups(start, {PARAMS: {**checkpoint.load_params(), **trained[PARAMS]}})
    before = checkpoint.received or Received(start)
    return replace(checkpoint, received=replace(before, params=start), given=given or {})


def after_the_others(run_dir: Path, checkpoint: Checkpoint, params: dict[str, torch.Tensor]) -> Checkpoint:
    """Return a checkpoint from which the federation trains on its own text once the others have trained.

    Asked again after a crash, it may start from other parameters, if fewer of the others have answered. So
    its model has an identity of its own, by which a silo knows what it has trained.
    """
    before = with_own(run_dir, checkpoint, {PARAMS: params})
    model = f"{checkpoint.state.model_id}/{tensors_hash(before.load_params())}"
    model_id = hashlib.sha256(model.encode()).hexdigest()[:32]
    return replace(before, state=before.state.model_copy(update={"model_id": model_id}))
