"""How long a round takes: local steps by a silo's speed, and how long the server waits for replies.

Both are functions of what the checkpoint's ledger holds, so a resumed run orders and waits as one that
never stopped.
"""

import statistics
from collections.abc import Collection, Mapping

from photon.federation.exchange import StragglerTimeout
from photon.state.checkpoint import LedgerEntry

#: Times the median speed of a cohort that its fastest participant counts as, at most.
FASTEST = 10.0


def adaptive_local_steps(
    local_steps: int, cohort: Collection[str], ledger: Mapping[str, LedgerEntry]
) -> dict[str, int]:
    """Return local steps for each participant, so that all of them train about equally long.

        steps_k = clamp(round(H · s_k / max_j s_j), 1, H),   s: local steps per second when last accepted

    A participant that was never accepted gets H: its speed is not known yet. Speeds are the silos' own words,
    so of three or more the fastest counts as ten times the median at most: one that claims a speed that
    nobody has cannot have the others do next to nothing.

    Parameters
    ----------
    local_steps
        H, which the fastest participant of the cohort gets.
    """
    speeds = {name: ledger[name].steps_per_second for name in cohort if name in ledger}
    known = {name: speed for name, speed in speeds.items() if speed is not None}
    fastest = max(known.values(), default=0.0)
    if len(known) >= 3:
        fastest = min(fastest, FASTEST * statistics.median(known.values()))
    return {
        name: max(1, min(local_steps, round(local_steps * known[name] / fastest)))
        if name in known
        else local_steps
        for name in cohort
    }


def learnt_timeout(
    factor: float | None, cohort: Collection[str], ledger: Mapping[str, LedgerEntry], may_fail: int
) -> StragglerTimeout | None:
    """Return how long to wait by the replies of earlier rounds; None: not to be learnt from them.

    That is ``factor`` times the longest that a participant of this cohort took when it was last accepted.
    While one of them was never accepted, nobody knows how long it takes.

    Parameters
    ----------
    may_fail
        Failures that the round can bear.
    """
    seconds = [ledger[name].arrival_seconds if name in ledger else None for name in cohort]
    known = [value for value in seconds if value is not None]
    if factor is None or len(known) < len(seconds):
        return None
    longest = max(known)
    return StragglerTimeout(
        seconds=factor * longest,
        may_fail=may_fail,
        reason=f"federation.straggler_timeout_factor={factor:g} times the {longest:.3g} s that the slowest "
        "silo of this cohort last took",
    )
