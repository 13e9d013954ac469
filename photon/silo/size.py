"""How large what a configuration asks for is, read from its numbers before anything is built of them.

A field of a model's architecture is judged by its name: transformers has some two hundred kinds of models,
and each builds what its own fields say. What no name tells is a width.
"""

import re
from collections.abc import Iterator
from typing import Any

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.models.fields import is_fetching

#: What the name of a field says of its number, by rule: the first that is found counts.
_FIELDS = (
    ("max_vocabulary", re.compile(r"vocab|_words|_token|_id$|_index$")),
    ("max_sequence_length", re.compile(r"position|_len$|length|window|ctx")),
    ("max_layers", re.compile(r"layers|blocks|stack|(^|_)depth(_|$)")),
    ("max_width", re.compile(r"size|dim|embd|width|inner|rank|channel|_topk")),
    ("max_experts", re.compile(r"expert|head")),
    ("max_layers", re.compile(r"layer|block|^n_|^num_|^number_")),
)
#: These are numbers to compute with, not of things.
_NUMBERS = re.compile(r"theta|seed|scal|factor")
#: Models that fill a table of positions and widths number by number, and the largest such table.
_TABLED, _LARGEST_TABLE = {"xlm", "flaubert", "pegasus", "marian", "informer"}, 2**22


def check_architecture(config: RunConfig) -> None:
    """Check that a model that came is described in full, and by nothing that is fetched or read from here.

    Raises
    ------
    PhotonError
        If it is to be read from a file, or has a field by which code would be fetched.
    """
    model = config.model
    for key in ("config_file", "warm_start"):
        if getattr(model, key) is not None:
            raise PhotonError(
                f"model.{key}: a request brings the fields of its model, and names no file; the aggregator's "
                "photon writes them out"
            )
    for where, name, value in _fields(model.architecture or {}, "model.architecture"):
        if is_fetching(name, value):
            raise PhotonError(
                f"{where}: code, a path or the name of a repository, which is not taken from elsewhere; "
                "remove the field"
            )
    if (model.architecture or {}).get("model_type") in _TABLED:
        sizes = list(sizes_of(config))
        positions, width = (
            max((size for rule, _, size in sizes if rule == wanted), default=0)
            for wanted in ("max_sequence_length", "max_width")
        )
        if positions * width > _LARGEST_TABLE:
            raise PhotonError(
                f"model.architecture: {positions:,} positions of a width of {width:,}, which this type of "
                "model computes one by one; choose fewer, or another type"
            )


def sizes_of(config: RunConfig) -> Iterator[tuple[str, str, int]]:
    """Yield what a run's numbers ask for: the rule that each falls under, its key, and the number."""
    model = config.model
    yield "max_sequence_length", "model.sequence_length", model.sequence_length
    if model.vocab_size is not None:
        yield "max_vocabulary", "model.vocab_size", model.vocab_size
    if model.abbie is not None:
        # What a token passes through costs time and memory as so many blocks do.
        once = model.abbie.head_blocks + model.abbie.tail_blocks
        depth = once + model.abbie.train_iterations * model.abbie.body_blocks
        yield "max_layers", "model.abbie.train_iterations", depth
    if config.adapter is not None:
        yield "max_width", "adapter.rank", config.adapter.rank
    yield "max_batch_size", "training.batch_size", config.training.batch_size
    yield "max_batch_size", "evaluation.batch_size", config.evaluation.batch_size
    yield "max_processes", "training.processes", config.training.processes
    for where, name, value in _fields(model.architecture or {}, "model.architecture"):
        if isinstance(value, list | tuple):
            # One entry a layer, of whatever a layer has.
            yield "max_layers", where, len(value)
        elif isinstance(value, int) and not isinstance(value, bool) and not _NUMBERS.search(name):
            rule = next((rule for rule, found in _FIELDS if found.search(name)), "max_width")
            yield rule, where, abs(value)


def _fields(value: Any, where: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield every field and entry below a value: where it is, the name of its field, and what it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{where}.{key}", str(key), inner
            yield from _fields(inner, f"{where}.{key}", str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield where, name, inner
            yield from _fields(inner, where, name)
