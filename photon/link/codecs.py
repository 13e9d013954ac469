"""The codecs that a run can name in ``link.up``, ``link.down`` and ``link.states``."""

from photon.link.coding import Codec
from photon.link.quantize import Cast

__all__ = ["CODECS", "Cast"]

#: Name on the wire to codec.
CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Cast,)}
