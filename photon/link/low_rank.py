"""A codec that sends a matrix as the product of two small ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from photon.link.encoding import Codec, Encoded, Layout


@dataclass(frozen=True)
class PowerSGD(Codec):
    """One step of the power iteration, from where the last round ended (arXiv 1905.13727).

        P = orth(M Q),   Q ← Mᵀ P,   M ≈ P Qᵀ

    M is the tensor with all dimensions but the first flattened. Tensors that are no matrices, or too small to
    gain, pass as they are.

    Parameters
    ----------
    rank
        Columns of P and Q.
    """

    name: ClassVar[str] = "powersgd"
    gives_values: ClassVar[bool] = True
    rank: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank}: expected a positive number")

    def applies(self, shape: Sequence[int]) -> bool:
        """Return whether P and Q are smaller than M."""
        rows, columns = _matrix(shape)
        return self.rank * (rows + columns) < rows * columns

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Return P and Q, flattened, and remember Q."""
        rows, columns = _matrix(values.shape)
        matrix = values.detach().reshape(rows, columns).to(torch.float32)
        if feedback is None or feedback.shape != (columns, self.rank):
            feedback = torch.from_numpy(draw.standard_normal((columns, self.rank), dtype=np.float32))
        left, _ = torch.linalg.qr(matrix @ feedback)
        right = matrix.T @ left
        both = torch.cat((left.reshape(-1), right.reshape(-1)))
        return Encoded(both.to(values.dtype), feedback=right)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return P and Q in the tensor's type."""
        if not self.applies(shape):
            raise ValueError(f"rank {self.rank} gains nothing for shape {shape}")
        return Layout((self.rank * sum(_matrix(shape)),), dtype)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return P Qᵀ."""
        rows, columns = _matrix(shape)
        left, right = values.to(torch.float32).split([self.rank * rows, self.rank * columns])
        return (left.view(rows, -1) @ right.view(columns, -1).T).to(dtype).view(shape)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2:
        return 1, 1
    return shape[0], int(np.prod(shape[1:], dtype=object))
