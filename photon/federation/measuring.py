"""Which silos measure a model, and what some of them say of all."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence

from photon.config.schema import RunConfig
from photon.telemetry.events import SiloEvaluation

#: Silos of a federation in which all measure every model, at most (``evaluation.cohort=auto``).
SMALL = 32
#: Silos that measure beside the next round's in a larger one.
BESIDE = 4


def measuring(
    config: RunConfig, silos: Sequence[str], cohort: Collection[str], server_round: int
) -> Sequence[str]:
    """Return which silos measure the model of a round.

    Those of the next round do, because they receive it anyway. Those beside them are the same until the next
    evaluation by all, so that each model is compared with the one before by silos that have measured both.
    Who is online changes the draw by those who come and go alone.

    Parameters
    ----------
    silos
        Names of those that are online and measure models, in name order.
    cohort
        Participants of the next round.
    server_round
        The round whose model is measured.
    """
    section = config.evaluation
    number = section.cohort
    if number == "auto":
        number = None if len(silos) <= SMALL else BESIDE
    if number is None or _all_measure(config, server_round):
        return silos
    epoch = 0 if section.full_every is None else server_round // section.full_every
    ranks = {name: _rank(f"{config.seed}/{epoch}/evaluate/{name}") for name in silos}
    drawn = {*sorted(ranks, key=lambda name: ranks[name])[:number], *cohort}
    return [name for name in silos if name in drawn]


def _all_measure(config: RunConfig, server_round: int) -> bool:
    """Tell whether all silos measure the model of a round that is evaluated."""
    if server_round in (0, config.rounds):
        return True
    section = config.evaluation
    if section.full_every is None:
        return False
    last = server_round - (server_round % section.every or section.every)
    return server_round // section.full_every != last // section.full_every


def _rank(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def mean_loss(per_silo: Mapping[str, SiloEvaluation]) -> float:
    """Return the mean loss per token over silos: L = Σ t_i l_i / Σ t_i, of losses l_i over t_i tokens."""
    tokens = sum(silo["tokens"] for silo in per_silo.values())
    return math.fsum(silo["loss"] * silo["tokens"] for silo in per_silo.values()) / tokens


def standard_error(per_silo: Mapping[str, SiloEvaluation], of_silos: int) -> float | None:
    """Return the standard error of the mean loss of some silos as that of all.

    That of a ratio estimated from n of N, drawn without replacement: with d_i = t_i (l_i − L) and t̄ the mean
    of the t_i, SE² = (1 − n / N) Σ d_i² / (n (n − 1) t̄²).

    Parameters
    ----------
    per_silo
        Those that have measured the model.
    of_silos
        How many there are.

    Returns
    -------
    float or None
        In nats; 0 if all have, None if one alone has.
    """
    n = len(per_silo)
    if n >= of_silos:
        return 0.0
    if n < 2:
        return None
    mean = mean_loss(per_silo)
    tokens = sum(silo["tokens"] for silo in per_silo.values()) / n
    spread = math.hypot(*(silo["tokens"] * (silo["loss"] - mean) for silo in per_silo.values()))
    return math.sqrt((1 - n / of_silos) / (n * (n - 1))) * spread / tokens


def mean_figures(
    figures: Mapping[str, Mapping[str, float]], per_silo: Mapping[str, SiloEvaluation]
) -> dict[str, float]:
    """Return the mean of each figure over the silos that told it, weighted as their losses are."""
    names = dict.fromkeys(name for told in figures.values() for name in told)
    means = {}
    for name in names:
        weights = {silo: per_silo[silo]["tokens"] for silo, told in figures.items() if name in told}
        total = math.fsum(figures[silo][name] * weight for silo, weight in weights.items())
        means[name] = total / sum(weights.values())
    return means
