"""The codecs that a run's configuration names, built and checked."""

from collections.abc import Collection, Sequence

from photon.components import build
from photon.config.expression import expression
from photon.config.schema import CodecSection, LinkSection
from photon.errors import PhotonError
from photon.link.encoding import Codec, Pipelines, check_pipeline


def uplink_pipelines(link: LinkSection) -> Pipelines:
    """Return the codecs from silo to server.

    Raises
    ------
    PhotonError
        If they do not fit each other or the way that they are used.
    """
    params = _codecs(link.uplink, "link.uplink")
    named = [
        (expression(entry.names, "link.uplink_by_name"), _codecs(entry.codecs, "link.uplink_by_name"))
        for entry in link.uplink_by_name
    ]
    if link.error_feedback:
        for codecs in (params, *(codecs for _, codecs in named)):
            _check_contracts(codecs, "link.error_feedback=true")
    return Pipelines(params, _codecs(link.states, "link.states"), named)


def downlink_pipelines(link: LinkSection) -> Pipelines:
    """Return the codecs of whole tensors from server to silo; errors as for :func:`uplink_pipelines`."""
    params = [] if link.downlink_payload == "update" else _codecs(link.downlink, "link.downlink")
    return Pipelines(params, _codecs(link.states, "link.states"))


def change_pipeline(link: LinkSection) -> list[Codec]:
    """Return the codecs of what changes in the parameters, from server to silo."""
    codecs = _codecs(link.downlink, "link.downlink")
    _check_contracts(codecs, "link.downlink_payload=update")
    return codecs


def check_names(link: LinkSection, params: Collection[str]) -> None:
    """Check that every expression of ``link.uplink_by_name`` is found in the name of a parameter.

    Raises
    ------
    PhotonError
        For the first that is not.
    """
    for entry in link.uplink_by_name:
        if params and not any(expression(entry.names, "link.uplink_by_name").search(name) for name in params):
            raise PhotonError(
                f"link.uplink_by_name: {entry.names!r} fits no parameter; there are such as {min(params)}"
            )


def _check_contracts(codecs: Sequence[Codec], where: str) -> None:
    if stray := [codec for codec in codecs if not codec.contracts]:
        raise PhotonError(
            f"{where}: {stray[0].name} is unbiased by making values larger, which feeding back what is lost "
            "would pile up; make it send them as they are"
        )


def _codecs(sections: Sequence[CodecSection], where: str) -> list[Codec]:
    codecs: list[Codec] = [build(section.as_mapping(), where) for section in sections]
    check_pipeline(codecs, where)
    return codecs
