"""The gate of a node: what is judged of a request, in which order, before anything of it is done.

It is the only way in, for every kind of message and every kind of node (`photon.subfederation.nodes`): in a
silo's worker, in a simulation, for the silos within a federation and for the islands of a silo. What may be
forbidden is in `photon.silo.policy`.
"""

from functools import partial

from flwr.app import RecordDict

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RefusedError
from photon.link.answer import Answer, MessageType, NodeConfig
from photon.link.messages import (
    BODY,
    Body,
    Describe,
    Description,
    EvaluateOrder,
    TrainOrder,
    pack,
    pack_refusal,
)
from photon.link.records import dense_groups
from photon.link.request import read_request
from photon.link.transport import SiloLink
from photon.preflight import preflight, preflight_gateway
from photon.silo import secure
from photon.silo.site import SiloSite, find_site, read_settings
from photon.state.silo import SiloCounts, Use, counting
from photon.subfederation.branch import with_border
from photon.subfederation.nodes import Node, node_of


def answer(
    message_type: MessageType,
    content: RecordDict,
    node_config: NodeConfig,
    islands: Answer | None = None,
    *,
    outermost: bool = True,
) -> RecordDict:
    """Do what a message asks for, if all that stands before it is passed.

    Parameters
    ----------
    message_type
        What kind of message it is.
    content
        Its content: a body, the run's configuration, and state groups where the order brings any.
    node_config
        What the node's operator has set.
    islands
        What answers for each island of a silo; None: this function, in this process.
    outermost
        Whether the request comes from outside the node. One of a federation here to its own silos was judged
        and counted with the request that this federation was asked.

    Returns
    -------
    RecordDict
        The content of the reply; a refusal where the operator forbids what is asked.

    Raises
    ------
    PhotonError
        If the message, the node's data or its state do not fit.
    """
    try:
        return _answer(message_type, content, node_config, islands or answer, outermost)
    except RefusedError as refusal:
        return RecordDict({BODY: pack_refusal(refusal)})


def _answer(
    message_type: MessageType,
    content: RecordDict,
    node_config: NodeConfig,
    islands: Answer,
    outermost: bool,
) -> RecordDict:
    """Let a request through the gate. Nothing of a step runs if one before it refuses."""
    # 1. The message: sizes and types of its body.
    request = read_request(message_type, content)
    body, silo = request.body, request.silo

    # 2. The configuration, by schema alone: nothing is imported or built.
    run = parse(request.config)

    # 3. Policy on names, before what they name is imported; and which node this is, by the node config.
    settings = read_settings(node_config)
    site, config = find_site(node_config, with_border(run, silo))
    policy = site.policy
    policy.check_names(silo or "the node", config)
    within = partial(answer, outermost=False)
    node = node_of(settings, site, config, request, node_config, within, islands)
    if silo is not None:
        node.check_asked(silo, body.members if isinstance(body, TrainOrder) else [silo])

    # 4. Whether it can run: components are imported and built, once for a text.
    preflight(run)
    if node.rules is not None:
        preflight_gateway(config, node.rules)
    if node.inside is not None:
        preflight(node.inside)
    if isinstance(body, Describe):
        return _reply(Description(silos=node.describe()))
    if not isinstance(body, TrainOrder | EvaluateOrder):
        return _reply(node.query(body))

    # 5. Contract: what may arrive and leave.
    if isinstance(body, EvaluateOrder):
        policy.check_evaluation(body.silo)
    policy.check_run(body.silo, config, node.vocab_size)
    if isinstance(body, TrainOrder):
        policy.check_order(body)
        _check_contract(body, node, site, config)

    # 6. and 7. What it costs each silo whose text it touches, against limits and counts; and it is counted.
    if isinstance(body, TrainOrder) and outermost and settings.island is None:
        _count(body, node, site)

    # 8. The tensors are read, and the node works.
    link = SiloLink(site.store, site.state)
    shapes = node.shapes(training=isinstance(body, TrainOrder))
    groups = dense_groups(link.receive(content, shapes))
    if isinstance(body, EvaluateOrder):
        return _reply(node.evaluate(body, groups))
    trained, report = node.train(body, groups)

    # 9. The reply: a subset of the contract (CONTRACT: `trained` and `report` are not compared with it yet),
    # under masks where the run has them.
    if body.masking is None:
        reply = link.send(trained, content, node.kept_file(body))
    else:
        masked = secure.mask(body, body.masking, trained, site, config, shapes["params"])
        reply = link.send(masked, content)
    reply[BODY] = pack(report)
    return reply


def _check_contract(order: TrainOrder, node: Node, site: SiloSite, config: RunConfig) -> None:
    """Check that an order asks for nothing that configuration and node do not say themselves.

    CONTRACT: until both sides compute one, the groups that leave are those that the order names.

    Raises
    ------
    RefusedError
        If the policy forbids what would leave.
    PhotonError
        If the order does not agree with the configuration, or the node has no such groups.
    """
    if (order.masking is not None) != config.privacy.secure_aggregation:
        raise PhotonError("secure aggregation: the order and the run's configuration do not agree on it")
    leaving = order.due
    site.policy.check_leaving(order.silo, leaving)
    node.check_leaving(leaving)


def _count(order: TrainOrder, node: Node, site: SiloSite) -> None:
    """Judge what an order does with the text of each silo, and count it, unless its reply is kept.

    It is counted before the node works, so a crash counts twice, and never not at all.

    Raises
    ------
    RefusedError
        If it goes beyond a limit for one of them; it then counts for none.
    """
    if node.has_answered(order):
        return
    costs = node.cost(order)
    with counting(site.state):
        for silo, cost in costs.items():
            uses = SiloCounts(site.state, silo).used()
            ever = Use(sum(use.tokens for use in uses.values()), sum(use.releases for use in uses.values()))
            site.policy.check_cost(silo, cost, uses.get(order.run_id, Use()), ever)
        for silo, cost in costs.items():
            SiloCounts(site.state, silo).add(order.run_id, cost.tokens, cost.releases)


def _reply(body: Body) -> RecordDict:
    return RecordDict({BODY: pack(body)})
