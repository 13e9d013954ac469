"""A codec that loses nothing."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import zstandard

from photon.link.encoding import Codec, Encoded, Layout

#: Bytes of the smallest window that a frame can have, RFC 8878.
_LEAST_WINDOW = 1024


@dataclass(frozen=True)
class Zstd(Codec):
    """Compress the bytes of all that was made before.

    Parameters
    ----------
    level
        Of Zstandard: more is smaller and slower.
    width
        Bytes that belong together. With 4, first come all first bytes of four, then all second ones: the
        exponents of float32 are alike, its mantissas are noise.
    """

    name: ClassVar[str] = "zstd"
    on_bytes: ClassVar[bool] = True
    level: int = 3
    width: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19 or self.width not in (1, 2, 4, 8):
            raise ValueError(f"level={self.level}, width={self.width}: expected 1 to 19, and 1, 2, 4 or 8")

    def encode(
        self, values: torch.Tensor, draw: np.random.Generator, feedback: torch.Tensor | None = None
    ) -> Encoded:
        """Compress ``values``, bytes of shape (n,)."""
        whole = values.numel() // self.width * self.width
        planes = values[:whole].view(-1, self.width).T.reshape(-1)
        data = torch.cat((planes, values[whole:])) if self.width > 1 else values
        frame = zstandard.ZstdCompressor(level=self.level).compress(data.numpy().data)
        return Encoded(torch.frombuffer(bytearray(frame), dtype=torch.uint8), length=len(frame))

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype, length: int | None) -> Layout:
        """Return ``length`` bytes, at most what Zstandard makes of bytes that cannot be compressed."""
        (size,) = shape
        # ZSTD_COMPRESSBOUND of zstd.h.
        most = size + (size >> 8) + (max(0, 2**17 - size) >> 11)
        if length is None or not 0 < length <= most:
            raise ValueError(f"a frame of {length} bytes for {size}")
        return Layout((length,), torch.uint8)

    def decode(
        self, values: torch.Tensor, side: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Decompress exactly the expected number of bytes."""
        (size,) = shape
        frame = values.numpy().data
        try:
            # The frame claims how much to allocate: believe it only where it is what must come out.
            claimed = zstandard.get_frame_parameters(frame)
            if claimed.content_size != size or claimed.window_size > max(size, _LEAST_WINDOW):
                raise ValueError(f"its frame does not hold {size} bytes")
            data = zstandard.ZstdDecompressor().decompress(
                frame, max_output_size=size, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise ValueError(f"its frame is damaged: {error}") from error
        with warnings.catch_warnings():
            # The bytes are read-only; so is what is made from them, by contract.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(np.frombuffer(data, dtype=np.uint8))
        if self.width == 1:
            return flat
        whole = size // self.width * self.width
        out = torch.empty_like(flat)
        out[:whole].view(-1, self.width).copy_(flat[:whole].view(self.width, -1).T)
        out[whole:] = flat[whole:]
        return out
