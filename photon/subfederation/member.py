"""A federation that takes part in a larger one as a silo does.

It answers the same messages with the same kinds of reply. To train it runs rounds over members of its own,
from what the federation above sent; the node that it is called by is a name of the tree, or the one of a
gateway. What it keeps lies in a run folder of its own::

    FOLDER/config.yaml  events.jsonl  checkpoints/    as of any run
    FOLDER/assignments.json                           where each round of the federation above began and ended
    FOLDER/assignment/                                the last one

So it goes on exactly from the round that was last accepted above, and answers a repeated order without
training.
"""

import math
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from pydantic import BaseModel, ConfigDict, ValidationError

from photon.config.schema import RunConfig
from photon.config.tree import ResidualTag, TreeNode, unknown_silo
from photon.errors import PhotonError, RunError
from photon.federation.assignment import DESCRIPTION, EVALUATION, Assignment
from photon.federation.roster import joined
from photon.files.atomic import write_text
from photon.link.answer import MessageType
from photon.link.messages import (
    BODY,
    EvaluateOrder,
    EvaluateReport,
    NodeLoss,
    Release,
    SiloInfo,
    TrainOrder,
    TrainReport,
    pack,
    unpack,
)
from photon.link.records import dense_groups
from photon.link.transport import SiloLink
from photon.link.update import encode_reply
from photon.privacy.gaussian import release
from photon.silo import secure, work
from photon.silo.site import SiloSite
from photon.state.checkpoint import Checkpoint, CheckpointStore
from photon.state.tensors import StateGroups, load_groups, save_groups
from photon.strategy.base import strategy_of
from photon.subfederation.config import border_privacy, member_config
from photon.telemetry.events import ClientFinished, RoundFinished
from photon.telemetry.log import current_history, read_events

#: Carries out the assignment in the folder of a configuration; the flag: whether there are checkpoints.
Drive = Callable[[RunConfig, bool], None]
Tensors = Mapping[str, torch.Tensor]


