"""What leaves a federation for the one above: state groups as they travel, and a report of its rounds."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from photon.config.decided import agreed
from photon.config.schema import RunConfig
from photon.config.tree import RoutedTag, TreeNode
from photon.errors import PhotonError
from photon.link.bounded import as_figure
from photon.link.messages import NodeLoss, PrivacyReport, TrainReport, TrainRequest
from photon.link.update import encode_reply
from photon.privacy.gaussian import privatise
from photon.state.checkpoint import Checkpoint
from photon.state.tensors import StateGroups
from photon.strategy.base import strategy_of
from photon.strategy.contract import PARAMS, Contract
from photon.subfederation.spans import Span, Spans
from photon.telemetry.events import RoundFinished, SiloFinished
from photon.telemetry.log import current_history, read_events

Tensors = Mapping[str, torch.Tensor]


class Replies:
    """Makes the replies of a federation to the requests that it has followed.

    Parameters
    ----------
    node
        What it decides for itself, and its children.
    above
        The configuration of the federation above.
    config
        Its own, with its run folder.
    spans
        Its own rounds for each request.
    unseen
        Whether nothing names its members above.
    """

    def __init__(
        self, node: TreeNode, above: RunConfig, config: RunConfig, spans: Spans, *, unseen: bool
    ) -> None:
        self._node = node
        self._above = above
        self._config = config
        self._spans = spans
        self._unseen = unseen
        self._run_dir = Path(str(config.run_dir))

    def reply(
        self,
        request: TrainRequest,
        contract: Contract,
        span: Span,
        after: Checkpoint,
        received: Tensors,
        *,
        lost: bool,
        begin: float,
    ) -> tuple[Any, TrainReport]:
        """Return the state groups of a reply, encoded as they travel, and the report.

        Parameters
        ----------
        request, contract
            What was asked for, and what may leave.
        span
            The own rounds of it.
        after
            What they have ended with.
        received
            Parameters that came with the request.
        lost
            Whether what the request goes on from was lost.
        begin
            When work on it began, by `time.perf_counter`.
        """
        groups, privacy_report = self._privatised(_due(after, contract), received, request)
        shared = {name: t for name, t in groups[PARAMS].items() if name not in contract.own}
        trained = time.perf_counter()
        left = self._left(request)
        report = self._report(
            request, span, after, shared, received, lost or left is None, trained - begin
        ).model_copy(update={"privacy": privacy_report})
        return self._encoded(groups, received, request, left or {}), report

    def _privatised(
        self, reply: StateGroups, received: Tensors, request: TrainRequest
    ) -> tuple[StateGroups, PrivacyReport | None]:
        """Clip and noise what crosses the border, if the node says so; once for each request.

        Blocks of its members do not cross such a border: nothing bounds what they tell.
        """
        if self._node.privacy is None:
            return reply, None
        privacy = self._above.border_privacy(self._node)
        assert privacy.clip_norm is not None, "the configuration refuses it"
        if privacy.noise_multiplier > 0 and strategy_of(self._config).local.restricts_rows:
            raise PhotonError("privacy.noise_multiplier: no noise hides the vocabulary; see docs/worldlm.md")
        privatised = self._spans.kept.released(request.round)
        if privatised is None:
            generator = None
            if privacy.seed is not None:
                generator = torch.Generator().manual_seed(
                    random.Random(f"{privacy.seed}/{request.round}/{request.silo}").getrandbits(63)
                )
            privatised, _ = privatise(received, reply["params"], privacy, generator)
            self._spans.kept.keep_released(request.round, privatised)
        counted = PrivacyReport(
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            releases=self._spans.requests,
        )
        return {PARAMS: dict(privatised)}, counted

    def _report(
        self,
        request: TrainRequest,
        span: Span,
        after: Checkpoint,
        shared: Tensors,
        received: Tensors,
        lost: bool,
        seconds: float,
    ) -> TrainReport:
        rounds, replies = self._told(span)
        tokens = sum(reply.tokens for reply in replies)
        squares = (
            float(torch.linalg.vector_norm(tensor - received[name])) ** 2 for name, tensor in shared.items()
        )
        training = max(1e-6, sum(event.seconds["training"] for event in rounds))
        return TrainReport(
            round=request.round,
            silo=request.silo,
            steps=sum(
                max(reply.steps for reply in replies if reply.round == event.round) for event in rounds
            ),
            tokens=tokens,
            position=span.ends,
            loss=as_figure(sum(reply.loss * reply.tokens for reply in replies) / tokens),
            loss_last=as_figure(sum(reply.loss_last * reply.tokens for reply in replies) / tokens),
            learning_rate=as_figure(replies[-1].learning_rate),
            gradient_norm=as_figure(sum(reply.gradient_norm for reply in replies) / len(replies)),
            update_norm=as_figure(math.sqrt(sum(squares))),
            seconds={
                "load": max(0.0, seconds - training),
                "training": training,
                "save": 0.0,
                "total": max(1e-6, seconds),
            },
            state_lost=lost,
            leaves=len({reply.silo for reply in replies}) if self._unseen else len(self._node.silos()),
            routed=[] if self._node.privacy else self._tags(after),
            vocabulary=after.state.vocabulary,
            decided=agreed(after.state.decided.values()),
            before_merge={} if self._unseen else _newest_before_merge(replies),
        )

    def _told(self, span: Span) -> tuple[list[RoundFinished], list[SiloFinished]]:
        """Return what the own rounds and the members in them have told."""
        history = current_history(read_events(self._run_dir / "events.jsonl"))
        rounds = [
            event
            for event in history
            if isinstance(event, RoundFinished) and span.begins < event.round <= span.ends
        ]
        replies = [
            event
            for event in history
            if isinstance(event, SiloFinished) and span.begins < event.round <= span.ends
        ]
        return rounds, replies

    def _tags(self, after: Checkpoint) -> list[RoutedTag]:
        """Return what the routed layers are; members that are not seen above stay unnamed."""
        if not self._unseen:
            return after.state.routed
        return [tag.model_copy(update={"origin": "member"}) for tag in after.state.routed]

    def _left(self, request: TrainRequest) -> StateGroups | None:
        """Return what codecs have left over of the last accepted reply; None: it is lost."""
        return self._spans.kept.left(request.last_round) if request.last_round else {}

    def _encoded(
        self, groups: StateGroups, received: Tensors, request: TrainRequest, left: StateGroups
    ) -> Any:
        """Encode a reply as it travels, and keep what the codecs have left over."""
        seed = f"{self._above.seed}/{request.round}/{request.silo}"
        packed, left = encode_reply(groups, received, self._above.link, left, seed=seed)
        self._spans.kept.keep_left(request.round, left, request.last_round)
        return packed


def _due(after: Checkpoint, contract: Contract) -> StateGroups:
    """Return what the contract asks for: parameters, and key blocks for other federations."""
    params = after.load_params()
    due = contract.leaving[PARAMS].shapes
    groups: StateGroups = {PARAMS: {name: tensor for name, tensor in params.items() if name in due}}
    kept = after.load_kept()
    return groups | {group: kept[group] for group in sorted(set(kept) & set(contract.optional))}


def _newest_before_merge(replies: Sequence[SiloFinished]) -> dict[str, NodeLoss]:
    """Return what silos have told of the models that they ended with, the last of each."""
    return {
        name: NodeLoss(loss=found["loss"], tokens=found["tokens"])
        for reply in replies
        for name, found in reply.before_merge.items()
    }
