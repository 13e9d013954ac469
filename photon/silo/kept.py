"""What a silo keeps on its own disk from one order to the next, and reads again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from photon.config.schema import RunConfig
from photon.link.coding import PackedGroups, payloads_of
from photon.link.messages import TrainOrder, TrainReport
from photon.link.update import codings_of, with_codings
from photon.silo.site import SiloSite
from photon.state.silo import SiloState, SiloStore
from photon.strategy.contract import LOCAL
from photon.strategy.local import Kept
from photon.training.groups import StateGroups


def silo_store(silo: str, site: SiloSite, config: RunConfig) -> SiloStore:
    """Return what a silo has on its disk of the run."""
    # One more than the server's checkpoints, so that a run can go on from any of them.
    return SiloStore(site.state / silo, keep=config.checkpoint.keep + 1)


def reply_file(order: TrainOrder, site: SiloSite, config: RunConfig) -> Path:
    """Return the file that `train` keeps the reply to an order in."""
    return silo_store(order.silo, site, config).reply_file(order.round)


def kept_reply(store: SiloStore, order: TrainOrder) -> tuple[PackedGroups, TrainReport] | None:
    """Return the reply and the report of an order that the silo has carried out; None: it has not."""
    if (done := store.reply(order.run_id, order.model_id, order.round)) is None:
        return None
    before, payloads = done
    return with_codings(payloads, before.codings), TrainReport.model_validate_json(before.report)


def kept_state(store: SiloStore, order: TrainOrder) -> tuple[SiloState | None, bool]:
    """Return what the silo kept from its last accepted round, and whether it has lost that."""
    if order.last_round == 0:
        return None, False
    state = store.load(order.run_id, order.last_round)
    if state is None or state.position != order.position:
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
    order: TrainOrder,
    stays: Stays,
    report: TrainReport,
    reply: PackedGroups,
    memory: StateGroups,
) -> None:
    """Keep the reply and what the next round needs.

    Parameters
    ----------
    reply, memory
        The encoded reply, and what the link wants to see again with the next one.
    """
    store.save(
        SiloState(
            run_id=order.run_id,
            model_id=order.model_id,
            round=order.round,
            position=stays.position,
            scalars=dict(stays.scalars),
            report=report.model_dump_json(),
            codings=codings_of(reply),
            groups=stays.groups,
            link=memory,
        ),
        payloads_of(reply),
    )
