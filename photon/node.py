"""Which node answers a message: a silo, a federation of the tree, a gateway, or a silo of islands."""

from pathlib import Path

from flwr.app import RecordDict

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.link.answer import Answer, MessageType, NodeConfig
from photon.link.messages import (
    BODY,
    Describe,
    Description,
    EvaluateOrder,
    Query,
    TrainOrder,
    pack,
    unpack,
    unpack_config,
)
from photon.preflight import preflight, preflight_gateway
from photon.silo import service
from photon.silo.site import NodeSettings, SiloSite, find_site, read_settings
from photon.subfederation import islands as island_rounds
from photon.subfederation import service as member_service
from photon.subfederation.config import border_privacy
from photon.subfederation.describe import describe_children
from photon.subfederation.gateway import GatewaySettings, below, drive, read_gateway
from photon.subfederation.member import Drive, Member


def answer(
    message_type: MessageType,
    content: RecordDict,
    node_config: NodeConfig,
    islands: Answer | None = None,
) -> RecordDict:
    """Do what a message asks for; see `photon.silo.service.answer`.

    A message to a node of the tree that has children goes to the federation that it is, any other to a silo.

    Parameters
    ----------
    message_type, content, node_config
        As for `photon.silo.service.answer`.
    islands
        What answers for each island of a silo; None: this function, in this process.
    """
    config = preflight(parse(unpack_config(content)))
    settings = read_settings(node_config)
    if settings.federation is not None:
        gateway = read_gateway(settings.federation)
        return _answer_as_gateway(gateway, message_type, content, *find_site(node_config, config))
    if settings.is_federation:
        carry_out = island_rounds.drive(node_config, settings, islands or answer)
        return _answer_with_islands(
            settings, carry_out, message_type, content, *find_site(node_config, config)
        )
    root = config.federation.root
    if root is None:
        return service.answer(message_type, content, node_config)
    site, carried_out = find_site(node_config, config)
    if message_type == "query":
        if isinstance(unpack(content, Query).root, Describe):
            return RecordDict({BODY: pack(Description(silos=describe_children(root, site, carried_out)))})
        # Keys and shares of secure aggregation are alike for silos and federations.
        return service.answer_at(message_type, content, site, carried_out)
    train = message_type == "train"
    order = unpack(content, TrainOrder) if train else unpack(content, EvaluateOrder)
    node = root.child(order.silo)
    if node is not None and not node.is_silo:
        member = _ready(Member(node, site, carried_out, _drive_here(node_config)))
        return member_service.answer(member, message_type, content)
    if node is not None and node.privacy is not None:
        config = config.model_copy(update={"privacy": border_privacy(config, node)})
    return service.answer_at(message_type, content, *find_site(node_config, config))


def answer_alone(message_type: MessageType, content: RecordDict, node_config: NodeConfig) -> RecordDict:
    """Do what a message asks a silo for, whatever tree its configuration has: for the silo's worker."""
    preflight(parse(unpack_config(content)))
    return service.answer(message_type, content, node_config)


def _drive_here(node_config: NodeConfig) -> Drive:
    """Return what carries out assignments of a federation of the tree: its silos answer in this process.

    They are held to what the operator of this node has set, and keep their state in the federation's folder.
    """

    def carry_out(config: RunConfig, resume: bool) -> None:
        own = dict(node_config)
        if "state-dir" in own:
            own["state-dir"] = str(Path(str(config.run_dir)) / "silos")
        run_inprocess(config, answer, own, resume=resume, live=False)

    return carry_out


def _answer_as_gateway(
    settings: GatewaySettings,
    message_type: MessageType,
    content: RecordDict,
    site: SiloSite,
    config: RunConfig,
) -> RecordDict:
    """Answer for a federation behind a SuperLink of its own; the silo's policy judges the run for it."""
    preflight_gateway(config, settings.node)
    member = _ready(Member(settings.node, site, config, drive(settings), below(settings)))
    return member_service.answer_as_silo(member, message_type, content, lambda _: None)


def _answer_with_islands(
    settings: NodeSettings,
    carry_out: Drive,
    message_type: MessageType,
    content: RecordDict,
    site: SiloSite,
    config: RunConfig,
) -> RecordDict:
    """Answer for a silo of islands; its policy judges what all of them do together."""
    steps = unpack(content, TrainOrder).steps if message_type == "train" else config.local_steps
    member = _ready(
        Member(
            island_rounds.node_of(settings, site),
            site,
            config,
            carry_out,
            island_rounds.below(settings),
            island_rounds.config_of(settings, config, steps),
        )
    )
    return member_service.answer_as_silo(member, message_type, content, island_rounds.judge(member, settings))


def _ready(member: Member) -> Member:
    """Return a member whose own configuration can run."""
    preflight(member.config)
    return member
