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
#: Stands in a plan for all groups that it does not name.
OTHERS = "others"
#: The period of a group that stays in the silo.
NEVER = "never"

Period = int | str


class SyncPlan:
    """State group to sync period.

    Parameters
    ----------
    periods
        Group name to period in local steps, or ``"never"``; ``others`` is the period of the groups that are
        not named.
    local_steps
        Local steps of a round, the period of ``params``.
    groups
        State groups that the local optimizer has.
    together
        Those of them that mean something together alone, such as moments and the basis that they are in.

    Attributes
    ----------
    periods
        Group name to period in local steps, of the groups that are averaged.

    Raises
    ------
    PhotonError
        If a group is unknown or has no period, a period is shorter than that of ``params`` or no multiple of
        it, or groups that belong together have different ones.
    """

    def __init__(
        self,
        periods: Mapping[str, Period],
        local_steps: int,
        groups: Collection[str],
        together: Collection[str] = (),
    ) -> None:
        self.local_steps = local_steps
        known = {PARAMS, *groups}
        for group in periods:
            if group not in known | {OTHERS}:
                raise PhotonError(
                    f"strategy.sync.{group}: the local optimizer has none{nearest(group, known)}; there "
                    f"are {', '.join(sorted(known))}; what a preset names goes with ~strategy.sync.{group}"
                )
        named = {PARAMS: local_steps, **periods}
        if OTHERS in named:
            others = named.pop(OTHERS)
            named = dict.fromkeys(sorted(set(groups) - set(named)), others) | named
        for group, period in named.items():
            self._check_period(group, period)
        plan = suggest_periods(groups, local_steps, together=together)
        if missing := sorted(known - set(named)):
            raise PhotonError(
                f"strategy.sync: {missing[0]} of the local optimizer has no period; write "
                f"{written({**plan, **named})}, or {NEVER} for what stays in the silo"
            )
        if len({named[group] for group in together if group in named}) > 1:
            raise PhotonError(
                f"strategy.sync: {', '.join(sorted(together))} mean something together alone; give them one "
                f"period, such as {written({**named, **{one: plan[one] for one in together}})}"
            )
        self.periods: dict[str, int] = {
            group: period for group, period in named.items() if isinstance(period, int)
        }

    def _check_period(self, group: str, period: Period) -> None:
        if group == PARAMS and period != self.local_steps:
            raise PhotonError(
                f"strategy.sync.params={period}: a round is the period of the parameters; set "
                f"local_steps={period}"
            )
        if period == NEVER:
            return
        if not isinstance(period, int) or isinstance(period, bool):
            raise PhotonError(f"strategy.sync.{group}={period}: expected a number of local steps, or {NEVER}")
        if period < self.local_steps or period % self.local_steps:
            raise PhotonError(
                f"strategy.sync.{group}={period}: parameters must be averaged at least as often as any "
                f"state; choose a multiple of local_steps={self.local_steps}"
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


def suggest_periods(
    groups: Collection[str],
    local_steps: int,
    decays: Mapping[str, float] | None = None,
    together: Collection[str] = (),
) -> dict[str, int]:
    """Suggest a sync period for every state group of a local optimizer.

    Parameters
    ----------
    groups
        Its state groups.
    local_steps
        Period of the parameters, K_x.
    decays
        State group to β: each period is the first multiple of K_x at or above the half-life, and K_x where
        there is none. None: DES-LOC's ratio, 3 K_x for momenta and 6 K_x for second moments.
    together
        Groups that mean something together alone. By the ratio they are averaged in every round, as LoRDO's
        are; by half-lives, as the one that forgets soonest.

    Returns
    -------
    dict
        Periods in local steps, ``params`` included.
    """

    def of(group: str) -> int:
        if decays is None:
            return 1 if group in together else 6 if is_second_moment(group) else 3
        return max(1, math.ceil(half_life(decays[group]) / local_steps)) if group in decays else 1

    rounds = {group: of(group) for group in sorted(groups)}
    if shared := [rounds[group] for group in together if decays is None or group in decays]:
        rounds |= dict.fromkeys((group for group in together if group in rounds), min(shared))
    return {PARAMS: local_steps} | {group: local_steps * number for group, number in rounds.items()}


def is_second_moment(group: str) -> bool:
    """Return whether a state group holds means or sums of squares, as ``exp_avg_sq`` and ``sum`` do."""
    return "sq" in group or group == "sum"


def written(periods: Mapping[str, Period]) -> str:
    """Return a plan as it is given on the command line, where a preset may name other groups."""
    named = ", ".join(f"{group}: {period}" for group, period in sorted(periods.items()) if group != PARAMS)
    return f"++strategy.sync={{{named}}}"


def bytes_per_cycle(periods: Mapping[str, int], rounds: int, group_bytes: Mapping[str, int]) -> int:
    """Return what one silo sends one way in ``rounds`` rounds of a plan."""
    plan = SyncPlan({g: p for g, p in periods.items() if g != PARAMS}, periods[PARAMS], list(periods))
    return sum(
        group_bytes[group] for one in range(1, rounds + 1) for group in plan.due(one * plan.local_steps)
    )


def betas_of(arguments: Mapping[str, object], groups: Sequence[str]) -> dict[str, float]:
    """Return the decay of each state group that has one.

    ``betas`` are those of the momenta that have a weight, and then of ``exp_avg_sq``; ``momentum`` is that of
    ``momentum_buffer``.
    """
    decays: dict[str, float] = {}
    if isinstance(betas := arguments.get("betas"), Sequence):
        *first, last = map(float, betas)
        weights = arguments.get("weights")
        if isinstance(weights, Sequence):
            first = [beta for beta, weight in zip(first, weights, strict=False) if weight]
        momenta = sorted(group for group in groups if group.startswith("exp_avg") and "sq" not in group)
        decays |= dict(zip(momenta, first, strict=False))
        decays |= {group: last for group in groups if is_second_moment(group)}
    if isinstance(momentum := arguments.get("momentum"), int | float) and "momentum_buffer" in groups:
        decays["momentum_buffer"] = float(momentum)
    return decays
