"""Regular expressions of a configuration, which may come from another organisation.

They are those of RE2, which takes time in proportion to the text whatever the expression is: Python's own
take longer than anybody waits for some that are written in a few characters. RE2
cannot look around, nor go back to an earlier group.
"""

from functools import lru_cache
from typing import Protocol

import re2

from photon.errors import PhotonError

#: Characters of an expression, and bytes that it may become.
MAX_LENGTH, MAX_BYTES = 1000, 2**20


class Expression(Protocol):
    """A regular expression that can be looked for."""

    def search(self, text: str, /) -> object | None:
        """Return where it is found first; None: nowhere."""


@lru_cache(maxsize=256)
def expression(text: str, where: str) -> Expression:
    """Read a regular expression that names of parameters are compared with.

    Parameters
    ----------
    where
        Configuration key that it is of, for error messages.

    Raises
    ------
    PhotonError
        If it is none that RE2 takes, or too large.
    """
    if len(text) > MAX_LENGTH:
        raise PhotonError(f"{where}: an expression of more than {MAX_LENGTH:,} characters; shorten it")
    options = re2.Options()
    options.log_errors, options.max_mem = False, MAX_BYTES
    try:
        found: Expression = re2.compile(text, options)
    except (re2.error, UnicodeError) as error:
        told = error.args[0] if error.args else error
        told = told.decode(errors="replace") if isinstance(told, bytes) else told
        raise PhotonError(
            f"{where}: {text!r} is no regular expression of RE2 ({told}); see "
            "https://github.com/google/re2/wiki/Syntax"
        ) from error
    return found
