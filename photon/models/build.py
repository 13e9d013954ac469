"""Decoder-only language models: from the `model` section of the configuration to a ``transformers`` model.

Whatever causal language model ``transformers`` knows can be trained. The initial weights are the model
class's own (for GPT-2: normal with standard deviation ``initializer_range``, scaled down by the square root
of the number of residual branches where a branch is added back).
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from photon.components import nearest
from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.models.pretrained import first_line, load_warm_start, read_json, read_model_config

VOCABULARY_MULTIPLE = 64
"""Rows of an embedding are padded to this multiple: matrix kernels are slow on odd widths."""

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# How a file's field must look like a known one to be taken for a misspelling of it.
_MISSPELT = 0.85


def build_model(
    model: ModelSection, vocab_size: int, *, seed: int, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Build the model in float32, with seeded initial weights or those of `warm_start`.

    The weights depend on the section, ``vocab_size`` and ``seed`` alone: they are drawn on the CPU whatever
    the device, and the global random state is neither read nor changed.

    Parameters
    ----------
    model
        The `model` section of the configuration.
    vocab_size
        Number of entries of the tokenizer.
    seed
        Seed of the initial weights.
    device
        Where the model is to live; ``"meta"`` gives the shapes alone, at no cost.

    Raises
    ------
    PhotonError
        If the section does not describe a causal language model, or the warm start does not fit it.
    """
    config = transformers_config(model, vocab_size)
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            return _construct(model, config)
    if model.warm_start:
        return nn.Module.to(load_warm_start(Path(model.warm_start), config), device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        built = _construct(model, config)
    return nn.Module.to(built, device)


def transformers_config(model: ModelSection, vocab_size: int) -> PreTrainedConfig:
    """Return the ``transformers`` configuration that the section describes.

    Positions default to ``model.sequence_length``; special tokens are left open, because they belong to the
    tokenizer, and a cache is off, because training has no use for one.

    Parameters
    ----------
    model
        The `model` section. Its architecture comes from ``architecture``, ``config_file`` or, if neither is
        set, from the folder ``warm_start``.
    vocab_size
        Number of entries of the tokenizer.

    Raises
    ------
    PhotonError
        For an unknown model type or field (the nearest valid one is named), a field that the model refuses,
        too small a vocabulary, or positions fewer than ``model.sequence_length``.
    """
    fields, where = _described(model)
    model_type = fields.pop("model_type", None)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise PhotonError(
            f"{where}: model_type={model_type!r} is no causal language model of transformers"
            f"{nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    kind: Any = CONFIG_MAPPING[model_type]
    known = _known_fields(kind)
    if not {"vocab_size", "num_hidden_layers"} <= known:
        raise PhotonError(
            f"{where}: {model_type} is not a text model by itself; name the type of its text part"
        )
    _check_fields(fields, known, where, strict=model.architecture is not None)

    rows = _vocabulary_rows(model, vocab_size, fields.pop("vocab_size", None))
    aliases = kind.attribute_map
    positions = aliases.get("max_position_embeddings", "max_position_embeddings")
    if "max_position_embeddings" in known:
        fields.setdefault(positions, model.sequence_length)
        _check_positions(model, fields[positions], where)
    for name, value in (dict.fromkeys(_TOKEN_IDS) | {"use_cache": False, "is_decoder": True}).items():
        if name in known:
            fields[name] = value
    try:
        return kind(vocab_size=rows, **fields)
    except Exception as error:  # each of its configurations has checks and arithmetic of its own
        raise PhotonError(f"{where}: {model_type} refuses it ({_all_lines(error):.500})") from error


def self_contained(model: ModelSection, vocab_size: int) -> ModelSection:
    """Return the section with everything that it takes from files written out.

    A silo can build the model from it without the server's disk: ``config_file`` and ``warm_start`` are
    gone, ``architecture`` and ``vocab_size`` are there.
    """
    config = transformers_config(model, vocab_size)
    dropped = {"vocab_size", "transformers_version", "use_cache", "is_decoder", *_TOKEN_IDS}
    kept = _known_fields(type(config)) - dropped  # a few types also write down what they derive
    architecture = {key: value for key, value in config.to_diff_dict().items() if key in kept}
    return model.model_copy(
        update={
            "architecture": {"model_type": config.model_type} | architecture,
            "config_file": None,
            "warm_start": None,
            "vocab_size": config.vocab_size,
        }
    )


def without_files(model: ModelSection) -> ModelSection:
    """Return the section with what it takes from files written out, before a tokenizer is known."""
    if model.config_file is None and model.warm_start is None:
        return model
    # The size of the vocabulary is not known yet: it stays as it is set.
    written = self_contained(model, model.vocab_size or 1)
    return written.model_copy(update={"vocab_size": model.vocab_size})


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; a weight that is used twice (tied) counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _construct(model: ModelSection, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except PhotonError:
        raise
    except Exception as error:  # each of its models has asserts, indices and arithmetic of its own
        raise PhotonError(f"model={model.name}: transformers refuses it ({first_line(error)})") from error


def _described(model: ModelSection) -> tuple[dict[str, Any], str]:
    """Return the fields of the architecture and the name of the place that they come from."""
    if model.architecture is not None and model.config_file is not None:
        raise PhotonError(
            "model.config_file: the preset has an architecture already; use model=custom with it"
        )
    if model.architecture is not None:
        if "vocab_size" in model.architecture:
            raise PhotonError("model.architecture.vocab_size: set model.vocab_size instead")
        return dict(model.architecture), "model.architecture"
    if model.config_file is not None:
        fields = read_json(Path(model.config_file))
        fields.pop("vocab_size", None)
        return fields, model.config_file
    if model.warm_start is not None:
        return read_model_config(Path(model.warm_start)), model.warm_start
    raise PhotonError("model: no architecture; set model.config_file or model.warm_start, or choose a preset")


def _known_fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)


def _check_fields(fields: dict[str, Any], known: set[str], where: str, *, strict: bool) -> None:
    """Refuse fields that transformers would swallow without a word.

    A file from elsewhere may carry fields of older versions, so there only what looks like a misspelling
    of a field that is not set is refused.
    """
    for name in fields:
        if name in known:
            continue
        if strict:
            raise PhotonError(f"{where}.{name}: unknown field{nearest(name, known)}")
        if close := difflib.get_close_matches(name, sorted(known - set(fields)), n=1, cutoff=_MISSPELT):
            raise PhotonError(f"{where}: unknown field '{name}'; did you mean '{close[0]}'?")


def _vocabulary_rows(model: ModelSection, vocab_size: int, warm: int | None) -> int:
    """Return the rows of the embedding: as set, else the warm start's, else the padded tokenizer's."""
    padded = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    rows = model.vocab_size or warm or padded
    if rows < vocab_size:
        source = "model.vocab_size" if model.vocab_size else str(model.warm_start)
        raise PhotonError(
            f"{source}: a vocabulary of {rows} is smaller than the tokenizer, which has {vocab_size} entries"
        )
    return rows


def _check_positions(model: ModelSection, positions: Any, where: str) -> None:
    if isinstance(positions, int) and positions < model.sequence_length:
        raise PhotonError(
            f"model.sequence_length={model.sequence_length}: {where} has only {positions} positions; "
            "shorten the sequences"
        )


def _all_lines(error: BaseException) -> str:
    return " ".join(str(error).split())
