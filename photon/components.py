"""Build the object that a ``_target_`` section of the configuration names.

Optimizers, schedules, outer optimizers and strategies are all named this way, so trying a new one takes a
class and a YAML file, and no edit anywhere else.
"""

import difflib
import importlib
import inspect
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from photon.errors import PhotonError


def nearest(word: str, known: Collection[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def import_target(target: str, where: str) -> Any:
    """Import the object that the dotted path ``target`` names.

    Raises
    ------
    PhotonError
        If the module or the attribute does not exist; ``where`` names the configuration key.
    """
    module_name, _, attribute = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        top = module_name.partition(".")[0]
        lost = isinstance(error, ModuleNotFoundError) and error.name == top
        hint = f"; PYTHONPATH must name the folder that {top} lies in" if lost else ""
        raise PhotonError(f"{where}: cannot import '{target}' ({error}){hint}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        hint = nearest(attribute, [name for name in vars(module) if not name.startswith("_")])
        raise PhotonError(f"{where}: cannot import '{target}' ({error}){hint}") from error


def check_arguments(factory: Any, arguments: Mapping[str, Any], where: str, *, given: int = 0) -> None:
    """Check ``arguments`` against the signature and the type hints of ``factory``.

    A class whose ``__init__`` takes ``**others`` also takes what the ``__init__`` of its base does.

    Parameters
    ----------
    given
        How many of its first arguments the running program gives.

    Raises
    ------
    PhotonError
        For the first argument that it does not take, or whose value does not fit its type hint.
    """
    takers = _takers(factory)
    known = set(list(takers)[given:])
    for name, value in arguments.items():
        if name not in known:
            hint = nearest(name, known) or f"; {factory.__name__} takes {', '.join(sorted(known)) or 'none'}"
            raise PhotonError(f"{where}.{name}: unknown key{hint}")
        if (adapter := _adapter(takers[name], name)) is not None:
            _check_value(adapter, value, f"{where}.{name}")


# Kept, as adapters are, because every round builds its outer optimizer anew, and these take longer than that.
@lru_cache(maxsize=256)
def _takers(factory: Any) -> dict[str, Any]:
    """Return by the name of each argument, in order, what has it in its signature."""
    takers: dict[str, Any] = {}
    bases = (
        [one for one in factory.__mro__[1:] if "__init__" in vars(one)] if inspect.isclass(factory) else []
    )
    for taker in (factory, *bases):
        parameters = inspect.signature(taker).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                takers.setdefault(parameter.name, taker)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            break
    return takers


@lru_cache(maxsize=256)
def _adapter(factory: Any, name: str) -> TypeAdapter[Any] | None:
    """Return what checks a value against an argument's type hint; None if no hint can be checked."""
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
        return TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True))
    except (KeyError, NameError, TypeError, PydanticUserError):
        # Hints that only a type checker can resolve are left to the factory itself.
        return None


def _check_value(adapter: TypeAdapter[Any], value: Any, where: str) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        problem = "too few values" if first["type"] == "missing" else first["msg"].replace("tuple", "list")
        raise PhotonError(f"{where}={value!r}: {problem[0].lower()}{problem[1:]}") from error


def build(section: Mapping[str, Any], where: str, *args: Any, **runtime: Any) -> Any:
    """Call the section's ``_target_`` with the section's other keys.

    Parameters
    ----------
    section
        Mapping with ``_target_`` and keyword arguments.
    where
        Configuration key of the section, for error messages.
    *args, **runtime
        What only the running program knows, passed on before the section's own arguments.

    Raises
    ------
    PhotonError
        If the target cannot be imported, an argument is unknown (the nearest valid one is named), or
        the target refuses a value.
    """
    arguments = {key: value for key, value in section.items() if key != "_target_"}
    factory = import_target(section["_target_"], where)
    check_arguments(factory, arguments, where, given=len(args))
    try:
        return factory(*args, **runtime, **arguments)
    except (TypeError, ValueError) as error:
        raise PhotonError(f"{where}: {section['_target_']} refused its settings ({error})") from error
