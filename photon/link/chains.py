"""The codecs that a run's configuration names, built and checked."""

from collections.abc import Sequence

from photon.components import build
from photon.config import CodecSection, LinkSection
from photon.errors import PhotonError
from photon.link.coding import Chains, Codec, check_chain


def up_chains(link: LinkSection) -> Chains:
    """Return the codecs from silo to server.

    Raises
    ------
    PhotonError
        If they do not fit each other or the way that they are used.
    """
    params = _codecs(link.up, "link.up")
    if link.error_feedback and (stray := [codec for codec in params if not codec.contracts]):
        raise PhotonError(
            f"link.error_feedback=true: {stray[0].name} is unbiased by making values larger, which error "
            "feedback would pile up; set link.error_feedback=false"
        )
    return Chains(params, _codecs(link.states, "link.states"))


def down_chains(link: LinkSection) -> Chains:
    """Return the codecs from server to silo; errors as for :func:`up_chains`."""
    return Chains(_codecs(link.down, "link.down"), _codecs(link.states, "link.states"))


def _codecs(sections: Sequence[CodecSection], where: str) -> list[Codec]:
    codecs: list[Codec] = [build(section.as_mapping(), where) for section in sections]
    check_chain(codecs, where)
    return codecs
