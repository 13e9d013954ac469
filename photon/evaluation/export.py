"""Export to the format of Hugging Face: a folder that ``transformers`` loads without Photon."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon.config.adapter import AdapterSection
from photon.config.schema import ModelSection, RunConfig
from photon.errors import PhotonError
from photon.evaluation.load import open_run_checkpoint
from photon.files.atomic import atomic_directory, remove_leftovers
from photon.state.checkpoint import ServerState

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Card = Mapping[str, Mapping[str, object]]
"""Sections of a model card: heading, then what and how much."""

#: The `adapter` section, and tensors as peft names them.
Adapters = tuple[AdapterSection, "Mapping[str, torch.Tensor]"]

_EXPORTED = ("*.json", "*.safetensors", "README.md", "*.txt", "*.jinja", "abbie.py")

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- photon
- federated-learning
---

# {name}

A causal language model trained by Photon, federated pre-training on Flower. This page states facts of the
training run and nothing else.
"""

_BACK = """
## Licence

None was chosen. Whoever publishes this model sets one here, with regard to the text it was trained on.
"""

USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""

_USE_CODE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True, iterations=4)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

Without `iterations` the body is applied as often as in training. `trust_remote_code=True` runs `abbie.py` of
this folder, which is the whole code of the model.
"""

_USE_SPARSE = """
## Use

