"""What a run tells of itself: the events of its start, of its rounds, and of what went wrong."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from photon.config.schema import RunConfig
from photon.federation.agreement import consensus, silo_cosine
from photon.federation.exchange import Failure
from photon.link.messages import SiloInfo, TrainReport
from photon.models.build import parameter_count
from photon.models.flops import mfu, model_flops_per_token
from photon.models.reference import take_reference
from photon.objective.configured import model_of, objective_of
from photon.state.checkpoint import Checkpoint, ServerState
from photon.state.unlearned import Unlearned as Forgotten
from photon.strategy.base import Aggregate, Participant, Reply
from photon.telemetry.events import (
    Checkpointed,
    Diagnostics,
    Evaluated,
    EventStream,
    Notice,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SiloFailed,
    SiloFinished,
    Unlearned,
    evaluation_of,
)
from photon.training.schedule import never_at_peak

#: By how much the recall of what was forgotten may rise before there is a warning.
COMES_BACK = 0.1


@dataclass
class Traffic:
    """Bytes of a round's training on the link, over all silos, and those of each state group."""

    up: int = 0
    down: int = 0
    groups_up: Counter[str] = field(default_factory=Counter)
    groups_down: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply, down: int, groups_down: Mapping[str, int]) -> None:
        """Count a reply, and the message that it answers."""
        self.up += reply.bytes_up
        self.down += down
        self.groups_up.update(reply.group_bytes_up)
        self.groups_down.update(groups_down)


