"""Folders in the format of Hugging Face: a ``config.json`` beside safetensors weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from photon.errors import PhotonError


def load_warm_start(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load the weights of a Hugging Face folder into a model of the given configuration, in float32.

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
    for kind, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has the unknown weight")):
        for name in sorted(report[kind]):
            raise PhotonError(f"{path}: {verb} {name}; it is not a {config.model_type} of this architecture")
    return loaded


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
    if path.exists() and not path.is_file():
        raise PhotonError(f"{path}: not a regular file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PhotonError(f"{path}: cannot read it ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PhotonError(f"{path}: not JSON ({first_line(error)})") from error
    if not isinstance(fields, dict):
        raise PhotonError(f"{path}: expected a JSON object, found a {type(fields).__name__}")
    return fields


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; errors still come through."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
