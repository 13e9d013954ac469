"""A federation that takes part in a larger one as a silo does.

It answers the same messages with the same kinds of reply. To train it runs rounds over members of its own,
from what the federation above sent; the node that it is called by is a name of the tree, or the one of a
gateway. What it keeps lies in a run folder of its own::

    FOLDER/config.yaml  events.jsonl  checkpoints/    as of any run
    FOLDER/assignments.json                           where each round of the federation above began and ended
    FOLDER/assignment/                                the last one

So it goes on exactly from the round that was last accepted above, and answers a repeated request without
training.
"""

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pydantic import ValidationError

from photon.config.schema import RunConfig
from photon.config.tree import TreeNode
from photon.errors import PhotonError
from photon.federation.assignment import DESCRIPTION, EVALUATION, Assignment
from photon.link.messages import (
    MAX_MEMBERS,
    EvaluateReport,
    EvaluateRequest,
    NodeLoss,
    SiloInfo,
    TrainReport,
    TrainRequest,
)
from photon.silo.site import SiloSite
from photon.state.checkpoint import CheckpointStore
from photon.strategy.base import strategy_of
from photon.strategy.contract import Contract
from photon.subfederation.config import member_config
from photon.subfederation.reply import Replies
from photon.subfederation.spans import Spans

#: Carries out the assignment in the folder of a configuration; the flag: whether there are checkpoints.
Drive = Callable[[RunConfig, bool], None]
Tensors = Mapping[str, torch.Tensor]


class Member:
    """A federation that takes part in a larger one.

    Parameters
    ----------
    node
        What it decides for itself, and its children.
    site
        Where its things lie.
    config
        The configuration of the federation above.
    drive
        How its rounds are run.
    below
        Keys of the configuration's ``federation`` that hold for its own rounds; None: its members are nodes
        of the tree, known above. Otherwise nothing names them there.
    inside
        The configuration that its own is made from; None: the one of the federation above.

    Attributes
    ----------
    node, site
        As above.
    above, config
        The configuration of the federation above, and its own.
    unseen
        Whether nothing names its members above.
    spans
        The own rounds that requests mean.
    """

    def __init__(
        self,
        node: TreeNode,
        site: SiloSite,
        config: RunConfig,
        drive: Drive,
        below: Mapping[str, Any] | None = None,
        inside: RunConfig | None = None,
    ) -> None:
        self.node = node
        self.site = site
        self.above = config
        self.run_dir = (site.state / node.name).absolute()
        self.unseen = below is not None
        self.config = member_config(inside or config, node, self.run_dir, site, below or {})
        self._drive = drive
        self._checkpoints = CheckpointStore(self.run_dir / "checkpoints", self.config.checkpoint.keep)
        self.spans = Spans(self.run_dir, self._checkpoints, node.rounds or config.federation.inner_rounds)
        self._replies = Replies(node, config, self.config, self.spans, unseen=self.unseen)

    def describe(self) -> SiloInfo:
        """Ask the members, and return what they are together."""
        assignment = Assignment(kind="describe", round=0, model_id="", begins=0, ends=0)
        assignment.write(self.run_dir, {})
        self._drive(self.config, bool(self._checkpoints.rounds()))
        described = self.described
        pace = (self.node.rounds or self.above.federation.inner_rounds) * described.pace
        return described.model_copy(update={"pace": min(MAX_MEMBERS, pace)})

    @property
    def described(self) -> SiloInfo:
        """What the members were together when they were last asked.

        Raises
        ------
        PhotonError
            If they never were.
        """
        file = self.run_dir / DESCRIPTION
        try:
            return SiloInfo.model_validate_json(file.read_text())
        except (OSError, ValidationError) as error:
            raise PhotonError(
                f"{file}: the members have not been described; start the run above anew"
            ) from error

    def train(
        self, request: TrainRequest, groups: Mapping[str, Tensors], contract: Contract
    ) -> tuple[Any, TrainReport]:
        """Train rounds from what the federation above sent.

        Parameters
        ----------
        contract
            What may leave the federation in this round of the one above.

        Returns
        -------
        tuple
            The state groups of the reply, encoded as they travel, and the report.

        Raises
        ------
        PhotonError
            If the request is one that only a silo can follow, or the members do not fit.
        """
        begin = time.perf_counter()
        if request.base_hash is not None:
            raise PhotonError(
                f"{request.silo} is a federation, to which parameters do not travel as a change; set "
                "link.downlink_payload=parameters"
            )
        span, lost = self.spans.of(request)
        assignment = Assignment(
            kind="train",
            round=request.round,
            model_id=request.model_id,
            begins=span.begins,
            ends=span.ends,
            global_step=request.global_step,
            routed=request.routed,
            before_merge=request.before_merge,
        )
        if not self.spans.has(span.ends):
            assignment.write(self.run_dir, self._completed(groups, span.begins))
            self._drive(self.config, bool(self._checkpoints.rounds()))
        after = self._checkpoints.load(span.ends)
        return self._replies.reply(request, contract, span, after, groups["params"], lost=lost, begin=begin)

    def evaluate(self, request: EvaluateRequest, params: Tensors) -> EvaluateReport:
        """Let the members evaluate the received model, and the federation's own and theirs if asked."""
        ends = self.spans.end_of(request.run_id, request.last_round)
        own_names = self._own(params) if request.own and ends else ()
        received = self._evaluated(request, params, ends, own=request.own and not own_names)
        if not request.own:
            return received
        own = received
        if own_names:
            kept = self._checkpoints.load(ends).load_params()
            merged = {**params, **{name: kept[name] for name in own_names}}
            own = self._evaluated(request, merged, ends, own=True)
        per_node = {self.node.name: NodeLoss(loss=own.loss, tokens=own.tokens)}
        if not self.unseen:
            per_node |= own.per_node
        return received.model_copy(update={"per_node": per_node})

    def _own(self, params: Tensors) -> Collection[str]:
        """Return the names of the parameters that are the federation's own."""
        shapes = {name: tensor.shape for name, tensor in params.items()}
        return strategy_of(self.config).contract(1, shapes, "federation").own

    def _completed(self, groups: Mapping[str, Tensors], begins: int) -> Mapping[str, Tensors]:
        """Add the own key layers where the federation above sends none, so that a model can start."""
        if not self.spans.has(begins):
            return groups
        own = self._checkpoints.load(begins).load_params()
        return {**groups, "params": {**own, **groups["params"]}}

    def _evaluated(
        self, request: EvaluateRequest, params: Tensors, ends: int, *, own: bool
    ) -> EvaluateReport:
        assignment = Assignment(
            kind="evaluate",
            round=request.round,
            model_id=request.run_id,
            begins=ends,
            ends=ends,
            own=own,
        )
        assignment.write(self.run_dir, {"params": params})
        self._drive(self.config, bool(self._checkpoints.rounds()))
        return EvaluateReport.model_validate_json((self.run_dir / EVALUATION).read_text())