class RoundEvents:
    """Tells the stream of events what happens in a run's rounds.

    Parameters
    ----------
    config
        The run's configuration.
    stream
        Where events go.
    """

    def __init__(self, config: RunConfig, stream: EventStream) -> None:
        self._config = config
        self.stream = stream
        self._not_evaluating: set[str] = set()
        self._flops_per_token = 0.0
        self._roofline: dict[str, float | None] = {}

    def run_started(
        self,
        name: str,
        state: ServerState,
        silos: Sequence[SiloInfo],
        participants: Sequence[Participant],
        resumed_from: int | None,
    ) -> None:
        """Tell what is trained, and by whom."""
        config = self._config
        model = model_of(config, state.vocab_size, "meta")
        # A reference reads all that the model does, without a gradient, which is two thirds of the work.
        reading = 4 / 3 if take_reference(model) else 1.0
        self._flops_per_token = reading * model_flops_per_token(model, state.sequence_length)
        self._roofline = {silo.name: silo.roofline_flops for silo in silos}
        self._roofline["centralized"] = silos[0].roofline_flops
        self.stream.emit(
            RunStarted(
                run_id=state.run_id,
                name=name,
                strategy=config.strategy.target.rpartition(".")[2],
                model=config.model.name,
                parameters=parameter_count(model),
                silos=[
                    {
                        "name": silo.name,
                        "train_tokens": silo.train_tokens,
                        "validation_tokens": silo.validation_tokens,
                        "unigram_loss": silo.unigram_loss,
                    }
                    for silo in silos
                ],
                rounds=config.rounds,
                cohort=min(config.cohort or len(participants), len(participants)),
                local_steps=config.local_steps if objective_of(config).trains else 0,
                batch_size=participants[0].batch_size,
                sequence_length=state.sequence_length,
                engine=config.federation.engine,
                device=silos[0].device,
                roofline_flops=silos[0].roofline_flops,
                resumed_from=resumed_from,
                flops_per_token=self._flops_per_token,
                privacy={
                    "noise_multiplier": config.privacy.noise_multiplier,
                    "delta": config.privacy.delta,
                },
                tree=config.federation.tree if isinstance(config.federation.tree, dict) else None,
            )
        )
        schedule = never_at_peak(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
        if schedule is not None and config.federation.parent is None and objective_of(config).trains:
            self.notice("warning", schedule)

    def round_started(self, before: ServerState, cohort: Sequence[Participant]) -> None:
        """Tell who is drawn."""
        names = [participant.name for participant in cohort]
        self.stream.emit(RoundStarted(round=before.round + 1, cohort=names, global_step=before.global_step))

    def silo_finished(self, reply: Reply, bytes_down: int, group_bytes_down: dict[str, int]) -> None:
        """Tell what a reply that counts brought."""
        report = reply.report
        speed = report.tokens / report.seconds["training"]
        roofline = self._roofline.get(reply.participant)
        privacy = report.privacy
        self.stream.emit(
            SiloFinished(
                round=report.round,
                silo=reply.participant,
                steps=report.steps,
                tokens=report.tokens,
                loss=_number(report.loss),
                loss_last=_number(report.loss_last),
                learning_rate=_number(report.learning_rate),
                seconds=report.seconds,
                bytes_up=reply.bytes_up,
                bytes_down=bytes_down,
                update_norm=_number(report.update_norm),
                tokens_per_second=speed,
                mfu=mfu(speed, self._flops_per_token, roofline) if report.steps else None,
                gradient_norm=_number(report.gradient_norm),
                group_bytes_up=reply.group_bytes_up,
                group_bytes_down=group_bytes_down,
                before_merge={
                    name: evaluation_of(found["loss"], found["tokens"])
                    for name, found in report.before_merge.items()
                },
                privacy=(
                    None
                    if privacy is None
                    else {
                        "clip_norm": privacy.clip_norm,
                        "noise_multiplier": privacy.noise_multiplier,
                        "releases": privacy.releases,
                    }
                ),
            )
        )
        if not report.steps and not report.tokens:
            self.notice(
                "info",
                f"round {report.round}: {reply.participant} found nothing to train on, and took no steps",
            )
        if report.state_lost:
            self.notice(
                "warning",
                f"round {report.round}: {reply.participant} had lost its local state; it went on from the "
                "right place in its text with a fresh local optimizer",
            )
        if report.text_changed:
            self.notice(
                "warning",
                f"round {report.round}: {reply.participant} has other text than in its last round; it goes "
                "on at the same place of that",
            )

    def silo_failed(self, server_round: int, name: str, failure: Failure) -> None:
        """Tell why a participant's answer does not count."""
        self.stream.emit(SiloFailed(round=server_round, silo=name, kind=failure.kind, reason=failure.reason))

    def round_finished(
        self,
        after: ServerState,
        aggregate: Aggregate,
        reports: Mapping[str, TrainReport],
        traffic: Traffic,
        seconds: float,
        spent: Mapping[str, float],
    ) -> None:
        """Tell what a round came to.

        Parameters
        ----------
        reports, traffic
            What replies brought.
        seconds
            That the round took.
        spent
            Those that the server itself spent, by phase.
        """
        training = self._training_seconds(reports.values())
        all_seconds: Any = {
            "round": seconds,
            "training": training,
            **spent,
            "overhead": seconds - training,
        }
        self.stream.emit(_round_finished(after, aggregate, reports, traffic, all_seconds))
        if aggregate.unlearned is not None:
            told = aggregate.unlearned.model_dump(mode="json")
            self.stream.emit(Unlearned(round=after.round, request=told))
        self.stream.emit(_diagnostics(after, aggregate, reports))

    def adopted(self, server_round: int, figures: Mapping[str, float]) -> None:
        """Tell how key layers looked at those of the federation above, if they did."""
        if figures:
            values = {f"{figure}/down": value for figure, value in figures.items()}
            self.stream.emit(Diagnostics(round=server_round, values=values))

    def checkpointed(self, saved: Checkpoint, run_dir: Path, seconds: float) -> None:
        """Tell where a round's checkpoint lies."""
        self.stream.emit(
            Checkpointed(
                round=saved.state.round,
                path=str(saved.path.relative_to(run_dir)),
                bytes=sum(file.stat().st_size for file in saved.path.iterdir()),
                seconds=seconds,
            )
        )

    def does_not_evaluate(self, name: str, reason: str) -> None:
        """Tell once that a silo's policy leaves it out of the perplexities; that is no failure."""
        if name not in self._not_evaluating:
            self._not_evaluating.add(name)
            self.notice("info", f"{name} does not evaluate the model: {reason}")

    def evaluated(self, evaluated: Evaluated, unlearned: Sequence[Forgotten]) -> None:
        """Tell what silos found, and warn where a model answers again what was taken out of it."""
        self.stream.emit(evaluated)
        recall = evaluated.recall
        if recall is None or not unlearned:
            return
        last = unlearned[-1]
        then = last.after.get("forget/rouge1", 0.0)
        if recall > then + COMES_BACK:
            self.notice(
                "warning",
                f"round {evaluated.round}: what was forgotten comes back: the model gives {recall:.2f} of "
                f"the answers (ROUGE-1 recall), and gave {then:.2f} when {last.asked_by} had them forgotten; "
                "look at what it is trained on, or unlearn again",
            )

    def notice(self, level: Literal["info", "warning"], message: str) -> None:
        """Tell the user something."""
        self.stream.emit(Notice(level=level, message=message))

    def _training_seconds(self, reports: Collection[TrainReport]) -> float:
        """Return the seconds in which silos trained: side by side on own machines, else in turn."""
        federation = self._config.federation
        side_by_side = {"inprocess": 1, "simulation": federation.silos_in_parallel}
        each = [report.seconds["training"] for report in reports]
        return max(*each, sum(each) / side_by_side.get(federation.engine, len(each)))


def _round_finished(
    after: ServerState,
    aggregate: Aggregate,
    reports: Mapping[str, TrainReport],
    traffic: Traffic,
    seconds: Any,
) -> RoundFinished:
    names = list(aggregate.weights)
    weights = [aggregate.weights[name] for name in names]
    norms = [_number(reports[name].update_norm) for name in names]
    norm = aggregate.step.pseudo_gradient_norm
    agreed = consensus(norm, weights, norms)
    return RoundFinished(
        round=after.round,
        global_step=after.global_step,
        tokens=after.tokens,
        train_loss=_mean_loss(reports.values()),
        pseudo_gradient_norm=norm,
        silo_cosine=silo_cosine(norm, weights, norms),
        consensus=math.nan if agreed is None else agreed,
        parameter_norm=aggregate.step.parameter_norm,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        seconds=seconds,
        group_bytes_up=dict(traffic.groups_up),
        group_bytes_down=dict(traffic.groups_down),
    )


def _mean_loss(reports: Collection[TrainReport]) -> float:
    """Return the mean loss over the tokens that were trained; NaN where none were."""
    told = [(_number(report.loss), report.tokens) for report in reports if report.tokens]
    return math.fsum(loss * tokens for loss, tokens in told) / sum(t for _, t in told) if told else math.nan


def _number(value: float | None) -> float:
    """Return a figure of a report; NaN where no steps were taken."""
    return math.nan if value is None else value


def _diagnostics(after: ServerState, aggregate: Aggregate, reports: Mapping[str, TrainReport]) -> Diagnostics:
    step = aggregate.step
    values = {f"noise/{name}": value for name, value in after.noise.figures().items()}
    values |= {f"outer_{group}_norm/all": norm for group, norm in step.state_norms.items()}
    for figure, norms in (
        ("pseudo_gradient_norm", step.pseudo_gradient_norms),
        ("parameter_norm", step.parameter_norms),
    ):
        for layer, of_layer in _by_layer(norms).items():
            values[f"{figure}/{layer}"] = math.hypot(*of_layer)
    values |= aggregate.figures
    for silo, report in reports.items():
        values |= {f"{figure}/{silo}": value for figure, value in report.diagnostics.items()}
    return Diagnostics(round=after.round, values=values)


def _by_layer(norms: Mapping[str, float]) -> dict[str, list[float]]:
    """Gather the norms of parameters by layer: the numbered block, or else the module."""
    layers: dict[str, list[float]] = {}
    for name, norm in norms.items():
        block = re.match(r".*?\.\d+(?=\.)", name)
        layers.setdefault(block[0] if block else name.rpartition(".")[0] or name, []).append(norm)
    return layers
