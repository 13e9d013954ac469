"""What a round adds to the state that the next one needs: counters, the ledger of silos, typical scalars."""

import hashlib
import json
import math
import statistics
import uuid
from collections.abc import Collection, Iterable
from typing import Any

from photon.config.admission import AdmissionSection
from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation.intake import Collected
from photon.link.messages import SiloInfo, TrainReport
from photon.models.vocabulary import joined_vocabulary
from photon.objective.configured import steps_of
from photon.state.checkpoint import LedgerEntry, ServerState
from photon.state.unlearned import Unlearned
from photon.strategy.base import Aggregate, hint_of_rates
from photon.training.schedule import resolve_schedule


def first_state(silo: SiloInfo, unlearned: Collection[Unlearned] = ()) -> ServerState:
    """Return the numbers of a run before its first round, whose silos are as this one.

    Parameters
    ----------
    unlearned
        What was taken out of the model that it starts from.
    """
    return ServerState(
        run_id=uuid.uuid4().hex,
        round=0,
        global_step=0,
        tokens=0,
        vocab_size=silo.vocab_size,
        sequence_length=silo.sequence_length,
        tokenizer_sha256=silo.tokenizer_sha256,
        unlearned=list(unlearned),
    )


def with_decided(state: ServerState, silos: Iterable[SiloInfo]) -> ServerState:
    """Return a state that knows what the machines of silos train with; what it knew already stays."""
    told = {silo.name: silo.decided for silo in silos if silo.decided is not None}
    return state.model_copy(update={"decided": told | state.decided})


def advance(
    config: RunConfig,
    before: ServerState,
    collected: Collected,
    aggregate: Aggregate,
) -> ServerState:
    """Return the state after a round.

    Parameters
    ----------
    config
        The run's configuration.
    before
        The state that the round began with.
    collected
        What the replies brought.
    aggregate
        What the replies came to.

    Raises
    ------
    RunError
        If the outer step leaves no finite parameters.
    """
    server_round, reports = before.round + 1, collected.reports
    step = aggregate.step
    if not math.isfinite(step.pseudo_gradient_norm) or not math.isfinite(step.parameter_norm):
        raise RunError(
            f"round {server_round}: the outer step leaves no finite parameters; {hint_of_rates(config)}"
        )
    ledger = dict(before.ledger)
    for name, report in reports.items():
        tokens = ledger.get(name, LedgerEntry()).tokens + report.tokens
        ledger[name] = LedgerEntry(
            last_round=server_round,
            position=report.position,
            tokens=tokens,
            steps_per_second=report.steps / report.seconds["training"] if report.steps else None,
            arrival_seconds=collected.arrivals[name],
            sizes=dict(collected.sizes[name]),
        )
    for name in collected.rejected - set(reports):
        ledger[name] = rejected(ledger.get(name, LedgerEntry()), server_round, config.federation.admission)
    decided = dict(before.decided)
    for name, report in reports.items():
        if report.decided is not None:
            decided[name] = report.decided.completed(decided.get(name))
    return before.model_copy(
        update={
            "round": server_round,
            "global_step": before.global_step + steps_of(config, server_round),
            "tokens": before.tokens + sum(report.tokens for report in reports.values()),
            "model_id": uuid.uuid4().hex,
            "ledger": ledger,
            "outer_scalars": dict(aggregate.outer_scalars),
            "averaged_rounds": before.averaged_rounds | dict.fromkeys(aggregate.averaged, server_round),
            "local_scalars": _typical_scalars(reports.values()),
            "routed": list(aggregate.routed),
            "unlearned": [*before.unlearned, *([] if aggregate.unlearned is None else [aggregate.unlearned])],
            "decided": decided,
            "vocabulary": _joined(before.vocabulary, reports.values()),
            "noise": before.noise.add(
                aggregate.step.pseudo_gradient_norm,
                [reports[k].update_norm or 0.0 for k in aggregate.weights],
            ),
        }
    )


def rejected(entry: LedgerEntry, server_round: int, admission: AdmissionSection) -> LedgerEntry:
    """Return the entry of a participant whose reply was rejected; after too many in a row it is not drawn."""
    rejected = entry.rejected + 1
    if rejected != admission.quarantine_after:
        return entry.model_copy(update={"rejected": rejected})
    until = server_round + admission.quarantine_rounds
    return entry.model_copy(update={"rejected": 0, "quarantined_until": until})


def _joined(before: str | None, reports: Collection[TrainReport]) -> str | None:
    """Return the rows that were trained, all that reports tell of them; None: no report tells any."""
    for report in reports:
        if report.vocabulary is not None:
            before = joined_vocabulary(before, report.vocabulary)
    return before


def _typical_scalars(reports: Collection[TrainReport]) -> dict[str, float]:
    """Return the median of each scalar state, which a single silo cannot distort."""
    names = {name for report in reports for name in report.scalars}
    return {
        name: statistics.median_low([r.scalars[name] for r in reports if name in r.scalars])
        for name in sorted(names)
    }


def config_before(state: ServerState) -> RunConfig | None:
    """Return the configuration of a run until a checkpoint; None: an earlier version has not kept it."""
    try:
        return parse(state.config) if state.config else None
    except PhotonError:
        return None


def renewed(state: ServerState, config: RunConfig) -> ServerState:
    """Return a state by which silos answer what they would train now, and not what they have kept.

    A silo that has trained a round answers from its disk when it is asked again. Where a setting has changed
    since, that reply is of the old one: of a rate, say, because of which a run was taken back a round. So the
    model goes by another name under other settings, and by the same one under the same.

    Parameters
    ----------
    config
        The configuration as nodes get it now.
    """
    before = config_before(state)
    if before is None or (now := _trained_by(config)) == _trained_by(before):
        return state
    name = f"{state.model_id}/{json.dumps(now, sort_keys=True)}"
    return state.model_copy(update={"model_id": hashlib.sha256(name.encode()).hexdigest()[:32]})


def _trained_by(config: RunConfig) -> dict[str, Any]:
    """Return what of a configuration the reply of a silo depends on, but for rounding."""
    training, federation = config.training, config.federation
    values = config.model_dump(mode="json", by_alias=True)
    whole = (
        "local_steps",
        "cohort",
        "adapter",
        "objective",
        "optimizer",
        "strategy",
        "transition",
        "privacy",
    )
    # How the tensors reach a silo does not matter.
    way = {"store", "transport", "inline_limit_mb", "keep_received", "mean_over"}
    return {
        **{key: values[key] for key in whole},
        "schedule": resolve_schedule(config.schedule.as_mapping(), config.total_steps, training.batch_size),
        "training": [training.batch_size, training.clip_norm],
        "link": {key: value for key, value in values["link"].items() if key not in way},
        "data": [values["data"][key] for key in ("filter", "mixture")],
        "federation": [federation.tree, federation.inner_rounds, federation.server_silo],
        # A federation below takes outer steps of its own.
        "outer": None if federation.tree is None else values["outer"],
    }
