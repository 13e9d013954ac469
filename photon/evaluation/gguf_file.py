"""Models in GGUF, the format of llama.cpp: read by transformers, and written as a Photon export is."""

import io
import json
import re
import tempfile
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from photon import DISTRIBUTION
from photon.data.prepared import file_sha256
from photon.errors import PhotonError, printable
from photon.evaluation.export import USE, architecture_facts, tables, write_card, write_model
from photon.files.atomic import atomic_directory, remove_leftovers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedModel

_MAGIC = b"GGUF"
#: Byte-level vocabularies that were learnt digit by digit, by their name in ``tokenizer.ggml.pre``; where
#: transformers knows no better, it splits numbers as GPT-2 does.
_SINGLE_DIGITS = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
#: Those that were learnt on text split as GPT-2 does.
_AS_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "trillion"}

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
{licence}---

# {name}

A causal language model that Photon has read from a GGUF file. This page states facts of that file and
nothing else.
"""

_BACK = """
What the file's number formats have lost is not won back.

## Licence

{licence}
"""


def import_gguf(file: Path, output: Path) -> None:
    """Make a Hugging Face folder of a GGUF file, as `photon export` makes one of a run.

    Parameters
    ----------
    file
        A GGUF file, whole, of a causal language model that transformers reads.
    output
        Folder to write; must not exist.

    Raises
    ------
    PhotonError
        If a package is missing, the file is none, is damaged, or says something that transformers would pass
        over, or ``output`` exists or cannot be written.
    """
    from photon.models.pretrained import quiet_transformers

    if output.exists() or output.is_symlink():
        raise PhotonError(f"{printable(output)}: exists already; choose a new folder")
    reader = _opened(file)
    told = _Told(reader)
    # The bar of its progress goes to the terminal past all that transformers lets one set.
    unseen = redirect_stderr(io.StringIO())
    with quiet_transformers(), tempfile.TemporaryDirectory(prefix="photon-gguf-") as made:
        beside = Path(made)
        with unseen:
            tokenizer = _tokenizer(file, told)
            model = _model(file, reader, told)
        entries = told.count("tokenizer.ggml.tokens")
        if entries > model.config.vocab_size:
            raise PhotonError(
                f"{printable(file)}: its tokenizer has {entries:,} entries, and its model "
                f"{model.config.vocab_size:,}"
            )
        tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", None)
        tokenizer.save_pretrained(beside)
        _leave_out_what_is_not_told(beside, entries)
        page = _page(file, reader, told, model)
        try:
            remove_leftovers(output.absolute().parent, output.name)
            with atomic_directory(output.absolute()) as folder:
                write_model(folder, model, beside)
                write_card(folder, page)
        except OSError as error:
            raise PhotonError(f"{printable(output)}: cannot write it ({error.strerror or error})") from error


def _leave_out_what_is_not_told(folder: Path, entries: int) -> None:
    """Take out of a saved tokenizer the tokens that transformers has added, and how it was loaded."""
    file = folder / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    added = {token["content"] for token in saved["added_tokens"] if token["id"] >= entries}
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] < entries]
    file.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {
        name: value
        for name, value in config.items()
        if name not in ("is_local", "local_files_only") and not (isinstance(value, str) and value in added)
    }
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _Told:
    """What a GGUF file says of itself, by key."""

    def __init__(self, reader: "GGUFReader") -> None:
        self._fields = reader.fields

    def get(self, key: str) -> Any:
        field = self._fields.get(key)
        return None if field is None else field.contents()

    def count(self, key: str) -> int:
        """Return the length of a list."""
        return len(self._fields[key].data) if key in self._fields else 0

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture"))


def _opened(file: Path) -> "GGUFReader":
    shown = printable(file)
    if file.exists() and not file.is_file():
        raise PhotonError(f"{shown}: not a regular file")
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_MAGIC))
    except OSError as error:
        raise PhotonError(f"{shown}: cannot read it ({error.strerror})") from error
    if magic != _MAGIC:
        raise PhotonError(f"{shown}: not a GGUF file")
    try:
        # transformers loads such a file through accelerate.
        import accelerate  # noqa: F401
        from gguf import GGUFReader
    except ImportError:
        raise PhotonError(
            f"{shown}: reading GGUF needs more packages; run: pip install '{DISTRIBUTION}[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
        told = _Told(reader)
        if not isinstance(told.get("general.architecture"), str):
            raise ValueError("no general.architecture")
    except Exception as error:  # it trusts a file to be whole, and fails wherever that is not so
        raise PhotonError(f"{shown}: a damaged GGUF file, or not all of it ({_why(error)})") from error
    return reader


def _tokenizer(file: Path, told: _Told) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what it raises depends on what the file says
        raise _unreadable(file, told, error) from error
    if tokenizer.eos_token_id is None:
        raise PhotonError(f"{printable(file)}: its tokenizer names no token that ends a text (eos_token_id)")
    split = told.get("tokenizer.ggml.pre")
    if told.get("tokenizer.ggml.model") != "gpt2" or split is None:
        return tokenizer
    if split in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _AS_GPT2:
        raise PhotonError(
            f"{printable(file)}: its tokenizer splits text as {printable(split)!r} does, which is not known "
            "here, so the model would be given other tokens than it was trained on"
        )
    return tokenizer


def _model(file: Path, reader: "GGUFReader", told: _Told) -> "PreTrainedModel":
    """Return the model in float32, if all that the file has is in it and nothing else is."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # what it raises depends on what the file says
        raise _unreadable(file, told, error) from error
    loaded, report = result
    problems = sorted({*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])})
    if problems:
        raise PhotonError(f"{printable(file)}: lacks {printable(problems[0])}, or has it in another shape")
    _check_all_is_read(file, reader, told, loaded)
    # What transformers has loaded from GGUF it does not save; a model that shares its tensors it does.
    for name in ("quantization_config", "_model_name_or_path"):
        vars(loaded.config).pop(name, None)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    built: PreTrainedModel = model
    return built


