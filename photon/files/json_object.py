"""Files that hold one JSON object."""

import json
import os
from pathlib import Path
from typing import Any

from photon.errors import PhotonError, printable


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    PhotonError
        If it is no regular file, cannot be read, or holds anything else.
    """
    shown = printable(path)
    if os.path.lexists(path) and not os.path.isfile(path):
        # To open a pipe would wait for ever.
        raise PhotonError(f"{shown}: not a regular file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PhotonError(f"{shown}: cannot read it ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise PhotonError(f"{shown}: not JSON ({printable(str(error).splitlines()[0])})") from error
    if not isinstance(fields, dict):
        raise PhotonError(f"{shown}: expected a JSON object, found a {type(fields).__name__}")
    return fields
