"""What a silo keeps on its own disk from one request to the next, and reads again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from photon.config.renamed import renamed
from photon.config.schema import RunConfig
from photon.link.encoding import PackedGroups, payloads_of
from photon.link.messages import TrainReport, TrainRequest
from photon.link.update import encodings_of, with_encodings
from photon.silo.site import SiloSite
from photon.state.silo import SiloState, SiloStore
from photon.strategy.contract import LOCAL
from photon.strategy.local import Kept
from photon.training.groups import StateGroups


def silo_store(silo: str, site: SiloSite, config: RunConfig) -> SiloStore:
    """Return what a silo has on its disk of the run."""
    # One more than the server's checkpoints, so that a run can go on from any of them.
    return SiloStore(site.state / silo, keep=config.checkpoint.keep + 1)


def reply_file(request: TrainRequest, site: SiloSite, config: RunConfig) -> Path:
    """Return the file that `train` keeps the reply to a request in."""
    return silo_store(request.silo, site, config).reply_file(request.round)


def kept_reply(store: SiloStore, request: TrainRequest) -> tuple[PackedGroups, TrainReport] | None:
    """Return the reply and the report of a request that the silo has carried out; None: it has not."""
    if (done := store.reply(request.run_id, request.model_id, request.round)) is None:
        return None
    before, payloads = done
    # It is as it was sent, in an earlier version's words if one has sent it.
    report = renamed().content(json.loads(before.report))
    return with_encodings(payloads, before.encodings), TrainReport.model_validate(report)


def kept_state(store: SiloStore, request: TrainRequest) -> tuple[SiloState | None, bool]:
    """Return what the silo kept from its last accepted round, and whether it has lost that."""
    if request.last_round == 0:
        return None, False
    state = store.load(request.run_id, request.last_round)
    if state is None or state.position != request.position:
        return None, True
    return state, False


def kept_of(state: SiloState) -> Kept:
    """Tell the local optimizer's groups from the method's own."""
    local = {group: tensors for group, tensors in state.groups.items() if group.startswith(LOCAL)}
    optimizer = {group: tensors for group, tensors in state.groups.items() if group not in local}
    return Kept(optimizer, state.scalars, local)


@dataclass(frozen=True)
class Stays:
    """What a silo keeps for its next round.

    Attributes
    ----------
    position
        Windows taken from its text so far.
    groups, scalars
        State groups and scalars of the local optimizer, and the method's own groups.
    """

    position: int
    groups: StateGroups = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)


def save_round(
    store: SiloStore,
    request: TrainRequest,
    stays: Stays,
    report: TrainReport,
    reply: PackedGroups,
    feedback: StateGroups,
    text: str,
) -> None:
    """Keep the reply and what the next round needs.

    Parameters
    ----------
    text
        Hash of the text that was trained on.
    reply, feedback
        The encoded reply, and what the link wants to see again with the next one.
    """
    store.save(
        SiloState(
            run_id=request.run_id,
            model_id=request.model_id,
            round=request.round,
            position=stays.position,
            scalars=dict(stays.scalars),
            report=report.model_dump_json(),
            encodings=encodings_of(reply),
            accepted=request.last_round,
            text=text,
            groups=stays.groups,
            link=feedback,
        ),
        payloads_of(reply),
    )
