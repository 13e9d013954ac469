"""The line that one side of a federation sends to the other: what it needs to know, and nothing secret.

``photon-aggregator-1.PAYLOAD.CHECK`` says where the aggregator is and which authority signs its
certificate; ``photon-silo-1.PAYLOAD.CHECK`` says a silo's name and public key. The payload is JSON,
compressed, in URL-safe base64, so a line needs no quotes in a shell. The check tells a line that lost a part
on its way; it proves nothing of who wrote it. For that, people compare fingerprints.
"""

import base64
import binascii
import hashlib
import re
import zlib
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from photon.config.tree import SILO_NAME
from photon.deployment.keys import certificate_fingerprint, host_problem, load_certificate, load_public_key
from photon.errors import PhotonError, printable
from photon.federation.names import openssh_fingerprint

#: Far more than the longest line that Photon writes.
LONGEST = 4096
_VERSION = 1
_SHAPE = re.compile(r"photon-([a-z]+)-([0-9]{1,4})\.([A-Za-z0-9_-]+)\.([0-9a-f]{8})")
_AGAIN = "copy the whole line again"


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind: ClassVar[str]
    writes: ClassVar[str]

    def line(self) -> str:
        """Return the line to send."""
        packed = zlib.compress(self.model_dump_json().encode(), 9)
        payload = base64.urlsafe_b64encode(packed).rstrip(b"=").decode()
        body = f"photon-{self.kind}-{_VERSION}.{payload}"
        return f"{body}.{_check(body)}"

    @classmethod
    def read(cls, line: str) -> Self:
        """Read a line that somebody pasted.

        Raises
        ------
        PhotonError
            If it is none, is damaged, or is of another kind. The message says nothing of what is in it but
            printable characters.
        """
        return cls._of(_payload(line, cls.kind, cls.writes))

    @classmethod
    def _of(cls, content: bytes) -> Self:
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "payload"
            said = first["msg"].removeprefix("Value error, ")
            raise PhotonError(
                f"the line of {cls.writes}: {printable(where):.40}: {printable(said):.200}; "
                "ask for another line"
            ) from None


class AggregatorLine(_Line):
    """What a silo needs to know of its aggregator."""

    kind = "aggregator"
    writes = "`photon aggregator init`"

    host: str = Field(max_length=253, description="Host name or address.")
    port: int = Field(ge=1, le=65535, description="Port for silos.")
    authority: str = Field(max_length=3000, description="The authority's certificate: DER in base64.")

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if (problem := host_problem(host)) is not None:
            raise ValueError(problem)
        return host

    @field_validator("authority")
    @classmethod
    def _is_certificate(cls, authority: str) -> str:
        try:
            load_certificate(base64.b64decode(authority, validate=True))
        except ValueError:
            raise ValueError("no certificate of an authority") from None
        return authority

    @property
    def address(self) -> str:
        """Return ``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of the authority's certificate."""
        return certificate_fingerprint(load_certificate(base64.b64decode(self.authority)))

    def certificate(self) -> bytes:
        """Return the authority's certificate in PEM form."""
        from cryptography.hazmat.primitives import serialization

        found = load_certificate(base64.b64decode(self.authority))
        return found.public_bytes(serialization.Encoding.PEM)


class SiloLine(_Line):
    """What an aggregator needs to know of a silo."""

    kind = "silo"
    writes = "`photon silo init`"

    name: str = Field(max_length=64, description="The silo's name.")
    key: str = Field(
        max_length=1000, description="Public key of its node: type and base64, as OpenSSH has it."
    )

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if not re.fullmatch(SILO_NAME, name):
            raise ValueError("no name of a silo; use letters, digits, '-', '_', '+' and '.'")
        return name

    @field_validator("key")
    @classmethod
    def _is_key(cls, key: str) -> str:
        # One line of two words: what follows a key in a file of keys would be another one.
        if not re.fullmatch(r"[a-z0-9-]+ [A-Za-z0-9+/=]+", key):
            raise ValueError("no public key")
        load_public_key(key.encode())
        return key

    @property
    def fingerprint(self) -> str:
        """Return the key's fingerprint, as ``photon keys show`` has it."""
        return openssh_fingerprint(self.key.encode())

    def public_key(self) -> bytes:
        """Return what belongs into a file ``NAME.pub``."""
        return f"{self.key} {self.name}\n".encode()


def aggregator_line(host: str, port: int, authority: Path) -> AggregatorLine:
    """Return the aggregator's line, of the certificate in a file."""
    from cryptography.hazmat.primitives import serialization

    from photon.deployment.keys import read_certificate

    der = read_certificate(authority).public_bytes(serialization.Encoding.DER)
    return AggregatorLine(host=host, port=port, authority=base64.b64encode(der).decode())


def _payload(line: str, kind: str, writes: str) -> bytes:
    """Return what a line of this kind holds, its length and check compared."""
    expected = f"expected the line of {writes}, which begins with photon-{kind}-{_VERSION}"
    line = line.strip()
    if len(line) > LONGEST:
        raise PhotonError(f"this line has {len(line):,} characters, and {LONGEST:,} at most; {expected}")
    shape = _SHAPE.fullmatch(line)
    if shape is None or _check(line.rpartition(".")[0]) != shape[4]:
        if not line.startswith("photon-"):
            raise PhotonError(f"{printable(line)[:40] or 'nothing'!r} is no line of Photon; {expected}")
        raise PhotonError(f"the line is damaged or cut off: its check does not fit; {_AGAIN}")
    if shape[1] != kind:
        raise PhotonError(f"this is a line of another kind, photon-{shape[1]}; {expected}")
    if int(shape[2]) != _VERSION:
        raise PhotonError(
            f"this line is of version {shape[2]}, and this Photon reads version {_VERSION}; "
            "both sides need the same version of Photon"
        )
    try:
        packed = base64.urlsafe_b64decode(shape[3] + "=" * (-len(shape[3]) % 4))
        return zlib.decompressobj().decompress(packed, LONGEST)
    except (binascii.Error, zlib.error):
        raise PhotonError(f"the line is damaged: it cannot be unpacked; {_AGAIN}") from None


def _check(body: str) -> str:
    return hashlib.sha256(body.encode(errors="replace")).hexdigest()[:8]
