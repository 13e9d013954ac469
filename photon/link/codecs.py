"""Codecs: what happens to a tensor before it travels, and what undoes it.

Codecs compose in a list. Each one is a small class with ``encode`` and ``decode``; the record that carries
a tensor names the codecs that were applied, so the receiver needs no configuration to decode it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from photon.components import nearest
from photon.errors import PhotonError

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that records use for ``dtype``."""
    return str(dtype).removeprefix("torch.")


class Codec(Protocol):
    """One step of the link."""

    name: ClassVar[str]

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return what travels, and what :meth:`decode` needs to know (JSON values)."""
        ...

    @staticmethod
    def decode(tensor: torch.Tensor, meta: dict[str, Any]) -> torch.Tensor:
        """Undo :meth:`encode`."""
        ...


class Cast:
    """Round every value to another floating-point type.

    Parameters
    ----------
    dtype
        ``"bfloat16"`` or ``"float16"``.
    """

    name: ClassVar[str] = "cast"

    def __init__(self, dtype: str) -> None:
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype={dtype!r}: expected bfloat16 or float16")
        self.dtype = DTYPES[dtype]

    def encode(self, tensor: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        """Round ``tensor``; the original type is kept for decoding."""
        return tensor.to(self.dtype), {"dtype": dtype_name(tensor.dtype)}

    @staticmethod
    def decode(tensor: torch.Tensor, meta: dict[str, Any]) -> torch.Tensor:
        """Widen ``tensor`` to its original type; the rounding stays."""
        return tensor.to(DTYPES[meta["dtype"]])


_CODECS: dict[str, type[Codec]] = {Cast.name: Cast}


def encode(tensor: torch.Tensor, codecs: Sequence[Codec]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Apply ``codecs`` in order; return the tensor to send and one header entry per codec."""
    header = []
    for codec in codecs:
        tensor, meta = codec.encode(tensor)
        header.append({"codec": codec.name, **meta})
    return tensor, header


def decode(tensor: torch.Tensor, header: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Undo the codecs that ``header`` lists, last first.

    Raises
    ------
    PhotonError
        If the header names a codec that this version does not have, or is malformed.
    """
    for entry in reversed(header):
        name = entry.get("codec")
        if name not in _CODECS:
            raise PhotonError(f"link: unknown codec {name!r}{nearest(str(name), _CODECS)}; update photon")
        try:
            tensor = _CODECS[name].decode(tensor, entry)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PhotonError(f"link: codec {name!r} cannot decode its record ({error!r})") from error
    return tensor
