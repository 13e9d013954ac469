"""Wall-clock time of a training run: steps over throughput, and every sync over the slowest link.

A sync of a payload of S bytes over K silos and a link of B bytes per second and latency l takes

    parameter server  2 K S / B + l        all-reduce  (K − 1) S / B + l        ring  2 S (K − 1) / (K B) + l

and nothing for a single silo. A state group with sync period K_s is synced once every K_s steps:

    total = T / ν + α Σ_s ⌊T / K_s⌋ t_sync

with T steps, ν steps per second and α the share of communication that computing does not hide. DDP is the
plan that syncs gradients at every step. (Photon's wall-time model, and DES-LOC's, which is its ring with α.)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Topology = Literal["parameter-server", "all-reduce", "ring"]
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)


@dataclass(frozen=True)
class Network:
    """Between the silos.

    Attributes
    ----------
    silos
        Silos that train together, K.
    bandwidth
        Of the slowest link, bytes per second.
    latency
        Seconds that every sync takes besides.
    topology
        How payloads are averaged.
    exposed
        Share of communication that is not hidden behind computing, α: 1 none hidden, 0 all of it.
    """

    silos: int
    bandwidth: float
    latency: float = 0.0
    topology: Topology = "ring"
    exposed: float = 1.0

    def sync_seconds(self, payload: float) -> float:
        """Return the seconds of one sync of ``payload`` bytes."""
        if self.silos == 1:
            return 0.0
        passes = {
            "parameter-server": 2.0 * self.silos,
            "all-reduce": self.silos - 1.0,
            "ring": 2.0 * (self.silos - 1) / self.silos,
        }[self.topology]
        return passes * payload / self.bandwidth + self.latency


@dataclass(frozen=True)
class WallTime:
    """Seconds of a run: computing, and what communication adds to it; ``syncs`` counts payloads."""

    compute: float
    communication: float
    syncs: int

    @property
    def total(self) -> float:
        """Seconds of the run."""
        return self.compute + self.communication


def wall_time(
    steps: int, throughput: float, periods: Mapping[str, int], payload: float, network: Network
) -> WallTime:
    """Return the time of ``steps`` local steps.

    Parameters
    ----------
    steps
        Steps of each silo, T.
    throughput
        Steps per second of a silo, ν.
    periods
        State group to sync period in steps; every group is a payload of its own.
    payload
        Bytes of a group: parameters times bytes per parameter.
    network
        Between the silos.
    """
    syncs = sum(steps // period for period in periods.values())
    return WallTime(steps / throughput, network.exposed * syncs * network.sync_seconds(payload), syncs)


def methods(local_steps: int) -> dict[str, dict[str, int]]:
    """Return the sync periods of the methods that the papers compare, at one period of the parameters."""
    return {
        "DDP": {"gradient": 1},
        "FedAvg, DiLoCo": {"params": local_steps},
        "Local Adam": dict.fromkeys(("params", "exp_avg", "exp_avg_sq"), local_steps),
        "DES-LOC": {"params": local_steps, "exp_avg": 3 * local_steps, "exp_avg_sq": 6 * local_steps},
    }
