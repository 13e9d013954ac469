"""The objective that a configuration names, and what follows from it: the model, and the steps of a round."""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from photon.components import build
from photon.config.adapter import AdapterSection
from photon.config.schema import Component, ModelSection, RunConfig
from photon.data.prepared import ARRAYS, PreparedData
from photon.errors import PhotonError
from photon.objective.base import Objective
from photon.objective.causal_lm import CausalLM
from photon.training.groups import Tensors, kept_names, read_params, write_params

if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: What trains on data of each kind.
_OF_KIND = {"text": "causal_lm", "chat": "sft", "pairs": "dpo", "questions": "lunar"}


def objective_of(config: RunConfig) -> Objective:
    """Return the objective that a configuration names; without one, causal language modelling."""
    if config.objective is None:
        return CausalLM()
    return _objective(config.objective.model_dump_json(by_alias=True))


@lru_cache(maxsize=8)
def _objective(component: str) -> Objective:
    section = Component.model_validate_json(component)
    objective: Objective = build(section.as_mapping(), "objective")
    return objective


def check_arrays(config: RunConfig) -> None:
    """Check that there is data that has what an objective reads.

    Raises
    ------
    PhotonError
        If there is none.
    """
    if unknown := set(objective_of(config).arrays).difference(*ARRAYS.values()):
        raise PhotonError(f"objective: needs the array {min(unknown)}, and no prepared data has it")


def check_adapter(config: RunConfig) -> None:
    """Check that adapters can be made here; which layers they are for is told when the model is built.

    Raises
    ------
    PhotonError
        If their package is not installed.
    """
    from photon.models.adapter import check_peft

    if config.adapter is not None:
        check_peft("adapter")


def check_data(config: RunConfig, data: PreparedData) -> None:
    """Check that an objective reads all that prepared data has, and the data has all that it reads.

    Raises
    ------
    PhotonError
        If not: conversations, with what fills up their windows, are no running text; text has no assistant.
    """
    objective, kind = objective_of(config), data.manifest.kind
    # Of which set a question is need not be read: with their answers they are conversations.
    if {*objective.arrays, "sets"} == {*data.array_names, "sets"} and "sets" in data.array_names:
        return
    if set(objective.arrays) == set(data.array_names):
        return
    needs = next((one for one, names in ARRAYS.items() if set(names) == set(objective.arrays)), None)
    mend = f"train on it with objective={_OF_KIND[kind]}"
    if needs is not None:
        mend = f"it needs data of `photon data prepare --kind {needs}`, or {mend}"
    raise PhotonError(
        f"objective: {type(objective).__name__} cannot train on the {kind} in {data.path}; {mend}"
    )


def model_of(config: RunConfig, vocab_size: int, device: str | torch.device = "cpu") -> "PreTrainedModel":
    """Build the model of a run, with what its objective changes about it.

    Parameters
    ----------
    vocab_size
        Tokens of the tokenizer.
    device
        Where it is built; ``"meta"``: shapes alone.

    Raises
    ------
    PhotonError
        If it cannot be built, or would go on changing a buffer that no step moves.
    """
    # Here, because who asks for an objective alone needs no transformers.
    from photon.models.build import build_model

    model = build_model(config.model, vocab_size, seed=config.seed, device=device)
    built = objective_of(config).build(_with_adapter(model, config.adapter, config.seed))
    for name, module in built.named_modules():
        if getattr(module, "track_running_stats", False):
            raise PhotonError(
                f"model: {name} keeps running statistics, and a run leaves buffers as they are; let it "
                "normalise without (track_running_stats=False)"
            )
    return built


def kept_of(config: RunConfig) -> frozenset[str]:
    """Return the names of the tensors of a run's model that no step moves: frozen parameters, and buffers.

    They are part of the model, so they go wherever it goes, and come out of a run as they went in.
    """
    objective = None if config.objective is None else config.objective.model_dump_json(by_alias=True)
    adapter = None if config.adapter is None else config.adapter.model_dump_json()
    return _kept(config.model.model_dump_json(), objective, adapter)


@lru_cache(maxsize=8)
def _kept(model: str, objective: str | None, adapter: str | None) -> frozenset[str]:
    from photon.models.build import build_model

    # Names do not depend on how many tokens there are.
    built = build_model(ModelSection.model_validate_json(model), 1, seed=0, device="meta")
    section = None if adapter is None else AdapterSection.model_validate_json(adapter)
    built = _with_adapter(built, section, seed=0)
    return kept_names((CausalLM() if objective is None else _objective(objective)).build(built))


def _with_adapter(model: "PreTrainedModel", section: AdapterSection | None, seed: int) -> "PreTrainedModel":
    if section is None:
        return model
    from photon.models.adapter import add_adapter

    return add_adapter(model, section, seed=seed)


def plain_params(config: RunConfig, vocab_size: int, params: Tensors) -> Tensors:
    """Return the parameters of a run's model as the plain model has them, adapters merged.

    Parameters
    ----------
    params
        All that the run's model has, as of `photon.training.groups.read_params`.
    """
    params = objective_of(config).plain(params)
    if config.adapter is None:
        return params
    from photon.models.adapter import merge_adapter

    return read_params(merge_adapter(adapted_model(config, vocab_size, params)))


def adapted_model(config: RunConfig, vocab_size: int, params: Tensors) -> "PreTrainedModel":
    """Return the model with its adapters, and nothing else of a run.

    Parameters
    ----------
    params
        As of `Objective.plain`.
    """
    from photon.models.build import build_model

    model = build_model(config.model, vocab_size, seed=config.seed)
    model = _with_adapter(model, config.adapter, config.seed)
    write_params(model, params)
    return model


def steps_of(config: RunConfig, server_round: int) -> int:
    """Return the local steps of a round; 0 if the objective takes none."""
    return config.steps_of(server_round) if objective_of(config).trains else 0


def steps_after(config: RunConfig, rounds: int) -> int:
    """Return the global step after so many rounds; 0 if the objective takes no steps."""
    return config.steps_after(rounds) if objective_of(config).trains else 0
