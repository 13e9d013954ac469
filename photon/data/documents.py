"""The unit that corpora are read, split and partitioned in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One text that is never cut between train and validation.

    Attributes
    ----------
    source
        Where the text came from: a file, a row of a file, a module. With the partition ``field:NAME`` it is
        the value of the field, which names the silo.
    text
        The text itself, decoded.
    """

    source: str
    text: str
