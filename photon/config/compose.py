"""Composition by Hydra, and the resolved configuration as text.

A run is composed once, in the ServerApp or in ``photon train``, and travels on as resolved YAML.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from photon.components import nearest
from photon.config import folders
from photon.config.explain import (
    explain_hydra_error,
    explain_unresolved,
    explain_validation,
    group_options,
    no_option,
)
from photon.config.reader import UNREADABLE, read_file, read_received
from photon.config.renamed import check_names, check_override, translated
from photon.config.schema import RunConfig, known_keys
from photon.errors import PhotonError

# Characters of an override that a message repeats.
_SHOWN = 200


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose ``conf/`` with Hydra overrides and check the result.

    Parameters
    ----------
    overrides
        Hydra overrides, such as ``["strategy=diloco", "rounds=20"]``.

    Raises
    ------
    PhotonError
        For an unknown key or group option (the nearest valid one is named), a value of the wrong type,
        or a combination that cannot work.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        _check_override(override)
    GlobalHydra.instance().clear()
    _register_resolvers()
    try:
        with initialize_config_dir(str(folders.conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise PhotonError(explain_hydra_error(error, overrides)) from error
    return configured(composed)


def configured(composed: Any) -> RunConfig:
    """Return the configuration that Hydra has composed, checked against the schema."""
    taken = _taken_of(composed)
    try:
        config = validate(_own(resolved(composed)))
    except PhotonError as error:
        raise PhotonError(with_sources(str(error), taken)) from error
    config._taken.update(taken)
    return config


#: A value of ``conf/`` that is another one, or a multiple of it.
_TAKEN = re.compile(r"\$\{(?:times:\d+,\$\{)?([a-z_][\w.]*)\}+")


def _taken_of(composed: Any) -> dict[str, str]:
    """Return the keys whose values are taken from other keys, and these; what a user has set is not."""
    from omegaconf import OmegaConf

    found: dict[str, str] = {}

    def walk(where: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{where}.{key}" if where else str(key), inner)
        elif isinstance(value, str) and (match := _TAKEN.fullmatch(value)):
            found[where] = match.group(1)

    walk("", OmegaConf.to_container(composed, resolve=False))
    return found


def with_sources(told: str, taken: Mapping[str, str]) -> str:
    """Return what is told of a configuration, with the keys that a user changes for those that it names."""
    named = [key for key in taken if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", told)]
    sources = [f"{key} is taken from {taken[key]}" for key in named if taken[key] not in told]
    return "; ".join([told, *sources])


def _check_override(override: str) -> None:
    """Check that an override can be read and is one; Hydra's own words for it help nobody."""
    from hydra.errors import HydraException

    if override.startswith("-"):
        raise PhotonError(
            f"{override}: no such option; overrides look like key=value, see `photon train --help`"
        )
    try:
        parsed = _parsed(override)
    except (HydraException, *UNREADABLE) as error:
        raise PhotonError(
            f"{_short(override)!r}: cannot be read; overrides look like KEY=VALUE, and a value with = or "
            "other signs needs quotes of its own, as in run_dir='\"a=b\"'"
        ) from error
    if parsed.is_sweep_override():
        raise PhotonError(f"{override}: several values make a sweep; add -m, or write a list as [a,b]")
    group, value = parsed.key_or_group, parsed.value()
    check_override(override, group, value)
    if not group or (group_options(group) and not parsed.is_delete() and not isinstance(value, str | list)):
        raise PhotonError(no_option(group, "null" if value is None else value))


def _short(override: str) -> str:
    return override if len(override) <= _SHOWN else f"{override[:_SHOWN]}…"


