"""Codecs that send every value in fewer bits."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from photon.link.coding import DTYPES, Codec, Encoded, Layout


@dataclass(frozen=True)
class Cast(Codec):
    """Round every value to another floating-point type.

    Parameters
    ----------
    dtype
        ``"bfloat16"`` or ``"float16"``.
    """

    name: ClassVar[str] = "cast"
    gives_values: ClassVar[bool] = True
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: expected bfloat16 or float16")

    def encode(
        self, values: torch.Tensor, draw: torch.Generator, memory: torch.Tensor | None = None
    ) -> Encoded:
        """Round ``values``."""
        return Encoded(values.to(DTYPES[self.dtype]))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return the same shape in the other type."""
        return Layout(shape, DTYPES[self.dtype])

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Widen ``values`` to their original type; the rounding stays."""
        return values.to(dtype)
