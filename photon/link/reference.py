"""What a message carries in the place of tensors that lie in a store."""

from typing import Literal

from pydantic import Field

from photon.link.encoding import Encoding
from photon.link.messages import Body


class StoredTensor(Body):
    """Where a tensor or its payload lies in an object, and what it must be."""

    dtype: str
    shape: list[int] = Field(max_length=16)
    offset: int = Field(ge=0)
    nbytes: int = Field(ge=0)
    blake3: str
    encoding: Encoding | None = None


class StoredObject(Body):
    """A payload in a store: what a message carries in place of tensors.

    Attributes
    ----------
    key, nbytes
        The object and its length.
    groups
        Group name to tensor name to place.
    url
        Where it can be read without credentials.
    etags
        The parts of an upload by presigned requests, which the server still has to finish.
    """

    format: Literal[3] = 3
    key: str
    nbytes: int = Field(ge=0)
    groups: dict[str, dict[str, StoredTensor]]
    url: str | None = None
    etags: list[str] | None = None