def _check_all_is_read(file: Path, reader: "GGUFReader", told: _Told, model: "PreTrainedModel") -> None:
    """Refuse a file of which transformers has passed something over: the model would be another one."""
    shown = printable(file)
    there = sum(int(tensor.n_elements) for tensor in reader.tensors)
    read = sum(parameter.numel() for parameter in model.parameters())
    if there != read:
        raise PhotonError(
            f"{shown}: has {there:,} numbers, and transformers makes a model of {read:,} of it, so it "
            f"would be another one ({printable(told.architecture)})"
        )
    scaling = told.get(f"{told.architecture}.rope.scaling.type")
    positions = getattr(model.config, "rope_parameters", None) or {}
    if scaling not in (None, "none") and positions.get("rope_type", "default") == "default":
        raise PhotonError(
            f"{shown}: stretches its positions ({printable(scaling)}), which transformers passes over"
        )


def _unreadable(file: Path, told: _Told, error: Exception) -> PhotonError:
    return PhotonError(
        f"{printable(file)}: transformers cannot read this {printable(told.architecture)} ({_why(error)})"
    )


def _why(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def _page(file: Path, reader: "GGUFReader", told: _Told, model: "PreTrainedModel") -> str:
    licence = told.get("general.license")
    formats = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    facts: dict[str, dict[str, object]] = {
        "File": {
            "name": printable(file.name),
            "SHA-256": file_sha256(file),
            "model, as the file calls it": printable(told.get("general.name") or "no name"),
            "number formats": ", ".join(
                f"{count} tensors in {name}" for name, count in formats.most_common()
            ),
        },
        "Architecture": architecture_facts(model),
    }
    # On a page that says more, a name has to be one.
    known = isinstance(licence, str) and re.fullmatch(r"[\w.-]{1,60}", licence) is not None
    front = f"license: {licence}\n" if known else ""
    named = (
        f"{licence}, as the file says." if known else "The file names none. Whoever publishes this finds out."
    )
    name = printable(told.get("general.name") or file.stem)
    return "".join([_FRONT.format(licence=front, name=name), tables(facts), _BACK.format(licence=named), USE])
