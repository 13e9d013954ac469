"""Reads YAML; of a text that came from elsewhere, time and memory are bounded before anything is built.

YAML lets a few lines stand for any number of values (aliases), and reads some as what they do not look like
(tags). What Photon writes has neither, so a text that came has none.
"""

from pathlib import Path
from typing import Any

import yaml

from photon.config.explain import first_line
from photon.config.schema import Loader
from photon.errors import PhotonError

#: Values within values, and values in all. Real configurations have a dozen levels and some hundred values; a
#: tree of federations adds two levels for each of its own.
MAX_DEPTH, MAX_VALUES = 64, 20_000
#: Largest whole number of a configuration; seeds are the largest.
MAX_NUMBER = 2**63
#: What reading a value may raise, such as that of a date or of a number of thousands of digits.
UNREADABLE = (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError)


def read_received(text: str) -> Any:
    """Return the plain values of a text that came from elsewhere; no file is opened.

    Raises
    ------
    PhotonError
        If it is not YAML, has anchors, aliases or tags, is nested too deep or has too many values.
    """
    try:
        _check_events(text)
        values = yaml.load(text, Loader=Loader)
    except UNREADABLE as error:
        raise unreadable(error) from error
    check_numbers(values)
    return values


def read_file(path: Path) -> Any:
    """Return the plain values of a file of one's own.

    Raises
    ------
    PhotonError
        If it is no regular file of UTF-8 text, not YAML, or nested too deep; the message says why alone.
    """
    if path.exists() and not path.is_file():
        raise PhotonError("not a regular file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PhotonError(
            f"byte {error.object[error.start]:#04x} at offset {error.start} is no UTF-8"
        ) from error
    except OSError as error:
        raise PhotonError(error.strerror or str(error)) from error
    return read_own(text)


def read_own(text: str) -> Any:
    """Return the plain values of a text of one's own; :func:`read_file` says what is raised."""
    try:
        _check_depth(text)
        return yaml.load(text, Loader=Loader)
    except UNREADABLE as error:
        raise PhotonError(" ".join(str(error).replace('"<unicode string>", ', "").split())) from error


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise PhotonError(f"values within values, more than {MAX_DEPTH} deep; make it flatter")


def unreadable(error: Exception) -> PhotonError:
    """Return what is said of a text that cannot be read."""
    return PhotonError(f"config: not a valid configuration ({first_line(error)})")


def check_numbers(values: Any, where: str = "") -> None:
    """Check that no whole number is so large that arithmetic with it takes long, or fails.

    Raises
    ------
    PhotonError
        For the first that is.
    """
    if isinstance(values, dict):
        for key, value in values.items():
            check_numbers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            check_numbers(value, f"{where}.{index}")
    elif isinstance(values, int) and not -MAX_NUMBER <= values < MAX_NUMBER:
        raise PhotonError(f"{where}: a whole number of {values.bit_length()} bits; give one of less than 64")


def _check_events(text: str) -> None:
    """Look at what a text is made of, before anything is made of it."""
    depth = values = 0
    for event in yaml.parse(text, Loader=Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise PhotonError("config: anchors and aliases (& and *) are not taken; write values out")
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise PhotonError(f"config: the tag {tag:.100} is not taken; write plain values")
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise PhotonError(f"config: values within values, more than {MAX_DEPTH} deep; make it flatter")
        if values > MAX_VALUES:
            raise PhotonError(f"config: more than {MAX_VALUES:,} values; make it smaller")
