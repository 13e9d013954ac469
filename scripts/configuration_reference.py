#!/usr/bin/env python3
"""Write docs/configuration.md from the schema and conf/, so that the reference cannot fall behind them.

python scripts/configuration_reference.py            write the file
python scripts/configuration_reference.py --check    exit 1 if the file is out of date
"""

import argparse
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from annotated_types import Ge, Gt
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from photon.components import import_target
from photon.config.folders import conf_dir
from photon.config.schema import Component, RunConfig
from photon.link.codecs import CODECS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
#: A default longer than this is left to the table of options.
LONGEST_DEFAULT = 60

INTRODUCTION = """\
# Configuration reference

This page is made from `photon/config/schema.py` and `conf/` by `python scripts/configuration_reference.py`;
change those, not this page.

A run is one configuration. Hydra composes it from `conf/config.yaml` and one file of each group below, and
Photon checks it against a typed schema: an unknown key, a wrong type or values that cannot work together end
in one line that says how to mend it.

* `photon train rounds=20 training.batch_size=16` sets keys.
* `photon train strategy=diloco model=photon-125m` chooses files: `conf/strategy/diloco.yaml`, ….
* `photon train +optimizer.amsgrad=true` adds an argument that the file does not list.
* `photon train -m outer=fedavg,diloco seed=0,1` trains every combination.
* `flwr run . --run-config "overrides='rounds=20 strategy=diloco'"` means the same as
  `photon train rounds=20 strategy=diloco`.
* `photon train --show` prints the composed configuration and stops; add overrides to see their effect.

Every run keeps its configuration in `config.yaml`, and `photon train --config RUN_DIR/config.yaml` starts
another run from it.

In the tables, `null` means "not set", and `${…}` takes the value of another key.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        print("docs/configuration.md is out of date; run: python scripts/configuration_reference.py")
        sys.exit(1)


def page() -> str:
    """Return the text of the page."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return "\n".join([INTRODUCTION, *_sections()])


def _sections() -> Iterator[str]:
    default = compose("config")
    scalars = {name: field for name, field in RunConfig.model_fields.items() if _nested(field) is None}
    yield "## The run\n"
    yield from _key_table(scalars, default, "")
    for name, field in RunConfig.model_fields.items():
        section = _nested(field)
        if section is None:
            continue
        yield f"## {name}\n"
        if section is Component:
            yield f"{field.description}\n"
            for option in _options(name):
                yield from _component(name, option, default)
            continue
        yield f"{inspect.getdoc(section)}\n"
        yield from _key_table(section.model_fields, default.get(name), f"{name}.")
        if name == "model":
            yield from _models()
        elif (conf_dir() / name).is_dir():
            yield from _option_table(name, default)
        if name == "link":
            for codec in CODECS.values():
                yield from _target(f"photon.link.codecs.{codec.__name__}", {})


# --- tables -----------------------------------------------------------------------------------------


def _key_table(fields: Mapping[str, FieldInfo], values: Any, prefix: str) -> Iterator[str]:
    yield "| Key | Type | Default | Meaning |"
    yield "|---|---|---|---|"
    yield from _key_rows(fields, values, prefix)
    yield ""


def _key_rows(fields: Mapping[str, FieldInfo], values: Any, prefix: str) -> Iterator[str]:
    for name, field in fields.items():
        section = _nested(field)
        inner = values._get_node(name) if isinstance(values, DictConfig) else None
        if section is not None and not _is_list(field):
            yield from _key_rows(section.model_fields, inner, f"{prefix}{name}.")
            continue
        kind = _type(field.annotation, _bound(field))
        yield _row(f"`{prefix}{name}`", kind, _default(inner, field), field.description or "")


def _option_table(group: str, default: DictConfig) -> Iterator[str]:
    chosen = _default_option(group)
    default_file = f" `{group}={chosen}`" if chosen else ", none of them"
    yield f"Files in `conf/{group}/`, with what they change of the default{default_file}:\n"
    yield "| Option | What it is | Changes |"
    yield "|---|---|---|"
    for option in [*([chosen] if chosen else []), *(o for o in _options(group) if o != chosen)]:
        changes = _differences(default, _with_option(group, option, default))
        shown = "<br>".join(f"`{key}={value}`" for key, value in changes.items())
        yield _row(f"`{group}={option}`", _comment(group, option), shown or "—")
    yield ""


def _models() -> Iterator[str]:
    yield "Presets in `conf/model/`:\n"
    yield "| Option | What it is | Sequence length | Peak rate | Tuned batch | Steps | Warm-up |"
    yield "|---|---|---|---|---|---|---|"
    for option in _options("model"):
        preset = yaml.safe_load((conf_dir() / "model" / f"{option}.yaml").read_text())
        recipe = preset["recipe"]
        numbers = (recipe["learning_rate"], recipe["batch_size"], recipe["steps"], recipe["warmup_steps"])
        cells = ("the run" if number is None else f"{number:,}" for number in numbers)
        yield _row(f"`model={option}`", _comment("model", option), f"{preset['sequence_length']:,}", *cells)
    yield ""