`photon generate PATH --prompt TEXT` and `photon evaluate PATH --data DIR` open this folder. The file holds,
for each sparse tensor, a bit for each weight and the weights that are not zero.
"""


_ADAPTED = """
The folder has the model as it was before tuning, and beside it the adapters that were tuned. transformers
loads both where `peft` is installed.
"""


def export_run(run_dir: Path, output: Path, *, sparse: bool = False, keep_adapter: bool = False) -> None:
    """Export the newest checkpoint of a run (or the checkpoint that ``run_dir`` is).

    Parameters
    ----------
    run_dir
        Folder of the run.
    output
        Folder to write; an earlier export in it is replaced.
    sparse
        Write the weights that are not zero alone, in a file that Photon opens and ``transformers`` does not.
    keep_adapter
        Write adapters beside the model that they are for, instead of merging them.

    Raises
    ------
    PhotonError
        If the run has no checkpoint or no adapter to keep, its tokenizer is not on this machine, or
        ``output`` holds other files.
    """
    from photon.models.adapter import without_adapter
    from photon.objective.configured import adapted_model, objective_of, plain_params
    from photon.strategy.base import strategy_of
    from photon.training.groups import read_params

    checkpoint, config = open_run_checkpoint(run_dir)
    if config.data.path is None:
        raise PhotonError(f"{run_dir}: the tokenizer stayed with the silos; set data.path to export here")
    tokenizer = Path(config.data.path) / "tokenizer"
    _check_same_tokenizer(tokenizer, checkpoint.state)
    vocab_size = checkpoint.state.vocab_size
    params: Mapping[str, torch.Tensor] = strategy_of(config).exported(checkpoint)
    adapters: Adapters | None = None
    if keep_adapter:
        if config.adapter is None or sparse:
            raise PhotonError(
                f"{run_dir}: --adapter keep: the run has no adapter, or --sparse is set; leave it out"
            )
        plain = objective_of(config).plain(params)
        model, tensors = without_adapter(adapted_model(config, vocab_size, plain))
        params, adapters = read_params(model), (config.adapter, tensors)
    else:
        params = plain_params(config, vocab_size, params)
    card = _card(config, checkpoint.state, _read_summary(run_dir))
    export_model(
        params,
        config.model,
        vocab_size,
        tokenizer,
        output,
        card,
        sparse=sparse,
        adapters=adapters,
        state=checkpoint.state,
    )


def export_model(
    params: "Mapping[str, torch.Tensor]",
    model_section: ModelSection,
    vocab_size: int,
    tokenizer_path: Path,
    output: Path,
    card: Card,
    *,
    sparse: bool = False,
    adapters: "Adapters | None" = None,
    state: ServerState | None = None,
) -> None:
    """Write a model as a Hugging Face folder, whole or not at all.

    Parameters
    ----------
    params
        All parameters by name.
    model_section
        The `model` section that they were trained with.
    vocab_size
        Entries of the tokenizer.
    tokenizer_path
        Folder of the tokenizer; its files are copied as they are.
    output
        Folder to write; an earlier export in it is replaced.
    card
        Facts for the model card, in sections.
    sparse
        As in :func:`export_run`.
    adapters
        What is written beside the model: the `adapter` section, and tensors as peft names them.
    state
        Numbers of the run that it comes from.

    Raises
    ------
    PhotonError
        If the parameters are not the model's, the tokenizer is missing, or ``output`` holds other files.
    """
    from photon.evaluation.sparse_file import NAME as SPARSE
    from photon.evaluation.sparse_file import save_sparse
    from photon.models.adapter import save_adapter
    from photon.models.build import build_model
    from photon.models.pretrained import quiet_transformers
    from photon.training.groups import read_params, write_params

    if not (tokenizer_path / "tokenizer.json").is_file():
        raise PhotonError(f"{tokenizer_path}: no tokenizer.json; the export needs the tokenizer of the data")
    _check_replaceable(output)
    model = build_model(model_section, vocab_size, seed=0)
    write_params(model, params)
    remove_leftovers(output.absolute().parent, output.name)
    with atomic_directory(output.absolute()) as folder, quiet_transformers():
        write_model(folder, model, tokenizer_path)
        if sparse:
            for weights in folder.glob("*.safetensors*"):
                weights.unlink()
            save_sparse(folder / SPARSE, read_params(model))
        if adapters is not None:
            save_adapter(folder, model, *adapters)
        if state is not None:
            state.tell_beside(folder)
        facts = {"Architecture": architecture_facts(model), **card}
        use = _use(model, sparse=sparse, adapted=adapters is not None)
        write_card(folder, _render(model_section.name, facts, use))


def write_model(folder: Path, model: "PreTrainedModel", tokenizer_path: Path) -> None:
    """Write a model and its tokenizer into an empty folder, with what programs expect of both.

    Parameters
    ----------
    folder
        Where to.
    model
        The model, in float32; its special tokens are set to the tokenizer's.
    tokenizer_path
        Folder of the tokenizer; its files are copied as they are.
    """
    for file in sorted(tokenizer_path.iterdir()):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    _set_special_tokens(model, folder)
    _complete_tokenizer_config(model, folder)
    model.save_pretrained(folder)


def write_card(folder: Path, page: str) -> None:
    """Write the model card, and let whoever may read it read the model."""
    (folder / "README.md").write_text(page, encoding="utf-8")
    # Weights are written for their owner alone.
    mode = (folder / "README.md").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)


def _use(model: "PreTrainedModel", *, sparse: bool, adapted: bool) -> str:
    """Return what the card says of how to open the export."""
    from photon.models.abbie import body_of

    if sparse:
        return _USE_SPARSE
    return (_USE_CODE if body_of(model) else USE) + (_ADAPTED if adapted else "")


def _check_replaceable(output: Path) -> None:
    """Refuse to replace anything but an export: the folder may be somebody's."""
    if output.is_dir():
        ours = {file for pattern in _EXPORTED for file in output.glob(pattern)}
        others = sorted(file.name for file in set(output.iterdir()) - ours)
        if not others and (not ours or output / "config.json" in ours):
            return
        found = f" ({', '.join(others[:3])})" if others else ""
        raise PhotonError(f"{output}: holds other files than an export{found}; choose a new folder")
    if output.exists():
        raise PhotonError(f"{output}: is a file; choose a folder")


def _check_same_tokenizer(tokenizer: Path, state: ServerState) -> None:
    from photon.data.prepared import file_sha256

    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise PhotonError(f"{file}: missing; the export needs the tokenizer that the run was trained with")
    if file_sha256(file) != state.tokenizer_sha256:
        raise PhotonError(f"{file}: not the tokenizer that the run was trained with; restore the data")


