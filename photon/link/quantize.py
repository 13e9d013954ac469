"""Codecs that send every value in fewer bits.

Those with blocks cut the flattened tensor into runs of ``block`` values, each with a scale s in float32 (the
last run may be shorter). They work on a few blocks at a time, which stay in the processor's cache.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from photon.link.bits import pack_bits, packed_bytes, unpack_bits
from photon.link.encoding import DTYPES, Codec, Encoded, Layout, as_bytes

#: Values that are worked on at a time: few enough for a core's cache, enough for each call to be worth it.
SLICE = 2**17


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
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
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


@dataclass(frozen=True)
class Float8(Codec):
    """Round every value to eight bits of floating point, scaled so that the largest just fits.

    Parameters
    ----------
    dtype
        ``"float8_e4m3fn"`` (three bits of mantissa, seventeen powers of two) or ``"float8_e5m2"``.
    """

    name: ClassVar[str] = "float8"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ("float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"dtype={self.dtype!r}: expected float8_e4m3fn or float8_e5m2")

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Return x / s in eight bits, and s = max|x| / largest number of the type."""
        kind: torch.dtype = getattr(torch, self.dtype)
        flat = values.reshape(-1)
        low, high = torch.aminmax(flat)
        scale = _positive(torch.maximum(-low, high).to(torch.float32) / torch.finfo(kind).max)
        codes = torch.empty(flat.numel(), dtype=kind)
        for part in _slices(flat.numel(), SLICE):
            codes[part] = flat[part] / scale
        return Encoded(codes.view(torch.uint8), as_bytes(scale))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return a byte a value, and one scale."""
        return Layout((_numel(shape),), torch.uint8, 4)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Return s · code, by a table of the 256 numbers there are."""
        kind: torch.dtype = getattr(torch, self.dtype)
        table = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(kind).to(torch.float32)
        return _by_table(values, table * _floats(side), shape, dtype)