def _component(group: str, option: str, default: DictConfig) -> Iterator[str]:
    composed = _with_option(group, option, default)
    mark = " (default)" if option == _default_option(group) else ""
    yield f"### {group}={option}{mark}\n"
    if comment := _comment(group, option):
        yield f"{comment}\n"
    settings = OmegaConf.to_container(composed[group], resolve=False)
    assert isinstance(settings, dict)
    target = str(settings.pop("_target_"))
    yield from _target(target, {str(key): value for key, value in settings.items()})
    elsewhere = {
        key: value
        for key, value in _differences(default, composed).items()
        if not key.startswith(f"{group}.")
    }
    if elsewhere:
        keys = ", ".join(f"`{key}={value}`" for key, value in elsewhere.items())
        yield f"It also sets {keys}.\n"


def _target(target: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the arguments of a component: those that the file sets, and for Photon's own all there are."""
    arguments = dict(settings)
    meanings: dict[str, str] = {}
    if target.startswith("photon."):
        factory = import_target(target, target)
        meanings = _meanings(factory)
        for name, parameter in inspect.signature(factory).parameters.items():
            # The run's configuration is given by the program, not by a file.
            if name != "config":
                empty = parameter.default is parameter.empty
                arguments.setdefault(name, "required" if empty else parameter.default)
        meanings.setdefault("tuned_batch_size", "Batch that `steps` and `warmup_steps` count.")
    yield f"`{target}`" + ("" if meanings else "; the other arguments of the class can be added.") + "\n"
    heading = ["Argument", "Value", *(["Meaning"] if meanings else [])]
    yield _row(*heading)
    yield "|" + "---|" * len(heading)
    for name, value in arguments.items():
        cells = [f"`{name}`", f"`{_yaml(value)}`", *([meanings.get(name, "")] if meanings else [])]
        yield _row(*cells)
    yield ""


# --- pieces -----------------------------------------------------------------------------------------


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _options(group: str) -> list[str]:
    return sorted((file.stem for file in (conf_dir() / group).glob("*.yaml")), key=_natural)


def _with_option(group: str, option: str, default: DictConfig) -> DictConfig:
    return default if option == _default_option(group) else compose("config", overrides=[f"{group}={option}"])


def _natural(option: str) -> tuple[str, float, str]:
    """Sort 75m before 1.3b."""
    match = re.search(r"([\d.]+)([mb])$", option)
    if match is None:
        return option, 0.0, option
    return option[: match.start()], float(match[1]) * (1 if match[2] == "m" else 1000), option


def _default_option(group: str) -> str | None:
    choices = yaml.safe_load((conf_dir() / "config.yaml").read_text())["defaults"]
    option = next(choice[group] for choice in choices if isinstance(choice, dict) and group in choice)
    return None if option is None else str(option)


def _comment(group: str, option: str) -> str:
    """Return the comment at the top of a file of conf/."""
    lines = []
    for line in (conf_dir() / group / f"{option}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("# @package"):
            continue
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _differences(default: DictConfig, other: DictConfig) -> dict[str, str]:
    before, after = dict(_leaves(default)), dict(_leaves(other))
    return {key: _yaml(value) for key, value in after.items() if before.get(key, ...) != value}


def _leaves(node: DictConfig) -> Iterator[tuple[str, Any]]:
    def walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                yield from walk(inner, f"{key}.{name}" if key else str(name))
        else:
            yield key, value

    yield from walk(OmegaConf.to_container(node, resolve=False), "")


def _nested(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_list(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is list


def _type(annotation: Any, bound: str = "") -> str:
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type(part, bound) for part in typing.get_args(annotation))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if annotation is types.NoneType:
        return "null"
    if origin is typing.Annotated:
        inner, field = typing.get_args(annotation)
        return _type(inner, _bound(field))
    numbers = {int: "integer", float: "number"}
    if annotation in numbers:
        return numbers[annotation] + bound
    return {dict: "mapping", list: "list", str: "text", bool: "true or false"}[origin or annotation]


def _bound(field: FieldInfo) -> str:
    for bound in field.metadata:
        if isinstance(bound, Ge):
            return f" ≥ {bound.ge}"
        if isinstance(bound, Gt):
            return f" > {bound.gt}"
    return ""


def _default(node: Any, field: FieldInfo) -> str:
    if node is None:
        if field.is_required() or field.default is None:
            return "`null`"
        return f"`{_yaml(field.default)}`"
    value = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node._value()
    text = _yaml(value)
    return f"`{text}`" if len(text) <= LONGEST_DEFAULT else "of the option"


def _yaml(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, str):
        return value if value == value.strip() else f'"{value}"'
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _meanings(factory: Any) -> dict[str, str]:
    """Return argument to description; what a class says "As in" another of is looked up in its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(inspect.getmro(factory)) if inspect.isclass(factory) else [factory]:
        for name, text in _parameters(inspect.cleandoc(base.__doc__ or "")).items():
            if name not in meanings or not text.startswith("As in "):
                meanings[name] = text
    return meanings


def _parameters(docstring: str) -> dict[str, str]:
    """Return argument to description, from the numpydoc section ``Parameters``."""
    section = re.search(r"\nParameters\n-+\n(.*?)(?:\n\n\w+\n-+\n|\Z)", docstring, re.DOTALL)
    if section is None:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines():
        if line and not line.startswith(" "):
            names = [name.strip() for name in line.partition(" : ")[0].split(",")]
        for name in names if line.startswith(" ") else ():
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return {name: text.replace("``", "`") for name, text in found.items()}


if __name__ == "__main__":
    main()
