"""Whose name a silo's name is: each belongs to one node key.

A name belongs to the key that it was admitted with (``photon federation admit``), or else to that with which
it was first seen in the run. Keys that were ejected stay out, whatever they call themselves. The SuperLink
knows a node's key, because the node has proved to have it; the name is the node's own word.
"""

import base64
import hashlib
import re
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from photon.config.tree import SILO_NAME
from photon.errors import PhotonError
from photon.files.atomic import write_text

#: In a run's folder: name to the key with which it was first seen.
SEEN = "names.json"
#: In Photon's home: what the aggregator's operator has admitted and ejected.
ADMITTED = "silos.json"


class Admitted(BaseModel):
    """What an operator has decided: name to the fingerprint of its key, and keys that stay out."""

    model_config = ConfigDict(extra="forbid")
    names: dict[str, str] = Field(default_factory=dict)
    ejected: list[str] = Field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> "Admitted":
        """Read the file; nothing is decided where there is none.

        Raises
        ------
        PhotonError
            If it cannot be read: whoever it keeps out must stay out.
        """
        try:
            return cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            raise PhotonError(
                f"{file}: cannot be read ({type(error).__name__}); mend or remove it"
            ) from error

    def write(self, file: Path) -> None:
        """Write the file."""
        write_text(file, self.model_dump_json(indent=1) + "\n")


def admit(file: Path, name: str, fingerprint: str) -> None:
    """Let a name belong to a key, which may come back if it was ejected.

    Raises
    ------
    PhotonError
        If the name cannot be a silo's, or belongs to another key.
    """
    if not re.fullmatch(SILO_NAME, name):
        raise PhotonError(f"{name!r} is no name of a silo; use letters, digits, '-', '_', '+' and '.'")
    admitted = Admitted.read(file)
    if (before := admitted.names.get(name, fingerprint)) != fingerprint:
        raise PhotonError(f"{name} belongs to the key {before}; `photon federation eject {name}` first")
    admitted.names[name] = fingerprint
    admitted.ejected = [key for key in admitted.ejected if key != fingerprint]
    admitted.write(file)


def eject(file: Path, name: str) -> str:
    """Keep the key of a name out from now on, and return its fingerprint; the name is free again.

    Raises
    ------
    PhotonError
        If no key was admitted under that name.
    """
    admitted = Admitted.read(file)
    fingerprint = admitted.names.pop(name, None)
    if fingerprint is None:
        known = ", ".join(sorted(admitted.names)) or "none"
        raise PhotonError(f"{file}: {name} was not admitted; there are {known}")
    admitted.ejected = [*admitted.ejected, fingerprint]
    admitted.write(file)
    return fingerprint


def fingerprint_of(key: bytes) -> str:
    """Return the fingerprint of a node's public key, as ``photon keys show`` and ``ssh-keygen -l`` have it.

    Parameters
    ----------
    key
        In OpenSSH's form or PEM.

    Raises
    ------
    PhotonError
        If it is no public key.
    """
    try:
        loaded = (
            serialization.load_pem_public_key(key)
            if key.lstrip().startswith(b"-----")
            else serialization.load_ssh_public_key(key)
        )
        text = loaded.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PhotonError(f"this is no public key of a node ({error})") from error
    return openssh_fingerprint(text)


def openssh_fingerprint(text: bytes) -> str:
    """Return the fingerprint of a public key that is a line of OpenSSH's form."""
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).rstrip(b'=').decode()}"


class Names:
    """Says whether a node may use a name.

    Parameters
    ----------
    run_dir
        Folder of the run, which remembers the names that it has seen.
    admitted
        File of what the operator has decided.
    """

    def __init__(self, run_dir: Path, admitted: Path) -> None:
        self._file = run_dir / SEEN
        self._admitted = admitted

    def problem(self, name: str, key: bytes) -> str | None:
        """Return why a node may not use a name, or None; it is then its own.

        Parameters
        ----------
        key
            The node's public key; empty where nodes have none: then names belong to nobody.

        Raises
        ------
        PhotonError
            If what was decided or seen before cannot be read.
        """
        if not key:
            return None
        fingerprint, admitted = fingerprint_of(key), Admitted.read(self._admitted)
        if fingerprint in admitted.ejected:
            return f"its key {fingerprint} was ejected"
        seen = Admitted.read(self._file)
        owner = admitted.names.get(name) or seen.names.get(name)
        if owner is None or owner in admitted.ejected:
            seen.names[name] = fingerprint
            seen.write(self._file)
        elif owner != fingerprint:
            return (
                f"the name belongs to the key {owner}, and this node has {fingerprint}; if the silo has a "
                f"new key, `photon federation admit {name} KEY.pub` at the aggregator"
            )
        return None
