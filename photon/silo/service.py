"""What a silo does with a message: read the order, let the silo work, pack the answer."""

from flwr.app import RecordDict

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RefusedError
from photon.link.answer import MessageType, NodeConfig
from photon.link.messages import (
    BODY,
    AdvertiseKeys,
    Body,
    Description,
    EvaluateOrder,
    Query,
    ShareKeys,
    TrainOrder,
    Unmask,
    pack,
    pack_refusal,
    unpack,
    unpack_config,
)
from photon.link.records import dense_groups
from photon.link.transport import SiloLink
from photon.silo import secure
from photon.silo.describe import describe
from photon.silo.evaluate import evaluate
from photon.silo.kept import reply_file, silo_store
from photon.silo.shapes import contract_of, evaluated_shapes
from photon.silo.site import SiloSite, find_site
from photon.silo.train import train


def answer(message_type: MessageType, content: RecordDict, node_config: NodeConfig) -> RecordDict:
    """Do what a message asks for.

    Parameters
    ----------
    message_type
        What kind of message it is.
    content
        Its content: a body, the run's configuration, and state groups where the order brings any.
    node_config
        What the silo's operator has set.

    Returns
    -------
    RecordDict
        The content of the reply; a refusal where the silo's policy forbids what is asked.

    Raises
    ------
    PhotonError
        If the message, the silo's data or its state do not fit.
    """
    return answer_at(message_type, content, *find_site(node_config, parse(unpack_config(content))))


def answer_at(
    message_type: MessageType, content: RecordDict, site: SiloSite, config: RunConfig
) -> RecordDict:
    """Do what a message asks for at a site, whatever configuration the message brings."""
    try:
        return _SERVICES[message_type](content, site, config)
    except RefusedError as refusal:
        return RecordDict({BODY: pack_refusal(refusal)})


def _query(content: RecordDict, site: SiloSite, config: RunConfig) -> RecordDict:
    order = unpack(content, Query).root
    reply: Body
    if isinstance(order, AdvertiseKeys):
        reply = secure.advertise_keys(order, site)
    elif isinstance(order, ShareKeys):
        reply = secure.share_keys(order, site)
    elif isinstance(order, Unmask):
        reply = secure.unmask(order, site)
    else:
        reply = Description(silos=describe(site, config))
    return RecordDict({BODY: pack(reply)})


def _train(content: RecordDict, site: SiloSite, config: RunConfig) -> RecordDict:
    order = unpack(content, TrainOrder)
    if (order.masking is not None) != config.privacy.secure_aggregation:
        raise PhotonError("secure aggregation: the order and the run's configuration do not agree on it")
    _check_order(order, site, config)  # before any tensor is read
    link = SiloLink(site.store, site.state)
    vocab_size = site.prepared().manifest.vocab_size
    contract = contract_of(config, vocab_size, order.round, order.silo)
    received = link.receive(content, contract.arriving)
    groups, report = train(order, dense_groups(received), site, config)
    kept = None
    if order.masking is not None:
        groups = secure.mask(order, order.masking, groups, site, config, contract.masked)
    elif config.federation.engine == "simulation":
        # Server and silos are one user on one machine there.
        kept = reply_file(order, site, config)
    reply = link.send(groups, content, kept)
    reply[BODY] = pack(report)
    return reply


def _evaluate(content: RecordDict, site: SiloSite, config: RunConfig) -> RecordDict:
    order = unpack(content, EvaluateOrder)
    _check_evaluation(order, site, config)
    shapes = evaluated_shapes(config, site.prepared().manifest.vocab_size)
    received = SiloLink(site.store, site.state).receive(content, shapes)
    return RecordDict({BODY: pack(evaluate(order, dense_groups(received), site, config))})


def _check_order(order: TrainOrder, site: SiloSite, config: RunConfig) -> None:
    """Let the silo's policy judge a train order.

    Raises
    ------
    RefusedError
        If a rule forbids it.
    """
    manifest = site.prepared().manifest
    site.policy.check_run(order.silo, config, manifest.vocab_size)
    site.policy.check_contract(order.silo, contract_of(config, manifest.vocab_size, order.round, order.silo))
    store = silo_store(order.silo, site, config)
    if store.reply(order.run_id, order.model_id, order.round) is None:
        site.policy.check_order(order, manifest.sequence_length, store.trained_tokens(order.run_id))


def _check_evaluation(order: EvaluateOrder, site: SiloSite, config: RunConfig) -> None:
    """Let the silo's policy judge an evaluate order.

    Raises
    ------
    RefusedError
        If a rule forbids it.
    """
    site.policy.check_evaluation(order.silo)
    site.policy.check_run(order.silo, config, site.prepared().manifest.vocab_size)


_SERVICES = {"query": _query, "train": _train, "evaluate": _evaluate}