# A sweep composes each of its values with all the other overrides, and parsing these takes a fifth of that.
@lru_cache(maxsize=256)
def _parsed(override: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(override)


def _register_resolvers() -> None:
    """Let ``conf/`` write ``${times:3,${local_steps}}``: interpolation has no arithmetic of its own."""
    from omegaconf import OmegaConf

    def times(factor: int, value: Any) -> Any:
        # What is no number is told of where it comes from.
        return factor * value if type(value) in (int, float) else value

    OmegaConf.register_new_resolver("times", times, replace=True)


def split_overrides(text: str) -> list[str]:
    """Split the run-config string ``overrides`` as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PhotonError(f"overrides: cannot split {text!r} ({error}); check its quotes") from error


@lru_cache(maxsize=8)
def parse(text: str) -> RunConfig:
    """Read a resolved configuration back from its YAML text, which may have come from another organisation.

    The result is kept: every message brings the same text, and reading it costs more than a small round.

    Raises
    ------
    PhotonError
        If the text is not YAML, is of a kind that is not taken from elsewhere (`photon.config.reader`), or
        does not fit the schema.
    """
    return validate(read_received(text))


def settings_from(run_config: Mapping[str, Any]) -> tuple[RunConfig, bool]:
    """Read the configuration from Flower's run config.

    Returns
    -------
    tuple
        The configuration, and whether the run in ``run_dir`` is to be resumed.

    Raises
    ------
    PhotonError
        If both ``config`` and ``overrides`` are set, or either is wrong.
    """
    text, overrides = str(run_config.get("config", "")), str(run_config.get("overrides", ""))
    if text and overrides:
        raise PhotonError("run config: config and overrides are both set; give one of them")
    config = parse(text) if text else compose(split_overrides(overrides))
    return config, bool(run_config.get("resume", False))


def _own(values: Any) -> Any:
    """Put the tree in the place of the file that it may be in; only who writes a configuration names one."""
    federation = values.get("federation") if isinstance(values, dict) else None
    if not isinstance(federation, dict) or not isinstance(path := federation.get("tree"), str):
        return values
    where = f"federation.tree={path}"
    try:
        tree = read_file(Path(path))
    except PhotonError as error:
        raise PhotonError(f"{where}: cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise PhotonError(f"{where}: expected a mapping of federations and silos")
    return {**values, "federation": {**federation, "tree": tree}}


def with_overrides(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read ``config.yaml`` of an earlier run and change single keys of it, as in ``seed=1``.

    Raises
    ------
    PhotonError
        If the file or an override is wrong. Group choices such as ``strategy=diloco`` need ``conf/``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = load(path)
    base = OmegaConf.create(config.text)
    OmegaConf.set_struct(base, True)
    try:
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise PhotonError(f"{override}: expected KEY=VALUE")
            check_override(override, key, value)
            if OmegaConf.is_config(OmegaConf.select(base, key)):
                raise PhotonError(f"{override}: with --config only single keys can be changed, not groups")
            OmegaConf.update(base, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key))
    except OmegaConfBaseException as error:
        raise PhotonError(f"{key}: unknown key{nearest(key, set(known_keys()))}") from error
    except UNREADABLE as error:
        raise PhotonError(f"{_short(override)!r}: cannot be read; expected KEY=VALUE") from error
    return validate(_own(resolved(base)))


def load(path: Path) -> RunConfig:
    """Read ``config.yaml`` of a run; one of an earlier version has its old names translated."""
    if not path.is_file():
        raise PhotonError(f"{path}: no such file; is {path.parent} the folder of a run?")
    try:
        values = read_file(path)
    except PhotonError as error:
        raise PhotonError(f"{path}: not a valid configuration ({error})") from error
    try:
        return validate(_own(translated(values)))
    except PhotonError as error:
        raise PhotonError(f"{path}: {error}") from error


def resolved(composed: Any) -> Any:
    """Return the plain values of a composed OmegaConf configuration."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        told = explain_unresolved(error, lambda key: OmegaConf.select(composed, key) is not None)
        raise PhotonError(told) from error


def validate(values: Any) -> RunConfig:
    """Turn the plain values of a configuration into a :class:`RunConfig`."""
    if not isinstance(values, dict):
        raise PhotonError("config: expected a mapping of keys")
    check_names(values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise PhotonError(explain_validation(error, set(known_keys()))) from error
