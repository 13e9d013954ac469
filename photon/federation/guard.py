"""What is done about a round that has made the model worse."""

import statistics
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from photon.config.schema import RunConfig
from photon.errors import RunError
from photon.federation.failures import UndoneError
from photon.federation.intake import Collected
from photon.federation.ledger import rejected
from photon.federation.round_events import RoundEvents
from photon.objective.configured import objective_of, steps_of
from photon.state.checkpoint import Checkpoint, CheckpointStore, LedgerEntry, ServerState
from photon.strategy.contract import PARAMS
from photon.telemetry.events import Evaluated

#: An update is suspect if it is so many times as large as is usual in its round.
SUSPECT = 2.0


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


def undone(config: RunConfig, good: ServerState, before: ServerState, named: Collection[str]) -> ServerState:
    """Return the state after a round that is undone: that of a good one, one round later.

    Silos go on from what they had in the good round, because the ledger says so. The learning-rate schedule
    goes on.

    Parameters
    ----------
    good
        Of the checkpoint whose model counts again.
    before
        That the round that does not count began with.
    named
        Participants whose replies count as rejected.
    """
    server_round = before.round + 1
    ledger = dict(good.ledger)
    for name in named:
        entry = ledger.get(name, LedgerEntry())
        ledger[name] = rejected(entry, server_round, config.federation.admission)
    return good.model_copy(
        update={
            "round": server_round,
            "global_step": before.global_step + steps_of(config, server_round),
            "model_id": uuid.uuid4().hex,
            "progress": good.progress.model_copy(update={"undone": before.progress.undone + 1}),
            "ledger": ledger,
            "decided": before.decided,
            "config": before.config,
        }
    )


class Undone:
    """What takes the place of a round that does not count."""

    saved: Checkpoint | None = None

    def checkpoint(self) -> Checkpoint:
        """Return the checkpoint; there is one if the round was undone."""
        assert self.saved is not None, "asked for after a round that was undone"
        return self.saved


class Guard:
    """Looks at each model that was evaluated, and puts the last good one back where one is worse.

    Parameters
    ----------
    config
        The run's configuration.
    checkpoints
        Of the run.
    events
        Where it is told.
    """

    def __init__(self, config: RunConfig, checkpoints: CheckpointStore, events: RoundEvents) -> None:
        self._config = config
        self._checkpoints = checkpoints
        self._events = events

    def check(self, written: Checkpoint, evaluated: Evaluated | None) -> None:
        """Note what silos tell of the model of a checkpoint that does not count yet.

        Raises
        ------
        UndoneError
            If it is worse than the last one was.
        """
        if evaluated is None:
            return
        losses = {name: found["loss"] for name, found in evaluated.per_silo.items()}
        problem = written.state.progress.problem(losses, self._config.federation.guard)
        # Noise on updates may itself make a model worse, and nobody is to blame. What is made of sums is what
        # was asked for, whatever it does to the loss.
        blames = not self._config.privacy.noise_multiplier and objective_of(self._config).trains
        if problem is not None and blames:
            raise UndoneError(problem)
        written.state.validation_loss = evaluated.loss
        written.state.estimated = evaluated.is_estimate
        written.state.progress = written.state.progress.after(losses)

    @contextmanager
    def watching(self, before: ServerState, collected: Collected) -> Iterator["Undone"]:
        """Let a block do a round; if it is not to count, another checkpoint takes its place.

        Parameters
        ----------
        before
            The state that the round begins with.
        collected
            Takes what its replies bring.

        Yields
        ------
        Undone
            Has the other checkpoint, once the block has raised UndoneError.

        Raises
        ------
        RunError
            If the round is not to count, and the run is to stop then.
        """
        undone = Undone()
        try:
            yield undone
        except UndoneError as error:
            undone.saved = self.undo(before, collected, str(error))
            self._events.checkpointed(undone.saved, self._checkpoints.folder.parent, 0.0)

    def undo(self, before: ServerState, collected: Collected, problem: str) -> Checkpoint:
        """Let the last good model count again in the place of a round that is not to count.

        Parameters
        ----------
        before
            The state that the round began with.
        collected
            What its replies brought.
        problem
            Why it is not to count.

        Raises
        ------
        RunError
            If the run is to stop then.
        """
        server_round = before.round + 1
        if self._config.federation.guard.action != "undo":
            raise RunError(
                f"round {server_round} does not count: {problem}; look at its silos, or go on with "
                "federation.guard.action=undo in config.yaml"
            )
        if not objective_of(self._config).trains:
            raise RunError(f"round {server_round} does not count: {problem}; no other round makes its sums")
        good = self._checkpoints.evaluated() or self._checkpoints.load(before.round)
        sizes = {name: of[PARAMS] for name, of in collected.sizes.items() if PARAMS in of}
        named = suspects({name: size for name, size in sizes.items() if name in collected.reports})
        state = undone(self._config, good.state, before, {*named, *collected.rejected})
        who = f"suspects, by the size of their updates: {', '.join(named)}" if named else "nobody stands out"
        self._events.notice(
            "warning",
            f"round {server_round} is undone: {problem}; the model is that of round {good.state.round} "
            f"again; {who}",
        )
        return self._checkpoints.repeat(good, state)
