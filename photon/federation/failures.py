"""The failures of a round: counted, told, and too many of them end the run."""

from collections.abc import Collection, Mapping

from photon.config.schema import FederationSection
from photon.errors import RunError
from photon.federation.exchange import Failure, StragglerTimeout
from photon.federation.pace import learnt_timeout
from photon.federation.round_events import RoundEvents
from photon.state.checkpoint import LedgerEntry


class UndoneError(Exception):
    """A round is not to count, although enough replies were in; the message says why."""


class Failures:
    """Counts the participants that fail in a round, and ends the run when it cannot count any more.

    Parameters
    ----------
    federation
        Quorum and accepted failures.
    events
        Where failures are told.
    server_round
        The round.
    cohort
        Size of the cohort.
    """

    def __init__(
        self, federation: FederationSection, events: RoundEvents, server_round: int, cohort: int
    ) -> None:
        self._federation = federation
        self._events = events
        self._round = server_round
        self._cohort = cohort
        self._failed: dict[str, Failure] = {}

    def add(self, name: str, failure: Failure) -> None:
        """Count a failure.

        Raises
        ------
        RunError
            If it is one too many.
        """
        self._failed[name] = failure
        self._events.silo_failed(self._round, name, failure)
        if len(self._failed) <= self.bearable(self._cohort):
            return
        accepted = self._federation.max_failures
        reasons = "; ".join(f"{silo}: {one.reason}" for silo, one in self._failed.items())
        too_many = accepted is not None and len(self._failed) > accepted
        limit = f"max_failures={accepted}" if too_many else f"quorum={self._federation.quorum}"
        raise RunError(
            f"round {self._round}: {len(self._failed)} of {self._cohort} silos failed, beyond "
            f"federation.{limit} ({reasons})"
        )

    def straggler_timeout(
        self, requests: Collection[str], ledger: Mapping[str, LedgerEntry]
    ) -> StragglerTimeout | None:
        """Return how long to wait for those who got requests, by earlier rounds; None: until the deadline."""
        return learnt_timeout(
            self._federation.straggler_timeout_factor, requests, ledger, self.bearable(len(requests))
        )

    def bearable(self, cohort: int) -> int:
        """Return how many participants of a cohort may fail in a round that counts."""
        without = cohort - min(self._federation.quorum, cohort)
        accepted = self._federation.max_failures
        return without if accepted is None else min(without, accepted)
