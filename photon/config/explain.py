"""One line for each error of a configuration: what is wrong, where, and the nearest valid word."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from photon.components import nearest
from photon.config import folders
from photon.config.renamed import is_called, renamed
from photon.config.schema import known_keys


def explain_hydra_error(error: Exception, overrides: Sequence[str] = ()) -> str:
    """Return one line for a Hydra error of what overrides compose, with the nearest valid key or option."""
    messages = [str(error)]
    cause = error.__cause__ or error.__context__
    if cause is not None:
        messages.append(str(cause))
    text = "\n".join(messages)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        group = key.partition(".")[0]
        if any(override.lstrip("+").startswith(f"{group}._target_=") for override in overrides):
            return f"{key}: no key of conf/{group}; write +{key}=… if {group}._target_ takes it"
        return _unknown_key(key)
    if match := re.search(r"In '[^']*': Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        return no_option(group, option)
    return f"config: {first_line(error)}"


#: What looks like the path of a class.
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def group_options(group: str) -> list[str]:
    """Return the options of a group of ``conf/``."""
    return sorted(file.stem for file in (folders.conf_dir() / group).glob("*.yaml")) if group else []


def no_option(group: str, option: Any) -> str:
    """Return one line for an option that a group does not have."""
    options = group_options(group)
    there_are = f" (there are: {', '.join(options)})" if options else ""
    own = f"; a class of your own is {group}._target_={option}" if _CLASS.fullmatch(str(option)) else ""
    return f"{group}={option}: no such option{own or nearest(str(option), options)}{there_are}"


def _unknown_key(key: str) -> str:
    """Return one line for a key that the composed configuration does not have."""
    group = key.partition(".")[0]
    having = sorted(one.stem for one, keys in _option_keys() if one.parent.name == group and key in keys)
    if having:
        return f"{key}: not a key of this {group}; those that have it: {', '.join(having)}"
    others = {one for one in _default_keys() if not f"{key}.".startswith(f"{one}.")}
    return f"{key}: unknown key{nearest(key, others)}"


def _default_keys() -> set[str]:
    """Return every dotted key of the default configuration, of the groups' options, and of the schema."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import DictConfig

    with initialize_config_dir(str(folders.conf_dir()), version_base="1.3"):
        default = hydra_compose("config")
    keys = set(known_keys()).union(*(keys for _, keys in _option_keys()))

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            keys.add(f"{prefix}{key}")
            if isinstance(child := node._get_node(key), DictConfig):
                walk(child, f"{prefix}{key}.")

    walk(default, "")
    return {key for key in keys if not key.endswith("_target_")}


def _option_keys() -> Iterator[tuple[Path, set[str]]]:
    """Yield every option of every group, and the dotted keys that its file gives."""
    for option in folders.conf_dir().glob("*/*.yaml"):
        text = option.read_text()
        values = {key: value for key, value in (yaml.safe_load(text) or {}).items() if key != "defaults"}
        yield option, set(_dotted(values, "" if "@package _global_" in text else f"{option.parent.name}."))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


#: Keys that a message names where many are missing.
_NAMED = 3
#: How pydantic names the alternatives of a union.
_ALTERNATIVE = r"(int|float|str|bool)|(literal|dict|list)\[.*\]"


def explain_validation(error: ValidationError, known: Collection[str]) -> str:
    """Return one line for a value that does not fit its schema, whose keys are ``known``."""
    problems: dict[str, list[str]] = {}
    if missing := [".".join(map(str, item["loc"])) for item in error.errors() if item["type"] == "missing"]:
        problems[missing_keys(missing)] = []
    for item in error.errors():
        # The alternatives of a key, such as a number or `auto`, are no part of its name.
        where = ".".join(part for part in map(str, item["loc"]) if not re.fullmatch(_ALTERNATIVE, part))
        if item["type"] == "extra_forbidden":
            new = renamed().key(where)
            unknown = f"{where}: unknown key{nearest(where, known)}"
            problems[unknown if new is None else is_called(where, new)] = []
        elif item["type"] == "missing":
            continue
        elif item["type"] == "value_error":
            problems[str(item["ctx"]["error"])] = []
        else:
            told = f"{item['msg'][0].lower()}{item['msg'][1:]}"
            problems.setdefault(f"{where}={item['input']!r}: ", []).append(told)
    return "; ".join(
        what + " or ".join([told[0], *(one.removeprefix("input should be ") for one in told[1:])])
        if told
        else what
        for what, told in problems.items()
    )


def explain_unresolved(error: Exception, there: Callable[[str], bool]) -> str:
    """Return one line for a value that is taken from a key which is not ``there``."""
    match = re.search(r"Interpolation key '([^']+)' not found", str(error))
    if match is None:
        return f"config: {first_line(error)}"
    parts = match[1].split(".")
    # A group that was deleted has none of its keys.
    above = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return missing_keys([next((one for one in above if not there(one)), match[1])])


def missing_keys(keys: Sequence[str]) -> str:
    """Return one line for keys that a configuration lacks, of which the first are named."""
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return (
        f"{', '.join(keys[:_NAMED])}{more}: missing; every key has a default in conf/, so remove the "
        "deletion, or take the whole file where a part of it is lost"
    )


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
