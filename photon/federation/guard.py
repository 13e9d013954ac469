"""What is done about a round that has made the model worse."""

import statistics
import uuid
from collections.abc import Collection, Mapping, Sequence

from photon.config.schema import RunConfig
from photon.federation.ledger import rejected
from photon.state.checkpoint import LedgerEntry, ServerState

#: An update is suspect if it is so many times as large as is usual in its round.
SUSPECT = 2.0


class UndoneError(Exception):
    """A round has made the model worse, so it is not to count; the message says by how much."""


def suspects(sizes: Mapping[str, float]) -> Sequence[str]:
    """Return whose updates were far larger than is usual in their round, the largest first.

    Parameters
    ----------
    sizes
        Participant to the size of its update, as `photon.federation.sizes` has it.
    """
    if len(sizes) < 3:
        return []
    usual = statistics.median_low(sizes.values())
    found = {name: size for name, size in sizes.items() if size > SUSPECT * usual}
    return sorted(found, key=lambda name: -found[name])


def undone(config: RunConfig, good: ServerState, after: ServerState, named: Collection[str]) -> ServerState:
    """Return the state after a round that is undone: that of a good one, one round later.

    Silos go on from what they had in the good round, because the ledger says so. The learning-rate schedule
    goes on.

    Parameters
    ----------
    good
        Of the checkpoint whose model counts again.
    after
        As it would have been.
    named
        Participants whose replies count as rejected.
    """
    ledger = dict(good.ledger)
    for name in named:
        entry = ledger.get(name, LedgerEntry())
        ledger[name] = rejected(entry, after.round, config.federation.admission)
    return good.model_copy(
        update={
            "round": after.round,
            "global_step": after.global_step,
            "model_id": uuid.uuid4().hex,
            "ledger": ledger,
        }
    )
