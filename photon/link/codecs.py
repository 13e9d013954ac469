"""The codecs that a run can name in ``link.uplink``, ``link.downlink`` and ``link.states``."""

from photon.link.encoding import CODECS
from photon.link.lossless import Zstd
from photon.link.low_rank import PowerSGD
from photon.link.quantize import E3M0, Cast, Float8, Int, Sign, TwoBit
from photon.link.sparsify import Bitmask, RandomK, TopK, TopKTiles

__all__ = [
    "CODECS",
    "E3M0",
    "Bitmask",
    "Cast",
    "Float8",
    "Int",
    "PowerSGD",
    "RandomK",
    "Sign",
    "TopK",
    "TopKTiles",
    "TwoBit",
    "Zstd",
]

# Receivers look names up there.
CODECS |= {
    codec.name: codec
    for codec in (Cast, Float8, Int, E3M0, Sign, TwoBit, TopK, TopKTiles, RandomK, Bitmask, PowerSGD, Zstd)
}
