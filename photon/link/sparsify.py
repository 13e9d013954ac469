"""Codecs that send some of the values, and where they were."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from photon.link.bits import pack_bits, packed_bytes, unpack_bits
from photon.link.encoding import Codec, Encoded, Layout, SparseTensor
from photon.link.quantize import SLICE

#: Places have at most twelve bits.
LONGEST_CHUNK = 4096
#: Sides of a tile that is as large as the longest chunk.
LONGEST_SIDE = 64


@dataclass(frozen=True)
class TopK(Codec):
    """Send the largest values of every chunk, and where in it they were (SparseLoCo, 2508.15706).

    The flattened tensor is cut into chunks; the last one may be shorter and sends its share, rounded up. The
    side information are the places within their chunks, ascending, each in as few bits as count to the
    chunk's length: twelve of 4096. The values are those at these places.

    Parameters
    ----------
    k
        Values that a chunk sends.
    chunk
        Length of a chunk, at most 4096.
    """

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 2  # 1 had twelve bits for every place
    gives_values: ClassVar[bool] = True
    k: int = 64
    chunk: int = LONGEST_CHUNK

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.chunk <= LONGEST_CHUNK:
            raise ValueError(f"k={self.k}, chunk={self.chunk}: expected 1 <= k <= chunk <= {LONGEST_CHUNK}")

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Choose by magnitude; of equal ones the first."""
        flat = values.detach().reshape(-1)
        whole = flat.numel() // self.chunk * self.chunk
        places = []
        at_once = max(1, 2 * SLICE // self.chunk) * self.chunk
        for begin in range(0, whole, at_once):
            part = flat[begin : min(begin + at_once, whole)].view(-1, self.chunk)
            places.append(_largest(part, self.k) + begin)
        if whole < flat.numel():
            places.append(_largest(flat[None, whole:], self._share(flat.numel() - whole)) + whole)
        chosen = torch.from_numpy(np.concatenate(places))
        within = (chosen % self.chunk).to(torch.uint8 if self._bits <= 8 else torch.int32)
        return Encoded(flat[chosen], pack_bits(within, self._bits))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return the chosen values, and a place for each."""
        count = self._count(int(np.prod(shape, dtype=object)))
        return Layout((count,), dtype, packed_bytes(count, self._bits))

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> SparseTensor:
        """Return the values at their places."""
        size = torch.Size(shape)
        count, chunks = values.numel(), size.numel() // self.chunk
        indices = _places_of(count, size.numel())
        # Whole bytes at a time, and in place: there may be as many places as there are values.
        for begin in range(0, count, SLICE):
            end = min(begin + SLICE, count)
            packed = side[begin * self._bits // 8 :][: packed_bytes(end - begin, self._bits)]
            indices[begin:end] = unpack_bits(packed, self._bits, end - begin)
            # The chunk that each is in; all that follow the whole ones are in the last.
            chunk = torch.arange(begin, end).div_(self.k, rounding_mode="floor").clamp_(max=chunks)
            indices[begin:end] += chunk.mul_(self.chunk)
        if not all(
            bool((indices[begin + 1 :][:SLICE] > indices[begin:-1][:SLICE]).all())
            for begin in range(0, count, SLICE)
        ):
            raise ValueError("its places are not ascending")
        if int(indices[-1]) >= size.numel():
            raise ValueError("a place is beyond the end")
        return SparseTensor(size, indices, values)

    @property
    def _bits(self) -> int:
        """Bits of a place."""
        return max(1, (self.chunk - 1).bit_length())

    def _share(self, rest: int) -> int:
        return -(-self.k * rest // self.chunk)

    def _count(self, numel: int) -> int:
        return numel // self.chunk * self.k + self._share(numel % self.chunk)


@dataclass(frozen=True)
class TopKTiles(Codec):
    """Send the largest values of every tile of a matrix, as `TopK` does of every chunk.

    These are the chunks of SparseLoCo (2508.15706). A tile has h rows and w columns, the largest divisors up
    to ``tile`` of the matrix's rows and columns. Tiles come row by row, and so do the values in them; places
    count within a tile. A vector is one row. Of a tensor of more dimensions all but the last count as rows.

    Parameters
    ----------
    k
        Values that a tile sends; a smaller tile sends all.
    tile
        Longest side of a tile, at most 64.
    """

    name: ClassVar[str] = "topk_tiles"
    gives_values: ClassVar[bool] = True
    k: int = 64
    tile: int = LONGEST_SIDE

    def __post_init__(self) -> None:
        if not (1 <= self.tile <= LONGEST_SIDE and 1 <= self.k <= self.tile**2):
            raise ValueError(
                f"k={self.k}, tile={self.tile}: expected 1 <= tile <= {LONGEST_SIDE} and 1 <= k <= tile²"
            )

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Choose by magnitude; of equal ones the first."""
        tiles = self._tiles(tuple(values.shape))
        down, height, across, width = tiles
        cut = values.detach().reshape(down, height, across, width).transpose(1, 2)
        return self._topk(tiles).encode(cut.reshape(-1), draw)

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return the chosen values, and a place for each."""
        down, height, across, width = tiles = self._tiles(shape)
        return self._topk(tiles).layout((down * height * across * width,), dtype, length)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> SparseTensor:
        """Return the values at their places in the tensor."""
        down, height, across, width = tiles = self._tiles(shape)
        cut = self._topk(tiles).decode(values, side, (down * height * across * width,), dtype)
        # In place, and some at a time: there may be as many places as there are values.
        for places in cut.indices.split(SLICE):
            tile = places.div(height * width, rounding_mode="floor")
            within = places.remainder_(height * width)
            row = tile.div(across, rounding_mode="floor").mul_(height)
            row += within.div(width, rounding_mode="floor")
            column = tile.remainder_(across).mul_(width).add_(within.remainder_(width))
            places.copy_(row.mul_(across * width).add_(column))
        return SparseTensor(torch.Size(shape), cut.indices, cut.values)

    def _tiles(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return tiles in a column of them, rows of each, tiles in a row of them, columns of each."""
        columns = shape[-1] if shape else 1
        rows = int(np.prod(shape[:-1], dtype=object))
        height, width = (self._side(length) for length in (rows, columns))
        return rows // height, height, columns // width, width

    def _side(self, length: int) -> int:
        sides = range(min(self.tile, length), 0, -1)
        return next((side for side in sides if length % side == 0), 1)

    def _topk(self, tiles: tuple[int, int, int, int]) -> TopK:
        size = tiles[1] * tiles[3]
        return TopK(min(self.k, size), size)


@dataclass(frozen=True)
class RandomK(Codec):
    """Send one value of every run of ``stride`` neighbours, at a place that is drawn anew every time.

    The side information is the seed s (8 bytes). Of run i of length m the place is

        z = s + (i + 1) · 0x9E3779B97F4A7C15;  z = (z ⊕ z>>30) · 0xBF58476D1CE4E5B9;
        z = (z ⊕ z>>27) · 0x94D049BB133111EB;  place = ((z ⊕ z>>31) >> 32) · m >> 32

    modulo 2^64 (SplitMix64), so that other programs find it too.

    Parameters
    ----------
    stride
        Length of a run; the last one may be shorter.
    scaled
        Multiply what is sent by the length of its run: the mean over all draws is then the tensor itself.
        Error feedback needs it unscaled.
    """

    name: ClassVar[str] = "randomk"
    gives_values: ClassVar[bool] = True
    stride: int = 32
    scaled: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.stride, int) or not 1 <= self.stride <= 2**20:
            raise ValueError(f"stride={self.stride}: expected 1 to {2**20}")

    @property
    def contracts(self) -> bool:
        """Whether values are sent as they are."""
        return not self.scaled

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Draw a seed, and take what it names."""
        seed = draw.integers(0, 2**64, size=1, dtype=np.uint64)
        flat = values.detach().reshape(-1)
        indices = self._places(seed, flat.numel())
        chosen = flat[indices]
        if self.scaled:
            lengths = torch.full(chosen.shape, self.stride)
            lengths[-1] = flat.numel() - (len(lengths) - 1) * self.stride
            chosen = chosen * lengths.to(chosen.dtype)
        return Encoded(chosen, torch.from_numpy(seed.view(np.uint8)))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return a value a run, and the seed."""
        return Layout((-(-int(np.prod(shape, dtype=object)) // self.stride),), dtype, 8)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> SparseTensor:
        """Return the values at the places that the seed names."""
        size = torch.Size(shape)
        indices = self._places(side.numpy().copy().view(np.uint64), size.numel())
        return SparseTensor(size, indices, values)

    def _places(self, seed: "np.ndarray[tuple[int], np.dtype[np.uint64]]", count: int) -> torch.Tensor:
        """Return the drawn index of every run."""
        indices = _places_of(-(-count // self.stride), count)
        for begin in range(0, len(indices), SLICE):
            runs = np.arange(begin, min(begin + SLICE, len(indices)), dtype=np.uint64)
            lengths = np.minimum(self.stride, count - runs.astype(np.int64) * self.stride).astype(np.uint64)
            z = seed + (runs + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            places = ((z ^ (z >> np.uint64(31))) >> np.uint64(32)) * lengths >> np.uint64(32)
            drawn = (runs * np.uint64(self.stride) + places).astype(np.int64)
            indices[begin : begin + len(drawn)] = torch.from_numpy(drawn)
        return indices


@dataclass(frozen=True)
class Bitmask(Codec):
    """Send the values that are not zero, and a bit for every value: lossless but for the sign of a zero."""

    name: ClassVar[str] = "bitmask"
    gives_values: ClassVar[bool] = True

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Leave the zeros out."""
        flat = values.detach().reshape(-1)
        mask = flat != 0
        kept = flat[torch.from_numpy(np.flatnonzero(mask.numpy()))]
        return Encoded(kept, pack_bits(mask, 1), kept.numel())

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return ``length`` values, and a bit for every value of the tensor."""
        count = int(np.prod(shape, dtype=object))
        if length is None or length > count:
            raise ValueError(f"{length} of {count} values are said to be other than zero")
        return Layout((length,), dtype, packed_bytes(count, 1))

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> SparseTensor:
        """Put the values where the mask says."""
        size = torch.Size(shape)
        indices = _places_of(values.numel(), size.numel())
        found = 0
        # A slice at a time: a byte for each bit of the whole mask would be a third of the result.
        for begin in range(0, size.numel(), SLICE):
            bits = unpack_bits(side[begin // 8 :], 1, min(SLICE, size.numel() - begin))
            places = np.flatnonzero(bits.numpy())
            room = indices[found : found + len(places)]
            room.copy_(torch.from_numpy(places + begin)[: len(room)])
            found += len(places)
        if found != values.numel():
            raise ValueError(f"its mask has {found} bits set for {values.numel()} values")
        return SparseTensor(size, indices, values)


def _places_of(count: int, numel: int) -> torch.Tensor:
    """Return room for ``count`` places in ``numel`` values, of the smaller type that holds them.

    Also those that a liar claims beyond the end, within a chunk: they must be seen, and not wrap around.
    """
    return torch.empty(count, dtype=torch.int32 if numel < 2**30 else torch.int64)


def _largest(rows: torch.Tensor, k: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return where the ``k`` largest magnitudes of each row are, in the flattened rows, ascending.

    Magnitudes are compared as integers, which their bits are ordered as; a partial sort for the k-th, and one
    pass for those above it, is several times faster than ``torch.topk``.
    """
    bits = rows.to(torch.float32).abs().view(torch.int32).numpy()
    length = bits.shape[1]
    if k == 1:
        return np.argmax(bits, axis=1) + length * np.arange(len(bits))
    least = np.partition(bits, length - k, axis=1)[:, length - k, None]
    chosen = np.flatnonzero(bits >= least)
    if len(chosen) == k * len(bits):
        return chosen
    # Equal magnitudes at the border: of these only the first ones.
    equal = bits == least
    above = bits > least
    wanted = k - above.sum(1, keepdims=True)
    return np.flatnonzero(above | (equal & (np.cumsum(equal, axis=1) <= wanted)))
