"""The library that draws charts in a browser: BokehJS, as the installed package ``bokeh`` ships it."""

import base64
import gzip
import hashlib
import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from photon.errors import PhotonError

_FILES = ("bokeh.min.js", "bokeh-api.min.js")


@lru_cache(1)
def library() -> str:
    """Return the script.

    Raises
    ------
    PhotonError
        The package is not installed, or lacks the script.
    """
    # Nothing of the package is imported: its Python half is not needed, and takes a second.
    found = find_spec("bokeh")
    folder = Path(found.origin).parent / "server" / "static" / "js" if found and found.origin else None
    try:
        if folder is None:
            raise FileNotFoundError
        return ";\n".join((folder / name).read_text(encoding="utf-8") for name in _FILES)
    except OSError:
        raise PhotonError(
            "the report needs BokehJS, which is not here; mend it with `pip install bokeh`"
        ) from None


@lru_cache(1)
def packed_library() -> str:
    """Return the script as gzip in base64; the same bytes each time."""
    return base64.b64encode(gzip.compress(library().encode(), mtime=0)).decode()


def source_of(script: str) -> str:
    """Return how a content security policy allows exactly this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def script_json(value: Any) -> str:
    """Return JSON that can stand in a script element: nothing in it can end one."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")
