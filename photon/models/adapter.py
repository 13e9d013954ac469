"""LoRA (2106.09685) on a causal language model: by ``peft``, inside the model that it is for.

Of a linear layer with the matrix W, which stays as it is,

    y = W x + (alpha / rank) · B A · dropout(x),   A: (rank, inputs),   B: (outputs, rank), zeros at first

so the model begins as what it was. Everything but A and B is frozen.
"""

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from photon.components import nearest
from photon.config.adapter import AdapterSection
from photon.errors import PhotonError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

#: What a folder with an adapter beside a model has, in the format of peft.
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
#: Name of the one adapter.
_NAME = "default"


def check_peft(where: str) -> None:
    """Check that ``peft`` is installed.

    Raises
    ------
    PhotonError
        If it is not.
    """
    try:
        import peft  # noqa: F401 - whether it is there
    except ImportError as error:
        raise PhotonError(f"{where}: needs peft ({error}); pip install 'photon-fl[tune]'") from error


def add_adapter(model: "PreTrainedModel", section: AdapterSection, *, seed: int) -> "PreTrainedModel":
    """Put adapters beside layers of a model, in place, and freeze all else.

    Parameters
    ----------
    model
        A plain causal language model; one of meta tensors gets meta adapters.
    section
        The `adapter` section of the configuration.
    seed
        Of the initial values of A; the global random state is neither read nor changed.

    Raises
    ------
    PhotonError
        If peft is not installed, or a target is no linear layer, or one whose matrix has another use.
    """
    check_peft("adapter")
    from peft import inject_adapter_in_model

    config = _lora(model, section)
    own = {id(parameter) for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of layers whose matrix is the other way round
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in own)
    return model


def has_adapters(model: nn.Module) -> bool:
    """Return whether a model has adapters."""
    return "peft" in sys.modules and any(True for _ in _adapted(model))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute as it would without its adapters, in evaluation mode."""
    layers, training = [layer for _, layer in _adapted(model)], model.training
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


def merge_adapter(model: "PreTrainedModel") -> "PreTrainedModel":
    """Add the adapters to their matrices, W ← W + (alpha / rank) · B A, in place; what is left is plain."""
    for _, layer in _adapted(model):
        layer.merge()
    return _taken_off(model)


def without_adapter(model: "PreTrainedModel") -> tuple["PreTrainedModel", dict[str, Tensor]]:
    """Take the adapters off a model, in place.

    Returns
    -------
    tuple
        The plain model as it was before it got them, and the adapters as peft names them in a file.
    """
    adapters = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part)[_NAME].weight.detach()
        for name, layer in _adapted(model)
        for part in ("lora_A", "lora_B")
    }
    return _taken_off(model), adapters


def save_adapter(
    folder: Path, plain: "PreTrainedModel", section: AdapterSection, adapters: Mapping[str, Tensor]
) -> None:
    """Write adapters beside a model as ``peft`` and ``transformers`` read them."""
    from safetensors.torch import save_file

    config = _lora(plain, section)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.save_pretrained(str(folder))
    whole = {name: tensor.cpu().contiguous() for name, tensor in adapters.items()}
    save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # Sets have no order of their own, and an export is the same bytes every time.
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    values["target_modules"] = sorted(values["target_modules"])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def has_adapter(folder: Path) -> bool:
    """Return whether a model's folder has an adapter beside it, which can be loaded here.

    Raises
    ------
    PhotonError
        If there is one, and peft is not installed: transformers would load the model without it.
    """
    if not (folder / CONFIG_FILE).is_file():
        return False
    check_peft(f"{folder / CONFIG_FILE}")
    return True


def _taken_off(model: "PreTrainedModel") -> "PreTrainedModel":
    for name, layer in list(_adapted(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(model):
            delattr(model, name)
    return model.requires_grad_(True)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _lora(model: "PreTrainedModel", section: AdapterSection) -> "LoraConfig":
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    endings = section.target_modules
    if endings is None:
        endings = sorted({name.rpartition(".")[2] for name, module in linear.items() if module is not head})
    chosen = {name: module for name, module in linear.items() if _ends(name, endings)}
    _check_targets(model, linear, chosen, endings)
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # it computes with it
        lora_dropout=section.dropout,
        target_modules=list(endings),
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in chosen.values()),
        bias="none",
    )


def _check_targets(
    model: "PreTrainedModel", linear: dict[str, Any], chosen: dict[str, Any], endings: list[str]
) -> None:
    """Check that each ending names linear layers, and nothing else."""
    known = sorted({name.rpartition(".")[2] for name in linear})
    for ending in endings:
        if not any(_ends(name, [ending]) for name in linear):
            raise PhotonError(
                f"adapter.target_modules: {ending!r} is no linear layer of this {model.config.model_type}"
                f"{nearest(ending, known)}; it has {', '.join(known) or 'none'}"
            )
    if not chosen:
        raise PhotonError(f"adapter: this {model.config.model_type} has no linear layer to put one beside")
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, module in chosen.items():
        if uses.count(id(module.weight)) > 1:
            raise PhotonError(
                f"adapter.target_modules: {name} shares its matrix with another layer, so an adapter could "
                "not be merged; leave it out"
            )
    for name, module in model.named_modules():
        if _ends(name, endings) and name not in linear and next(module.parameters(False), None) is not None:
            raise PhotonError(f"adapter.target_modules: {name} is a {type(module).__name__}, not linear")


def _ends(name: str, endings: list[str]) -> bool:
    # As peft compares.
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
