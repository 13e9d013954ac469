"""What a node judges of the contract: of a round that it is asked for, and of all rounds before the first.

A node that takes part in the first rounds of a run, and must refuse a later one, has given its work for
nothing. So all that follows from the configuration alone is judged when the node is asked who it is.
"""

from collections.abc import Sequence

from photon.config.schema import RunConfig
from photon.link.messages import SiloInfo, TrainRequest
from photon.silo.arriving import check_fixed
from photon.silo.shapes import check_request, contract_of, param_shapes
from photon.silo.site import SiloSite
from photon.strategy.base import strategy_of
from photon.strategy.contract import Contract

#: Bytes of a value of a model as it travels without codecs.
_VALUE_BYTES = 4


def contract_asked(
    request: TrainRequest, site: SiloSite, config: RunConfig, vocab_size: int, *, federation: bool
) -> Contract:
    """Return what may arrive and leave in a round, if the policy allows that and no more is asked.

    Parameters
    ----------
    vocab_size
        Tokens that the text here knows.
    federation
        Whether the node is a federation in the place of a silo.

    Raises
    ------
    RefusedError
        If the policy forbids what would leave.
    PhotonError
        If the request does not agree with the configuration.
    """
    check_request(request, config)
    contract = contract_of(config, vocab_size, request.round, request.silo, federation=federation)
    check_fixed(request, contract.arriving, config)
    site.policy.check_contract(request.silo, contract)
    return contract


def check_ahead(silos: Sequence[SiloInfo], site: SiloSite, config: RunConfig) -> None:
    """Check that no round of a run would be refused here whatever it asks for.

    Parameters
    ----------
    silos
        The participants that live here.

    Raises
    ------
    RefusedError
        If the policy forbids the model, or what would leave in some round.
    PhotonError
        If tensors would come through a store that this machine does not reach.
    """
    if not silos:
        return
    vocab_size, policy = silos[0].vocab_size, site.policy
    link = config.link
    if site.store is None and link.store.url is not None and not link.store.presigned:
        plain = sum(shape.numel() for shape in param_shapes(config, vocab_size).values()) * _VALUE_BYTES
        large = link.transport == "auto" and not link.downlink and plain > link.inline_limit_mb * 2**20
        if link.transport == "store" or large:
            site.check_store("this run's tensors go through a store")
    if not policy.judges_contracts:
        return
    for silo in silos:
        policy.check_run(silo.name, config, vocab_size)
        policy.check_masks(silo.name, masked=config.privacy.secure_aggregation)
        for server_round in strategy_of(config).telling_rounds():
            contract = contract_of(config, vocab_size, server_round, silo.name, federation=silo.federation)
            policy.check_contract(silo.name, contract)