class _Span(BaseModel):
    """Where a round of the federation above began and ended, in own rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    model_id: str
    begins: int
    ends: int


class _Spans(BaseModel):
    """Rounds of the federation above, and how many orders of it were followed."""

    model_config = ConfigDict(extra="forbid")

    rounds: dict[int, _Span] = {}
    orders: int = 0


def describe_children(node: TreeNode, site: SiloSite, config: RunConfig) -> list[SiloInfo]:
    """Describe the children of a node of the tree, whose silos all have their text in ``site.data``.

    Raises
    ------
    PhotonError
        If a silo of the tree has no data.
    """
    silos = {silo.name: silo for silo in work.describe(site, config)}
    if problem := unknown_silo(node, sorted(silos)):
        raise PhotonError(problem)
    infos = [
        silos[child.name] if child.is_silo else joined(child.name, [silos[name] for name in child.silos()])
        for child in node.children
    ]
    own = config.federation.own_silo
    if own is not None and own not in silos:
        raise PhotonError(f"federation.own_silo={own}: no such silo; there are {', '.join(sorted(silos))}")
    return infos if own is None else [*infos, silos[own]]


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
        self._site = site
        self._above = config
        self._drive = drive
        self.run_dir = (site.state / node.name).absolute()
        self._unseen = below is not None
        self.config = member_config(inside or config, node, self.run_dir, site, below or {})
        self._checkpoints = CheckpointStore(self.run_dir / "checkpoints", self.config.checkpoint.keep)

    def answer(self, message_type: MessageType, content: RecordDict) -> RecordDict:
        """Do what a message of the federation above asks for.

        Raises
        ------
        PhotonError
            If it cannot be done; rounds that are finished stay.
        """
        try:
            return self._answer(message_type, content)
        except RunError as error:
            raise PhotonError(f"{self.node.name}: {error}") from error

    def _answer(self, message_type: MessageType, content: RecordDict) -> RecordDict:
        link = SiloLink(self._site.store, self._site.state)
        if self._unseen:
            shapes = work.shapes_for(self._above, self.described.vocab_size)
        else:
            shapes = work.expected_shapes(self._site, self._above)
        if message_type == "train":
            order = unpack(content, TrainOrder)
            if order.due != ["params"]:
                states = ", ".join(group for group in order.due if group != "params")
                raise PhotonError(
                    f"{order.silo} is a federation, which has no {states} of its own; use a strategy that "
                    "averages parameters alone"
                )
            packed, report = self.train(order, dense_groups(link.receive(content, shapes)))
            if order.masking is not None:
                packed = secure.mask(order, order.masking, packed, self._site, self._above, shapes["params"])
            reply = link.send(packed, content)
            reply[BODY] = pack(report)
            return reply
        evaluation = unpack(content, EvaluateOrder)
        groups = dense_groups(link.receive(content, shapes))
        return RecordDict({BODY: pack(self.evaluate(evaluation, groups["params"]))})

    def describe(self) -> SiloInfo:
        """Ask the members, and return what they are together."""
        assignment = Assignment(kind="describe", round=0, model_id="", begins=0, ends=0)
        assignment.write(self.run_dir, {})
        self._drive(self.config, bool(self._checkpoints.rounds()))
        return self.described

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

    def train(self, order: TrainOrder, groups: Mapping[str, Tensors]) -> tuple[Any, TrainReport]:
        """Train rounds from what the federation above sent.

        Returns
        -------
        tuple
            The state groups of the reply, encoded as they travel, and the report.

        Raises
        ------
        PhotonError
            If the order is one that only a silo can follow, or the members do not fit.
        """
        begin = time.perf_counter()
        if order.base is not None:
            raise PhotonError(
                f"{order.silo} is a federation, to which parameters do not travel as a change; set "
                "link.down_of=parameters"
            )
        span, lost = self._span(order)
        assignment = Assignment(
            kind="train",
            round=order.round,
            model_id=order.model_id,
            begins=span.begins,
            ends=span.ends,
            global_step=order.global_step,
            residuals=order.residuals,
        )
        if not self._has(span.ends):
            assignment.write(self.run_dir, self._completed(groups, span.begins))
            self._drive(self.config, bool(self._checkpoints.rounds()))
        after = self._checkpoints.load(span.ends)
        reply, let_out = self._released(self._reply(after, order), groups["params"], order, span)
        shared = set(reply["params"]) - set(self._key_names(after.load_params()))
        due = {name: reply["params"][name] for name in shared}
        trained = time.perf_counter()
        report = self._report(order, span, after, due, groups["params"], lost, trained - begin)
        report = report.model_copy(update={"release": let_out})
        memory = self._link_memory(order.last_round)
        packed, memory = encode_reply(
            reply,
            groups["params"],
            self._above.link,
            memory,
            seed=f"{self._above.seed}/{order.round}/{order.silo}",
        )
        if memory:
            save_groups(self._link_file(order.round), memory)
        return packed, report

    def evaluate(self, order: EvaluateOrder, params: Tensors) -> EvaluateReport:
        """Let the members evaluate the received model, and the federation's own and theirs if asked."""
        spans = self._spans().rounds
        span = spans.get(order.last_round)
        known = span is not None and span.run_id == order.run_id and self._has(span.ends)
        ends = span.ends if span is not None and known else 0
        key_names = self._key_names(params) if order.own and known else ()
        received = self._evaluated(order, params, ends, own=order.own and not key_names)
        if not order.own:
            return received
        own = received
        if key_names:
            kept = self._checkpoints.load(ends).load_params()
            merged = {**params, **{name: kept[name] for name in key_names}}
            own = self._evaluated(order, merged, ends, own=True)
        per_node = {self.node.name: NodeLoss(loss=own.loss, tokens=own.tokens)}
        if not self._unseen:
            per_node |= own.per_node
        return received.model_copy(update={"per_node": per_node})

    def has_trained(self, order: TrainOrder) -> bool:
        """Tell whether the reply to an order is there already."""
        span = self._spans().rounds.get(order.round)
        return (
            span is not None
            and (span.run_id, span.model_id) == (order.run_id, order.model_id)
            and self._has(span.ends)
        )

    # --- rounds -------------------------------------------------------------------------------------

    def _span(self, order: TrainOrder) -> tuple[_Span, bool]:
        """Return the own rounds that an order means, and whether what it goes on from is lost."""
        spans = self._spans()
        span = spans.rounds.get(order.round)
        asked = (order.run_id, order.model_id)
        if (
            span is not None
            and (span.run_id, span.model_id) == asked
            and self._has(span.begins, or_none=True)
        ):
            return span, False
        last = spans.rounds.get(order.last_round)
        begins = last.ends if last is not None and last.run_id == order.run_id else 0
        lost = order.last_round > 0 and not (begins and self._has(begins))
        if lost or order.last_round == 0:
            # Its first round of this run, or nothing is left of the earlier ones.
            begins = 0
            self._forget()
            spans = _Spans(orders=spans.orders)
        else:
            self._checkpoints.discard_after(begins)
        self._release_file(order.round).unlink(missing_ok=True)
        span = _Span(run_id=order.run_id, model_id=order.model_id, begins=begins, ends=begins + self._rounds)
        kept = {at: one for at, one in spans.rounds.items() if at < order.round}
        write_text(
            self.run_dir / "assignments.json",
            _Spans(rounds={**kept, order.round: span}, orders=spans.orders + 1).model_dump_json(indent=1)
            + "\n",
            flush=False,
        )
        return span, lost

    def _forget(self) -> None:
        """Remove what earlier rounds have left; the description stays."""
        for name in ("checkpoints", "silos", "assignment"):
            shutil.rmtree(self.run_dir / name, ignore_errors=True)
        for name in ("events.jsonl", "assignments.json"):
            (self.run_dir / name).unlink(missing_ok=True)

    @property
    def _rounds(self) -> int:
        return self.node.rounds or self._above.federation.inner_rounds

    def _spans(self) -> _Spans:
        file = self.run_dir / "assignments.json"
        try:
            return _Spans.model_validate_json(file.read_text())
        except (OSError, ValidationError):
            return _Spans()

    def _has(self, own_round: int, *, or_none: bool = False) -> bool:
        rounds = self._checkpoints.rounds()
        return own_round in rounds or (or_none and not rounds and own_round == 0)

    def _completed(self, groups: Mapping[str, Tensors], begins: int) -> Mapping[str, Tensors]:
        """Add the own key layers where the federation above sends none, so that a model can start."""
        if not self._has(begins):
            return groups
        own = self._checkpoints.load(begins).load_params()
        return {**groups, "params": {**own, **groups["params"]}}

    def _key_names(self, params: Tensors) -> tuple[str, ...]:
        from photon.strategy.key_layers import key_layers

        layers = key_layers(self.config)
        return () if layers is None else layers.split(params).key_names

    # --- replies ------------------------------------------------------------------------------------

    def _reply(self, after: Checkpoint, order: TrainOrder) -> StateGroups:
        params = after.load_params()
        due = params if order.due_params is None else {name: params[name] for name in order.due_params}
        groups: StateGroups = {"params": dict(due)}
        kept = after.load_kept()
        slots = {f"residual-{tag.slot}" for tag in after.state.residuals}
        return groups | {group: kept[group] for group in sorted(slots)}

    def _released(
        self, reply: StateGroups, received: Tensors, order: TrainOrder, span: _Span
    ) -> tuple[StateGroups, Release | None]:
        """Clip and noise what crosses the border, if the node says so; once for each order.

        Blocks of its members do not cross such a border: nothing bounds what they tell.
        """
        if self.node.privacy is None:
            return reply, None
        privacy = border_privacy(self._above, self.node)
        assert privacy.clip_norm is not None, "the configuration refuses it"
        if privacy.noise_multiplier > 0 and strategy_of(self.config).trims:
            raise PhotonError("privacy.noise_multiplier: no noise hides the vocabulary; see docs/worldlm.md")
        file = self._release_file(order.round)
        if not file.exists():
            generator = None
            if privacy.seed is not None:
                generator = torch.Generator().manual_seed(
                    random.Random(f"{privacy.seed}/{order.round}/{order.silo}").getrandbits(63)
                )
            released, _ = release(received, reply["params"], privacy, generator)
            save_groups(file, {"params": released})
        counted = Release(
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            releases=self._spans().orders,
        )
        return {"params": load_groups(file).get("params", {})}, counted

    def _report(
        self,
        order: TrainOrder,
        span: _Span,
        after: Checkpoint,
        shared: Tensors,
        received: Tensors,
        lost: bool,
        seconds: float,
    ) -> TrainReport:
        history = current_history(read_events(self.run_dir / "events.jsonl"))
        rounds = [
            event
            for event in history
            if isinstance(event, RoundFinished) and span.begins < event.round <= span.ends
        ]
        clients = [
            event
            for event in history
            if isinstance(event, ClientFinished) and span.begins < event.round <= span.ends
        ]
        tokens = sum(client.tokens for client in clients)
        squares = (
            float(torch.linalg.vector_norm(tensor - received[name])) ** 2 for name, tensor in shared.items()
        )
        training = max(1e-6, sum(event.seconds["training"] for event in rounds))
        return TrainReport(
            round=order.round,
            silo=order.silo,
            steps=sum(
                max(client.steps for client in clients if client.round == event.round) for event in rounds
            ),
            tokens=tokens,
            position=span.ends,
            loss=sum(client.loss * client.tokens for client in clients) / tokens,
            loss_last=sum(client.loss_last * client.tokens for client in clients) / tokens,
            learning_rate=clients[-1].learning_rate,
            gradient_norm=sum(client.gradient_norm for client in clients) / len(clients),
            update_norm=math.sqrt(sum(squares)),
            seconds={
                "load": max(0.0, seconds - training),
                "training": training,
                "save": 0.0,
                "total": max(1e-6, seconds),
            },
            state_lost=lost,
            leaves=len({client.silo for client in clients}) if self._unseen else len(self.node.silos()),
            residuals=[] if self.node.privacy else self._tags(after),
            vocabulary=after.state.vocabulary,
        )

    def _evaluated(self, order: EvaluateOrder, params: Tensors, ends: int, *, own: bool) -> EvaluateReport:
        assignment = Assignment(
            kind="evaluate",
            round=order.round,
            model_id=order.run_id,
            begins=ends,
            ends=ends,
            own=own,
        )
        assignment.write(self.run_dir, {"params": params})
        self._drive(self.config, bool(self._checkpoints.rounds()))
        return EvaluateReport.model_validate_json((self.run_dir / EVALUATION).read_text())

    def _release_file(self, server_round: int) -> Path:
        return self.run_dir / f"released-{server_round:06d}.safetensors"

    def _tags(self, after: Checkpoint) -> list[ResidualTag]:
        """Return what the residuals are; members that are not seen above stay unnamed."""
        if not self._unseen:
            return after.state.residuals
        return [tag.model_copy(update={"origin": "member"}) for tag in after.state.residuals]

    def _link_file(self, server_round: int) -> Path:
        return self.run_dir / f"link-{server_round:06d}.safetensors"

    def _link_memory(self, last_round: int) -> StateGroups:
        file = self._link_file(last_round)
        return load_groups(file) if last_round and file.exists() else {}