def _set_special_tokens(model: "PreTrainedModel", folder: Path) -> None:
    """Give the model the ends of text that its tokenizer marks, and turn the cache on again."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name, value in ends.items():
        if value is not None:  # which a few types do not take
            setattr(model.config, name, value)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.eos_token_id)
    if model.config.model_type == "gpt2":
        # What transformers no longer writes, and the converter of llama.cpp reads.
        model.config.n_ctx = model.config.n_positions


def _complete_tokenizer_config(model: "PreTrainedModel", folder: Path) -> None:
    """Say what clients ask a tokenizer for, where its own configuration does not: length and padding."""
    from photon.models.pretrained import positions_of, read_json

    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    wanted = {
        "model_max_length": positions_of(model.config),
        "pad_token": config.get("eos_token"),
    }
    told = {name: value for name, value in wanted.items() if value is not None and config.get(name) is None}
    file.write_text(json.dumps({**config, **told}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def architecture_facts(model: "PreTrainedModel") -> dict[str, object]:
    """Return what a model card says of a model's shape."""
    from photon.models.build import parameter_count
    from photon.models.pretrained import positions_of

    config = model.config
    facts = {
        "type": config.model_type,
        "parameters": parameter_count(model),
        "layers": getattr(config, "num_hidden_layers", None),
        "body": _body(model),
        "width": getattr(config, "hidden_size", None),
        "attention heads": getattr(config, "num_attention_heads", None),
        "positions": positions_of(config),
        "vocabulary": config.vocab_size,
        "weights": "float32",
    }
    return {name: value for name, value in facts.items() if value is not None}


def _body(model: "PreTrainedModel") -> str | None:
    from photon.models.abbie import body_of

    body, config = body_of(model), model.config
    if not body:
        return None
    parts = f"{len(body)} layers after {config.head_blocks} of the head"
    rule = f"{config.variant}, {config.residual_mode}" if config.variant == "D" else config.variant
    return f"{parts}, {config.train_iterations} times in training (AbbIE-{rule})"


def _read_summary(run_dir: Path) -> dict[str, Any]:
    """Return ``summary.json`` of the run, or nothing where the run has not finished."""
    from photon.models.pretrained import read_json

    file = run_dir / "summary.json"
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except PhotonError as error:
        raise PhotonError(f"{error}; remove it to export without figures") from error


def _card(config: RunConfig, state: ServerState, summary: Mapping[str, Any]) -> Card:
    card: dict[str, dict[str, object]] = {
        "Training": {
            "strategy": _call(config.strategy.as_mapping()),
            "rounds": state.round,
            "local steps per round": config.local_steps,
            "silos per round": config.cohort or "all",
            "sequences per local step": config.training.batch_size,
            "tokens per sequence": state.sequence_length,
            "tokens trained": state.tokens,
            "local optimizer": _call(config.optimizer.as_mapping()),
            "outer optimizer": _call(config.outer.as_mapping()),
            "schedule": _call(config.schedule.as_mapping()),
            "gradient norm clipped to": config.training.clip_norm or "not clipped",
            "seed": config.seed,
            **({"adapter": _adapter(config.adapter)} if config.adapter else {}),
        },
        "Tokens by silo": {silo: entry.tokens for silo, entry in sorted(state.ledger.items())},
    }
    if state.unlearned:
        # Steered away from it, which is not deleted.
        card["Answers suppressed on request"] = {
            f"{number}. asked by {one.asked_by}": f"{one.prompts.get('forget')} questions, layer {one.layer}"
            for number, one in enumerate(state.unlearned, 1)
        }
    if summary.get("rounds") == state.round and "perplexity" in summary:
        card["Validation perplexity"] = _perplexities(summary["perplexity"])
    return card


def _call(section: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in section.items() if key != "_target_")
    return f"{section['_target_'].rpartition('.')[2]}({arguments})"


def _adapter(section: AdapterSection) -> str:
    layers = ", ".join(section.target_modules or ["all linear layers but the output"])
    return f"LoRA(rank={section.rank}, alpha={section.alpha:g}, dropout={section.dropout:g}) on {layers}"


def _perplexities(perplexity: Mapping[str, Any]) -> dict[str, object]:
    """Return the final perplexities beside the initial and the unigram's, overall and by silo."""
    rows = {"overall": perplexity, **perplexity.get("per_silo", {})}
    return {
        name: f"{_figure(row['final'])} (before training {_figure(row['initial'])}, unigram model "
        f"{_figure(row['unigram'])})"
        for name, row in rows.items()
    }


def _figure(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" if value < 1e9 else f"{value:.0e}".replace("e+", "e")


def _render(name: str, card: Card, use: str) -> str:
    return "".join([_FRONT.format(name=name), tables(card), _BACK, use])


def tables(card: Card) -> str:
    """Return the sections of a model card, a table each."""
    parts = []
    for heading, facts in card.items():
        if facts:
            rows = "\n".join(f"| {what} | {_cell(value)} |" for what, value in facts.items())
            parts.append(f"\n## {heading}\n\n| | |\n|---|---|\n{rows}\n")
    return "".join(parts)


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", r"\|")
