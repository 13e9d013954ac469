"""The sync plan: which state groups are averaged, and how often.

A round is the period of the parameters. Every other group is averaged at the end of those rounds where the
local steps done since the start are a multiple of its period ("average after": the local step is whole, then
the new values are averaged, and all silos are identical). Step counters are never averaged.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from photon.components import nearest
from photon.errors import PhotonError

#: The group that every round syncs.
PARAMS = "params"


class SyncPlan:
    """State group to sync period.

    Parameters
    ----------
    periods
        Group name to period in local steps; a group that is not named is never averaged.
    local_steps
        Local steps of a round, the period of ``params``.
    groups
        State groups that the local optimizer has.

    Raises
    ------
    PhotonError
        If a group is unknown, or a period is shorter than that of ``params`` or no multiple of it.
    """

    def __init__(self, periods: Mapping[str, int], local_steps: int, groups: Collection[str]) -> None:
        self.local_steps = local_steps
        self.periods = {PARAMS: local_steps} | dict(periods)
        known = {PARAMS, *groups}
        for group, period in self.periods.items():
            if group not in known:
                raise PhotonError(
                    f"strategy.sync.{group}: the local optimizer has none{nearest(group, known)}; there "
                    f"are {', '.join(sorted(known))}"
                )
            if group == PARAMS and period != local_steps:
                raise PhotonError(
                    f"strategy.sync.params={period}: a round is the period of the parameters; set "
                    f"local_steps={period}"
                )
            if period < local_steps or period % local_steps:
                raise PhotonError(
                    f"strategy.sync.{group}={period}: parameters must be averaged at least as often as any "
                    f"state; choose a multiple of local_steps={local_steps}"
                )

    def due(self, steps: int) -> list[str]:
        """Return the groups that are averaged at the end of a round, ``params`` first.

        Parameters
        ----------
        steps
            Local steps done by then; at 0, before the first round of the plan, everything is due.
        """
        others = sorted(group for group in self.periods if group != PARAMS)
        return [PARAMS, *(group for group in others if steps % self.periods[group] == 0)]

    def payloads_per_step(self) -> float:
        """Return payloads of the parameters' size that cross one way per local step: Σ 1/K_s."""
        return math.fsum(1 / period for period in self.periods.values())


def half_life(beta: float) -> float:
    """Return the local steps after which a state of decay ``beta`` has forgotten half: ln 0.5 / ln β."""
    return math.log(0.5) / math.log(beta)


def suggest_periods(betas: Mapping[str, float], local_steps: int, *, by_half_life: bool) -> dict[str, int]:
    """Suggest a sync period for every state group.

    Parameters
    ----------
    betas
        State group to its decay, such as ``{"exp_avg": 0.95, "exp_avg_sq": 0.999}``.
    local_steps
        Period of the parameters, K_x.
    by_half_life
        The first multiple of K_x at or above each state's half-life; else DES-LOC's ratio: 3 K_x for the
        fastest state, 6 K_x for the others.

    Returns
    -------
    dict
        Periods in local steps, ``params`` included.
    """
    fastest = min(betas.values(), default=0.0)
    periods = {PARAMS: local_steps}
    for group, beta in betas.items():
        if by_half_life:
            periods[group] = local_steps * max(1, math.ceil(half_life(beta) / local_steps))
        else:
            periods[group] = local_steps * (3 if beta == fastest and group != "exp_avg_sq" else 6)
    return periods


def bytes_per_cycle(periods: Mapping[str, int], rounds: int, group_bytes: Mapping[str, int]) -> int:
    """Return what one silo sends one way in ``rounds`` rounds of a plan."""
    plan = SyncPlan({g: p for g, p in periods.items() if g != PARAMS}, periods[PARAMS], list(periods))
    return sum(
        group_bytes[group] for one in range(1, rounds + 1) for group in plan.due(one * plan.local_steps)
    )


def betas_of(arguments: Mapping[str, object], groups: Sequence[str]) -> dict[str, float]:
    """Return the decay of each state group: ``betas`` are those of the momenta, then of ``exp_avg_sq``."""
    betas = arguments.get("betas")
    if not isinstance(betas, Sequence):
        return {}
    momenta = sorted(group for group in groups if group.startswith("exp_avg") and group != "exp_avg_sq")
    return dict(zip([*momenta, "exp_avg_sq"], map(float, betas), strict=False))
