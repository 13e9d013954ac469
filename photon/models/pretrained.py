"""Folders in the format of Hugging Face: a ``config.json`` beside safetensors weights."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from photon.config.floats import untagged
from photon.errors import PhotonError
from photon.files.json_object import read_object
from photon.models.abbie import (
    AbbieGPT2Config,
    AbbieGPT2LMHeadModel,
    AbbieLlamaConfig,
    AbbieLlamaForCausalLM,
)
from photon.models.adapter import has_adapter, merge_adapter
from photon.models.fields import COUNTED_FROM_PADDING

#: By the type of its blocks: what AbbIE's configuration is.
ABBIE: dict[str, Any] = {"gpt2": AbbieGPT2Config, "llama": AbbieLlamaConfig}


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a model can be given at once; None where there is no such bound."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "model_type", None) not in COUNTED_FROM_PADDING:
        return positions
    # These have positions that are no token's, up to the padding's.
    return positions - (0 if config.pad_token_id is None else config.pad_token_id + 1)


def _register(config: Any, model: Any) -> None:
    """Let transformers build and load a model that is not its own, and save it with its code."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForCausalLM")


_register(AbbieGPT2Config, AbbieGPT2LMHeadModel)
_register(AbbieLlamaConfig, AbbieLlamaForCausalLM)

#: Masks, positions and rotations that earlier versions of transformers saved with a model.
_TABLES = {
    "_float_tensor",
    "causal_mask",
    "cos_cached",
    "embed_positions",
    "inv_freq",
    "masked_bias",
    "original_inv_freq",
    "position_ids",
    "sin_cached",
    "token_type_ids",
}


#: Fields in which a model may differ from the one whose weights it begins with: what is of training, of a
#: tokenizer or of bookkeeping, and sizes, since weights of other sizes are named by their shapes.
_FREE = re.compile(
    r"drop|initiali|cache|token|dtype|tie_|architectures|version|aux_loss|router_logits|jitter|vocab"
    r"|position_embeddings$|n_positions|n_ctx|n_inner|intermediate_size|chunk_size|pretraining_tp|summary_|label"
    r"|is_decoder|fp32|upcast|output_|return_dict|problem_type|name_or_path|implementation|iterations|model_type|cross_attention"
)


def load_warm_start(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the weights of a Hugging Face folder into a model of the given configuration, in float32.

    Adapters that lie beside them are merged.

    Parameters
    ----------
    path
        Folder that ``save_pretrained`` wrote, with safetensors weights.
    config
        Configuration of the model to train.

    Raises
    ------
    PhotonError
        If the folder is missing or broken, or a weight is missing, unknown or of another shape.
    """
    read_model_config(path)
    adapted = has_adapter(path)
    try:
        with quiet_transformers():
            result: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # safetensors raises a type of its own that derives from Exception alone
        raise PhotonError(f"{path}: cannot load the weights ({first_line(error)})") from error
    loaded, report = result
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise PhotonError(
            f"{path}: {name} has shape {tuple(found)}, but the model section asks for {tuple(wanted)}; "
            "use model=custom, which takes the architecture from the warm start"
        )
    unexpected = sorted(report["unexpected_keys"])
    obsolete = [name for name in unexpected if _is_obsolete(name, loaded)]
    for names, verb in (
        (sorted(report["missing_keys"]), "lacks"),
        ([name for name in unexpected if name not in obsolete], "has the unknown weight"),
    ):
        for name in names:
            raise PhotonError(f"{path}: {verb} {name}; it is not a {config.model_type} of this architecture")
    _check_alike(path, config)
    if obsolete:
        logging.getLogger(__name__).warning(
            "%s: %s was left out (%d such): a table that earlier versions of transformers saved",
            path,
            obsolete[0],
            len(obsolete),
        )
    if adapted:
        loaded = merge_adapter(loaded)
    _freeze_as_built(loaded)
    return loaded


def _check_alike(path: Path, config: PreTrainedConfig) -> None:
    """Check that a model computes with a folder's weights what they were trained for.

    Raises
    ------
    PhotonError
        If a field differs that no shape tells of, such as the activation or the number of heads.
    """
    saved, wanted = (one.to_dict() for one in (_config(path), config))
    for name in sorted(saved.keys() & wanted.keys()):
        if saved[name] != wanted[name] and not _FREE.search(name):
            raise PhotonError(
                f"{path}: its weights were trained with {name}={saved[name]}, and the model section has "
                f"{wanted[name]}; use model=custom, which takes the architecture from the warm start, or set "
                "it alike"
            )


def _freeze_as_built(loaded: PreTrainedModel) -> None:
    """Let those parameters train that the class lets train: what was loaded into them does not say."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=False)
    trains = {name: parameter.requires_grad for name, parameter in built.named_parameters()}
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_(trains.get(name, True))


def _is_obsolete(name: str, model: nn.Module) -> bool:
    """Return whether a tensor of a file is a table that a module of the model now makes by itself."""
    module, _, leaf = name.rpartition(".")
    owner = dict(model.named_modules()).get(module)
    if owner is None:
        return False
    # A causal mask is called as the bias of a layer is, and no layer has modules within.
    return leaf in _TABLES or (leaf == "bias" and any(True for _ in owner.children()))


def load_pretrained(path: Path) -> PreTrainedModel:
    """Load a Hugging Face folder's causal language model in float32, with the configuration beside it.

    Raises
    ------
    PhotonError
        If the folder is missing or broken.
    """
    return load_warm_start(path, _config(path))


def build_pretrained(path: Path) -> PreTrainedModel:
    """Build the model of a Hugging Face folder's ``config.json`` in float32, without its weights.

    Raises
    ------
    PhotonError
        If the folder is missing or broken.
    """
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            _config(path), dtype=torch.float32, trust_remote_code=False
        )
    return model


def _config(path: Path) -> PreTrainedConfig:
    read_model_config(path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what a broken config raises depends on what is broken in it
        raise PhotonError(f"{path / 'config.json'}: transformers refuses it ({first_line(error)})") from error
    return config


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Hugging Face folder.

    Raises
    ------
    PhotonError
        If the folder is none, or its weights are missing or not safetensors.
    """
    if not folder.is_dir():
        raise PhotonError(f"{folder}: no such folder; expected a model that save_pretrained wrote")
    fields = read_json(folder / "config.json")
    if not list(folder.glob("*.safetensors")):
        raise PhotonError(f"{folder}: no *.safetensors in it; save the model again with save_pretrained")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise :class:`PhotonError` that names the file."""
    return cast(dict[str, Any], untagged(read_object(path)))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; errors still come through."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
