"""Decoder-only language models: from the `model` section of the configuration to a ``transformers`` model.

Whatever causal language model ``transformers`` knows can be trained. The initial weights are the model
class's own (for GPT-2: normal with standard deviation ``initializer_range``, scaled down by the square root
of the number of residual branches where a branch is added back).
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from photon.components import nearest
from photon.config.abbie import AbbieSection
from photon.config.floats import untagged
from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.models.fields import WRITTEN, Fields, difference, written
from photon.models.pretrained import ABBIE, first_line, load_warm_start, read_json, read_model_config

VOCABULARY_MULTIPLE = 64
"""Rows of an embedding are padded to this multiple: matrix kernels are slow on odd widths."""


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
        loaded = load_warm_start(Path(model.warm_start), config)
        _check_tied(loaded, model, config)
        return nn.Module.to(loaded, device)
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
    values, where, strict = _described(model)
    model_type = values.pop("model_type", None)
    kind = _kind(model, model_type, where)
    fields = Fields(kind, values)
    if not fields.has("vocab_size"):
        raise PhotonError(
            f"{where}: {model_type} is not a text model by itself; name the type of its text part"
        )
    fields.check(where, strict=strict)
    _iterate(model, fields, where, strict=strict)
    # A configuration without weights says nothing of this tokenizer's vocabulary.
    own = fields.get("vocab_size") if model.config_file is None else None
    rows = _vocabulary_rows(model, vocab_size, own)
    fields.put("vocab_size", rows)
    fields.leave_tokens_open(model_type, vocab_size, rows)
    if fields.has("max_position_embeddings"):
        before = fields.positions_before(model_type)
        if fields.get("max_position_embeddings") is None:
            fields.put("max_position_embeddings", model.sequence_length + before)
        _check_positions(model, fields.get("max_position_embeddings"), before, where)
    for name, value in {"use_cache": False, "is_decoder": True}.items():
        if fields.has(name):
            fields.put(name, value)
    try:
        return kind(**fields.values)
    except Exception as error:  # each of its configurations has checks and arithmetic of its own
        raise PhotonError(f"{where}: {model_type} refuses it ({_all_lines(error):.500})") from error


def _kind(model: ModelSection, model_type: Any, where: str) -> Any:
    """Return the class of the configuration."""
    # What was saved as AbbIE says so in its type; in a run the section does.
    saved = next((kind for kind in ABBIE.values() if kind.model_type == model_type), None)
    if saved is not None and model.architecture is None:
        return saved
    if saved is not None:
        raise PhotonError(
            f"{where}: model_type={model_type} is not set here; give the type of its blocks, and model.abbie"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise PhotonError(
            f"{where}: model_type={model_type!r} is no causal language model of transformers"
            f"{nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    if model.abbie is None:
        return CONFIG_MAPPING[model_type]
    if model_type not in ABBIE:
        raise PhotonError(
            f"model.abbie: {where} has blocks of {model_type}; those of {' and '.join(ABBIE)} can iterate"
        )
    return ABBIE[model_type]


def _iterate(model: ModelSection, fields: Fields, where: str, *, strict: bool) -> None:
    """Say how the model iterates, if it does."""
    if not fields.has("train_iterations"):
        return
    # A run counts in its own iterations, whatever a file has been tried with.
    fields.put("iterations", None)
    for name, value in (model.abbie.model_dump() if model.abbie else {}).items():
        if strict and fields.get(name) is not None:
            raise PhotonError(f"{where}.{name}: set model.abbie.{name} instead")
        fields.put(name, value)


def self_contained(model: ModelSection, vocab_size: int) -> ModelSection:
    """Return the section with everything that it takes from files written out.

    A silo can build the model from it without the server's disk: ``config_file`` and ``warm_start`` are
    gone, ``architecture`` and ``vocab_size`` are there.
    """
    config = transformers_config(model, vocab_size)
    architecture = {key: value for key, value in written(config).items() if key != "vocab_size"}
    abbie = None
    if type(config) in ABBIE.values():
        architecture.pop("iterations", None)
        abbie = AbbieSection(**{name: architecture.pop(name) for name in AbbieSection.model_fields})
        architecture["model_type"] = config.model_type.removeprefix("abbie_")
    section = model.model_copy(
        update={
            "architecture": architecture,
            "abbie": abbie,
            "config_file": None,
            "warm_start": None,
            "vocab_size": config.vocab_size,
        }
    )
    if lost := difference(config, transformers_config(section, vocab_size)):
        raise PhotonError(
            f"model: transformers does not read {', '.join(lost)} of a {config.model_type} as it writes it, "
            "so silos would build another model; leave that out, or choose another type"
        )
    return section


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
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise PhotonError(
                f"model={model.name}: this machine has not the memory for it, with model.sequence_length="
                f"{model.sequence_length}; choose a smaller model, or shorten the sequences"
            ) from error
        raise PhotonError(f"model={model.name}: transformers refuses it ({first_line(error)})") from error


def _check_tied(loaded: nn.Module, model: ModelSection, config: PreTrainedConfig) -> None:
    """Check that what the architecture ties is one in the warm start, too: silos see the architecture alone.

    Raises
    ------
    PhotonError
        If the folder has another value for it: transformers then leaves them apart.
    """
    with torch.device("meta"):
        names = dict(_construct(model, config).named_parameters())
    for name, _ in loaded.named_parameters():
        if name not in names:
            raise PhotonError(
                f"{model.warm_start}: has a {name} of its own, which the model section ties to another "
                "weight; set tie_word_embeddings=false in the architecture"
            )


def _described(model: ModelSection) -> tuple[dict[str, Any], str, bool]:
    """Return the fields of the architecture, the name of the place that they come from, and who wrote them.

    The last is whether a person did, so that an unknown field is a mistake.
    """
    if model.architecture is not None and model.config_file is not None:
        raise PhotonError(
            "model.config_file: the preset has an architecture already; use model=custom with it"
        )
    if model.architecture is not None:
        fields = untagged(model.architecture)
        return fields, "model.architecture", WRITTEN not in fields
    if model.config_file is not None:
        return read_json(Path(model.config_file)), model.config_file, False
    if model.warm_start is not None:
        return read_model_config(Path(model.warm_start)), model.warm_start, False
    raise PhotonError("model: no architecture; set model.config_file or model.warm_start, or choose a preset")


def _vocabulary_rows(model: ModelSection, vocab_size: int, own: int | None) -> int:
    """Return the rows of the embedding: as set, else the architecture's own, else the padded tokenizer's."""
    if model.architecture is not None and own is not None:
        raise PhotonError("model.architecture.vocab_size: set model.vocab_size instead")
    padded = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    rows = model.vocab_size or own or padded
    if rows < vocab_size:
        source = "model.vocab_size" if model.vocab_size else str(model.warm_start)
        raise PhotonError(
            f"{source}: a vocabulary of {rows} is smaller than the tokenizer, which has {vocab_size} entries"
        )
    return rows


def _check_positions(model: ModelSection, positions: Any, before: int, where: str) -> None:
    if isinstance(positions, int) and positions - before < model.sequence_length:
        raise PhotonError(
            f"model.sequence_length={model.sequence_length}: {where} has only {positions - before} "
            "positions; shorten the sequences"
        )


def _all_lines(error: BaseException) -> str:
    return " ".join(str(error).split())