class _Blocks(Codec):
    """A code of a few bits for each value, and a scale for each block."""

    bits: int
    block: int

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return packed codes, and a scale a block."""
        count = _numel(shape)
        return Layout((packed_bytes(count, self.bits),), torch.uint8, 4 * -(-count // self.block))

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Encode block by block."""
        flat = values.detach().reshape(-1)
        count = flat.numel()
        scales = torch.empty(-(-count // self.block))
        codes = torch.empty(packed_bytes(count, self.bits), dtype=torch.uint8)
        for part in _slices(count, self._step):
            run = _blocked(flat[part].to(torch.float32), self.block)
            scale, code = self._codes(run, part.stop - part.start, draw)
            first = part.start // self.block
            scales[first : first + len(scale)] = scale
            packed = pack_bits(code.view(-1)[: part.stop - part.start], self.bits)
            begin = part.start * self.bits // 8
            codes[begin : begin + len(packed)] = packed
        return Encoded(codes, as_bytes(scales))

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Decode block by block."""
        count, scales = _numel(shape), _floats(side)
        out = torch.empty(count, dtype=dtype)
        for part in _slices(count, self._step):
            size = part.stop - part.start
            begin = part.start * self.bits // 8
            code = unpack_bits(values[begin : begin + packed_bytes(size, self.bits)], self.bits, size)
            first, whole = part.start // self.block, size // self.block
            # Whole blocks, and what is left: no row is longer than the tensor, however long a block is.
            middle = whole * self.block
            if whole:
                self._fill(code[:middle].view(whole, -1), scales[first : first + whole], out[part][:middle])
            if middle < size:
                self._fill(code[None, middle:], scales[first + whole :][:1], out[part][middle:])
        return out.view(shape)

    def _fill(self, code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """Write the values of codes (m, n) with scales (m,) to ``out`` (m · n,), of any type."""
        values = out.view(code.shape) if out.dtype == torch.float32 else torch.empty(code.shape)
        self._values(code, scale[:, None], values)
        if out.dtype != torch.float32:
            out.copy_(values.view(-1))

    @property
    def _step(self) -> int:
        """Values at a time: whole blocks, and whole bytes."""
        return self.block * 8 * max(1, SLICE // (8 * self.block))

    @abstractmethod
    def _codes(
        self, run: torch.Tensor, size: int, draw: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales (m,) and codes (m, block), uint8 or bool, of values (m, block).

        ``run`` is only read. Its first ``size`` values count; zeros that fill the last block follow.
        """

    @abstractmethod
    def _values(self, code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        """Write to ``out`` (m, n), float32, the values of codes (m, n), uint8, and scales (m, 1)."""


@dataclass(frozen=True)
class Int(_Blocks):
    """Round every value to a whole multiple of its block's scale.

        s = max|x| / L,  code = round(x / s),  L = 2^(bits-1) − 1

    Eight bits hold the code as a signed number, four hold code + L.

    Parameters
    ----------
    bits
        8 or 4.
    block
        Values that share a scale.
    rounding
        ``"nearest"``, or ``"stochastic"``: up or down at random, so that the mean is x itself (to 2^-17 of a
        step).
    """

    name: ClassVar[str] = "int"
    bits: int = 8
    block: int = 256
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits}: expected 4 or 8")
        if self.rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding={self.rounding!r}: expected nearest or stochastic")
        _check_block(self.block)

    @property
    def _levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def _codes(
        self, run: torch.Tensor, size: int, draw: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _positive(run.abs().amax(1) / self._levels)
        steps = run / scale[:, None]
        if self.rounding == "stochastic":
            noise = draw.integers(0, 2**64, size=-(-steps.numel() // 4), dtype=np.uint64)
            uniform = torch.from_numpy(noise.view(np.int16)[: steps.numel()]).view(steps.shape)
            steps.add_(uniform, alpha=2**-16)
            steps.clamp_(-self._levels, self._levels)
        codes = steps.round_().to(torch.int8)
        return scale, codes.view(torch.uint8) if self.bits == 8 else codes.add_(self._levels).view(
            torch.uint8
        )

    def _values(self, code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        signed = code.view(torch.int8)
        torch.mul(signed if self.bits == 8 else signed - self._levels, scale, out=out)


@dataclass(frozen=True)
class E3M0(_Blocks):
    """Keep the sign and three bits of exponent of every value.

        s = max|x|,  x ≈ ± s · 2^(code − 7) for codes 1 … 7, and 0 for code 0

    Values round to the nearer power of two; below 0.75 · s · 2^-6 they become zero.

    Parameters
    ----------
    block
        Values that share a scale.
    """

    name: ClassVar[str] = "e3m0"
    bits: ClassVar[int] = 4  # type: ignore[misc]
    block: int = 256

    def __post_init__(self) -> None:
        _check_block(self.block)

    def _codes(
        self, run: torch.Tensor, size: int, draw: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _positive(run.abs().amax(1))
        bits = (run / scale[:, None]).view(torch.int32)
        # Half a mantissa more carries into the exponent from 1.5 · 2^e on, the middle to the next power.
        exponent = (((bits & 0x7FFFFFFF) + 0x400000) >> 23) - 127
        code = (exponent + 7).clamp_(0, 7)
        return scale, (code | ((bits >> 28) & 8)).to(torch.uint8)

    def _values(self, code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        magnitudes = torch.tensor([0.0, *(2.0**e for e in range(-6, 1))])
        table = torch.cat((magnitudes, -magnitudes))
        torch.index_select(table, 0, code.view(-1).to(torch.int32), out=out.view(-1))
        out.mul_(scale)


@dataclass(frozen=True)
class Sign(_Blocks):
    """Keep the sign of every value, and the mean size of its block.

        s = mean|x|,  x ≈ ± s

    Parameters
    ----------
    block
        Values that share a scale.
    """

    name: ClassVar[str] = "sign"
    bits: ClassVar[int] = 1  # type: ignore[misc]
    block: int = 1024

    def __post_init__(self) -> None:
        _check_block(self.block)

    def _codes(
        self, run: torch.Tensor, size: int, draw: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.full((len(run),), float(self.block))
        counts[-1] -= run.numel() - size
        return run.abs().sum(1) / counts, run < 0

    def _values(self, code: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(code).mul_(-2).add_(1).mul_(scale)


@dataclass(frozen=True)
class TwoBit(Codec):
    """Send every value as one of four: ± a small and ± a large size, those that fit the tensor best.

    The sizes are the means of |x| below and above their middle, after two turns of Lloyd's algorithm.
    """

    name: ClassVar[str] = "two_bit"

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Return codes 2 · [x < 0] + [x is large], and the two sizes."""
        flat = values.detach().reshape(-1).to(torch.float32)
        size = flat.abs()
        middle = size.mean()
        for _ in range(2):
            large = size >= middle
            high = size[large].mean() if large.any() else middle
            low = size[~large].mean() if not large.all() else high
            middle = (low + high) / 2
        code = ((flat < 0).to(torch.uint8) << 1) | large.to(torch.uint8)
        return Encoded(pack_bits(code, 2), as_bytes(torch.stack((low, high))))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return two bits a value, and two sizes."""
        return Layout((packed_bytes(_numel(shape), 2),), torch.uint8, 8)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Look the codes up."""
        sizes = _floats(side)
        return _by_table(unpack_bits(values, 2, _numel(shape)), torch.cat((sizes, -sizes)), shape, dtype)


def _check_block(block: int) -> None:
    if not isinstance(block, int) or not 1 <= block <= 2**20:
        raise ValueError(f"block={block}: expected 1 to {2**20}")


def _numel(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=object)) if shape else 1


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


def _blocked(flat: torch.Tensor, block: int) -> torch.Tensor:
    """Return (m, block) of a copy or, where nothing is missing, a view of ``flat``."""
    missing = -flat.numel() % block
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, block)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """Let nothing be divided by a zero, or by what is next to it: such a block is all zeros to its codes."""
    return scale.clamp_(min=torch.finfo(torch.float32).tiny)


def _floats(side: torch.Tensor) -> torch.Tensor:
    return (side.clone() if side.data_ptr() % 4 or side.storage_offset() % 4 else side).view(torch.float32)


def _by_table(
    codes: torch.Tensor, table: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty(codes.numel(), dtype=dtype)
    for part in _slices(codes.numel(), SLICE):
        out[part] = table.index_select(0, codes[part].to(torch.int32))
    return out.view(shape)
