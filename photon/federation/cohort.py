"""Who can train, whether they go together, and who is drawn for a round."""

import random
from collections.abc import Mapping, Sequence

from photon.components import nearest
from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.federation.roster import difference
from photon.link.messages import SiloInfo
from photon.state.checkpoint import Checkpoint, LedgerEntry, ServerState
from photon.strategy.base import Participant, Strategy


def draw_cohort(
    config: RunConfig,
    strategy: Strategy,
    silos: Sequence[SiloInfo],
    server_round: int,
    ledger: Mapping[str, LedgerEntry],
) -> list[Participant]:
    """Draw the cohort: a function of seed, round, ledger and who is online, so a resumed run draws the same.

    Those in quarantine are drawn only if the round could not count without them.
    """
    server_silo = config.federation.server_silo
    everybody = strategy.participants(silos)
    online = [participant for participant in everybody if participant.name != server_silo]
    free = [one for one in online if not is_quarantined(ledger, one.name, server_round)]
    if len(free) >= config.federation.quorum:
        online = free
    size = min(config.cohort or len(online), len(online))
    drawn = random.Random(f"{config.seed}/{server_round}").sample(online, size)
    if strategy.schedule == "parallel":
        drawn += [participant for participant in everybody if participant.name == server_silo]
    return sorted(drawn, key=lambda participant: participant.name)


class LastTurns:
    """Who trains for the last time: no later round of the run draws them.

    As far as anybody knows: whoever is online stays, and nobody goes into quarantine. All rounds that are
    left are drawn at once, and again only when another one is online, or in quarantine.

    Parameters
    ----------
    config, strategy
        Of the run.
    """

    def __init__(self, config: RunConfig, strategy: Strategy) -> None:
        self._config = config
        self._strategy = strategy
        self._known: object = None
        #: The first round that was drawn, and the last one that draws a participant.
        self._from = 0
        self._last: dict[str, int] = {}

    def of(
        self,
        silos: Sequence[SiloInfo],
        before: ServerState,
        last_round: int,
        cohort: Sequence[Participant],
    ) -> frozenset[str]:
        """Return those of a round's participants whose last one it is.

        Parameters
        ----------
        silos
            Those that are online.
        before
            The state before the round.
        last_round
            The last round that will be trained.
        cohort
            The round's participants.
        """
        server_round = before.round + 1
        kept_out = {name: one.quarantined_until for name, one in before.ledger.items()}
        known = last_round, self._strategy.participants(silos), {n: r for n, r in kept_out.items() if r}
        if known != self._known or server_round < self._from:
            self._known, self._from, self._last = known, server_round, {}
            for later in range(server_round + 1, last_round + 1):
                drawn = draw_cohort(self._config, self._strategy, silos, later, before.ledger)
                self._last |= dict.fromkeys((one.name for one in drawn), later)
        left = {one.name for one in cohort if self._last.get(one.name, 0) <= server_round}
        # One with its own text trains in every round.
        if server_round < last_round:
            left.discard(str(self._config.federation.server_silo))
        return frozenset(left)


def is_quarantined(ledger: Mapping[str, LedgerEntry], name: str, server_round: int) -> bool:
    """Tell whether a participant is not to be drawn for a round: too many of its replies were rejected."""
    return name in ledger and server_round <= ledger[name].quarantined_until


def reference_of(silos: Sequence[SiloInfo]) -> SiloInfo:
    """Return a silo whose text was prepared as that of most.

    Raises
    ------
    PhotonError
        If as many were prepared in another way: nobody can say which are right.
    """
    kinds: dict[tuple[str, int, int], list[SiloInfo]] = {}
    for silo in silos:
        kinds.setdefault((silo.tokenizer_sha256, silo.vocab_size, silo.sequence_length), []).append(silo)
    first, *others = sorted(kinds.values(), key=len, reverse=True)
    if others and len(others[0]) == len(first):
        raise PhotonError(str(difference(first[0], others[0][0])))
    return first[0]


def check_silos(config: RunConfig, strategy: Strategy, silos: Sequence[SiloInfo]) -> None:
    """Check that silos fit the configuration and each other.

    Raises
    ------
    PhotonError
        If they do not.
    """
    participants = strategy.participants(silos)
    cohort = config.cohort
    # A tree says itself how many there are.
    if cohort is not None and cohort > len(silos) and config.federation.tree is None:
        raise PhotonError(
            f"cohort={cohort} is larger than the federation of {len(silos)} silos "
            f"({', '.join(silo.name for silo in silos)}); set cohort={len(silos)} or cohort=null"
        )
    if config.federation.quorum > len(participants):
        raise PhotonError(
            f"federation.quorum={config.federation.quorum} is larger than the "
            f"{len(participants)} participants; lower it"
        )
    # Within another federation a round goes on with those of its silos that are there.
    drawn = len(draw_cohort(config, strategy, silos, 1, {}))
    if drawn < strategy.least_cohort and config.federation.parent is None:
        raise PhotonError(
            f"strategy.fold.liars: needs {strategy.least_cohort} participants in a round, and there are "
            f"{drawn}; lower it, or wait for more (federation.silos, federation.wait_for_silos)"
        )
    names = [silo.name for silo in silos]
    server_silo = config.federation.server_silo
    if server_silo is not None and server_silo not in names:
        raise PhotonError(
            f"federation.server_silo={server_silo}: no such silo{nearest(server_silo, names)}; "
            f"there are {', '.join(names)}"
        )
    reference = silos[0]
    if reference.sequence_length > config.model.sequence_length:
        raise PhotonError(
            f"the data's sequence length {reference.sequence_length} is longer than the model's "
            f"(model.sequence_length={config.model.sequence_length}); prepare the data with "
            "--sequence-length, or raise model.sequence_length and the architecture's positions"
        )


def check_same_data(checkpoint: Checkpoint, silos: Sequence[SiloInfo]) -> None:
    """Check that silos have the text that a run began with.

    Raises
    ------
    PhotonError
        If they have not.
    """
    if silos[0].tokenizer_sha256 != checkpoint.state.tokenizer_sha256:
        raise PhotonError(
            f"{checkpoint.path}: the run began with another tokenizer than the silos have now; "
            "put the original data back"
        )
