"""What answers at a node: the methods that all kinds have, and which kind an operator has set up.

The kind follows from the node config alone. Of a request only the name that it is for counts: at a node that
may act as federations of a tree, it says which of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.link.answer import Answer, NodeConfig
from photon.link.messages import Body, EvaluateReport, EvaluateRequest, SiloInfo, TrainReport, TrainRequest
from photon.link.request import NodeRequest
from photon.silo.policy import Cost
from photon.silo.service import KeyQuestion, SiloNode
from photon.silo.site import NodeSettings, SiloSite
from photon.strategy.contract import Contract
from photon.subfederation import branch, gateway, islands

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class Node(Protocol):
    """A silo, a federation of the tree, a gateway, or a silo of islands.

    It is called by the gate alone (`photon.node`), and knows neither policies' limits nor messages.
    """

    @property
    def inside(self) -> RunConfig | None:
        """Configuration of rounds of its own; None: it has none."""

    @property
    def rules(self) -> TreeNode | None:
        """What its operator has it decide for its own rounds; None: nothing."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the text below it knows."""

    def check_asked(self, silo: str, members: list[str]) -> None:
        """Check that it is what a request is for; it may look at nothing but names and its own disk."""

    @property
    def is_federation(self) -> bool:
        """Whether it is a federation in the place of a silo."""

    def check_contract(self, contract: Contract) -> None:
        """Check that it has what is to leave."""

    def describe(self) -> list[SiloInfo]:
        """Tell of the participants that live here."""

    def query(self, question: KeyQuestion) -> Body:
        """Take part in agreeing on the masks of a secure sum."""

    def has_answered(self, request: TrainRequest) -> bool:
        """Tell whether the reply to a request is kept, so that nothing is trained for it."""

    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what a request does with the text of each silo that it touches, at most."""

    def train(self, request: TrainRequest, groups: Groups, contract: Contract) -> tuple[Any, TrainReport]:
        """Train, and return what leaves, encoded as it travels, and the report."""

    def kept_file(self, request: TrainRequest) -> Path | None:
        """Return the file of a reply that the store may have itself; None: there is none."""

    def evaluate(self, request: EvaluateRequest, groups: Groups) -> EvaluateReport:
        """Evaluate the received model."""


def node_of(
    settings: NodeSettings,
    site: SiloSite,
    config: RunConfig,
    request: NodeRequest,
    node_config: NodeConfig,
    within: Answer,
    beside: Answer,
) -> Node:
    """Return what answers a request.

    Parameters
    ----------
    settings, node_config
        What the operator has set.
    site, config
        Where things lie, and the run's configuration as it is carried out here.
    within, beside
        What answers for silos within a federation of the tree, and for islands.
    """
    if settings.federation is not None:
        return gateway.GatewayNode(gateway.read_gateway(settings.federation), site, config)
    if settings.is_federation:
        steps = request.body.steps if isinstance(request.body, TrainRequest) else config.local_steps
        carry_out = islands.drive(node_config, settings, beside)
        return islands.IslandsNode(settings, site, config, steps, carry_out)
    root = config.federation.root
    if root is None or not settings.may_branch:
        return SiloNode(settings, site, config)
    child = None if request.silo is None else root.child(request.silo)
    if child is None or child.is_silo:
        return branch.TreeSilos(settings, site, config)
    return branch.BranchNode(child, site, config, branch.drive(node_config, within))
