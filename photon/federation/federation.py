"""A run, round by round: cohort → requests → train → fold → outer step → evaluate → checkpoint → events."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid

from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation.assignment import Assignment
from photon.federation.cohort import LastTurns, check_same_data, check_silos, draw_cohort, reference_of
from photon.federation.collect import ready
from photon.federation.exchange import exchange
from photon.federation.guard import Guard
from photon.federation.intake import Collected, as_parameters
from photon.federation.ledger import advance, first_state, renewed, with_decided
from photon.federation.origin import (
    adopted,
    after_the_others,
    first_params,
    sent_config,
    settled,
    unlearned_before,
    with_own,
)
from photon.federation.stations import Stations
from photon.link.messages import SiloInfo
from photon.state.checkpoint import Checkpoint, CheckpointStore, Received, ServerState
from photon.strategy.base import Aggregate, Participant, Reply
from photon.telemetry.events import Evaluated, EventStream

#: What else is done with the checkpoint of a round.
After = Callable[[Checkpoint], None]


class Federation:
    """One run: a strategy, a grid of silos and the folder that holds everything needed to go on.

    Parameters
    ----------
    config
        The run's configuration.
    grid
        Where the silos are; any Flower grid.
    run_dir
        The run's folder.
    stream
        Where events go.
    """

    def __init__(self, config: RunConfig, grid: Grid, run_dir: Path, stream: EventStream) -> None:
        self.config = config
        self.run_dir = run_dir
        self._checkpoints = CheckpointStore(run_dir / "checkpoints", **config.checkpoint.model_dump())
        #: As nodes get it: who listens is the server's own, and need not be installed with them.
        self._sent_config = sent_config(config)
        self._at = Stations.of(config, self._sent_config, grid, run_dir, stream)
        self._strategy, self._events = self._at.strategy, self._at.events
        self._guard = Guard(config, self._checkpoints, self._events)
        self._last_turns = LastTurns(config, self._strategy)
        #: The last round in which silos are asked what they bring.
        self._brings_until = config.rounds

    def run(
        self, *, resume: bool, assignment: Assignment | None = None, after: After = lambda _: None
    ) -> Checkpoint:
        """Train all rounds that are left and return the last checkpoint.

        Parameters
        ----------
        resume
            Go on from the newest checkpoint.
        assignment
            What the federation above wants, if there is one: where to start, and which rounds.
        after
            Called with the checkpoint of each round once that is there, and with the one to go on from.

        Raises
        ------
        PhotonError
            If the silos do not fit the configuration or each other, or there is nothing to resume.
        RunError
            If a round cannot count.
        """
        silos = self.gather()
        checkpoint = self._go_on(silos) if resume else self._begin(silos, assignment)
        if assignment is not None and checkpoint.state.round == assignment.begins:
            checkpoint, figures = adopted(self._strategy, self.run_dir, checkpoint, assignment)
            self._events.adopted(checkpoint.state.round, figures)
        last = self.config.rounds if assignment is None else assignment.ends
        self._brings_until = last if assignment is None or assignment.before_merge else 0
        after(checkpoint)
        while checkpoint.state.round < last:
            checkpoint = self._round(checkpoint)
            self._settle(checkpoint.state)
            after(checkpoint)
            self._clean_store(checkpoint.state, all_rounds=False)
        self._clean_store(checkpoint.state, all_rounds=True)
        return checkpoint

    # --- one round --------------------------------------------------------------------------------

    def _round(self, checkpoint: Checkpoint) -> Checkpoint:
        """Do the round after a checkpoint, and return the one that it ends with."""
        collected = Collected()
        with self._guard.watching(checkpoint.state, collected) as undone:
            return self._counted(checkpoint, collected)
        return undone.checkpoint()

    def _counted(self, checkpoint: Checkpoint, collected: Collected) -> Checkpoint:
        """Do the round after a checkpoint, and return the one that it ends with if it is to count.

        Raises
        ------
        UndoneError
            If it is not.
        """
        begin = time.perf_counter()
        self._at.roster.refresh()
        silos = self._at.roster.silos()
        before = with_decided(checkpoint.state, silos)
        server_round = before.round + 1
        cohort = draw_cohort(self.config, self._strategy, silos, server_round, before.ledger)
        everybody = len(self._strategy.participants(silos))
        checkpoint = replace(checkpoint, state=before, participants=everybody)
        self._events.round_started(before, cohort)
        if self.config.federation.server_silo is not None and self._strategy.schedule == "sequential":
            checkpoint = self._train_server_silo(server_round, checkpoint, collected)
        replies = self._collect(checkpoint, cohort, collected)
        aggregate = self._strategy.aggregate_train(server_round, checkpoint, replies)
        if self.config.federation.server_silo is not None and self._strategy.schedule == "after":
            aggregate = self._followed_by_server_silo(server_round, checkpoint, aggregate, collected)
        self._at.requests.settle(collected.reports)
        after = advance(self.config, before, collected, aggregate)
        # A checkpoint holds the configuration that it was written under, and a strategy may ask for that.
        after = after.model_copy(update={"config": self._sent_config.text})
        clock = {"checkpoint": -time.perf_counter(), "evaluate": 0.0}

        def finish() -> None:
            now = time.perf_counter()
            clock["checkpoint"] += now
            spent = {"fold": aggregate.fold_seconds, "outer": aggregate.outer_seconds, **clock}
            self._events.round_finished(
                after, aggregate, collected.reports, collected.traffic, now - begin, spent
            )

        with self._checkpoints.writing(
            after,
            aggregate.params,
            aggregate.outer,
            aggregate.averaged,
            finish,
            self._at.requests.reference,
            aggregate.kept,
            with_previous=self._strategy.sends_previous,
        ) as written:
            if self._is_evaluated(server_round):
                now = time.perf_counter()
                self._guard.check(written, self._evaluated(written))
                clock["evaluate"] = time.perf_counter() - now
                clock["checkpoint"] -= clock["evaluate"]
        saved = self._checkpoints.load(server_round)
        self._events.checkpointed(saved, self.run_dir, clock["checkpoint"])
        return saved

    def _collect(
        self, checkpoint: Checkpoint, cohort: Sequence[Participant], collected: Collected
    ) -> Iterator[Reply]:
        """Let a cohort train from a checkpoint; return the replies that count."""
        last: frozenset[str] = frozenset()
        if self.config.evaluation.before_merge and checkpoint.state.round < self._brings_until:
            silos, until = self._at.roster.silos(), self._brings_until
            last = self._last_turns.of(silos, checkpoint.state, until, cohort)
        prepared = ready(self._at, self._sent_config, checkpoint, cohort, collected, last)
        answers = exchange(
            self._at.grid,
            prepared.messages,
            prepared.receive,
            deadline=self.config.federation.deadline,
            straggler_timeout=prepared.straggler_timeout,
            again=prepared.again,
            reply_bytes=prepared.reply_bytes,
        )
        return prepared.intake.replies(answers)

    def _train_server_silo(
        self, server_round: int, checkpoint: Checkpoint, collected: Collected
    ) -> Checkpoint:
        """Train on the federation's own text; return the checkpoint that starts from the result."""
        name = self.config.federation.server_silo
        participants = self._strategy.participants(self._at.roster.silos())
        own = [participant for participant in participants if participant.name == name]
        try:
            for reply in self._collect(checkpoint, own, collected):
                trained = as_parameters(reply, checkpoint).groups
                given = self._strategy.after_server_silo(reply)
                return with_own(self.run_dir, checkpoint, trained, given)
        except RunError as error:
            told = f"round {server_round}: nothing was trained on own text: {error}"
            self._events.notice("warning", told)
        return checkpoint

    def _followed_by_server_silo(
        self, server_round: int, checkpoint: Checkpoint, aggregate: Aggregate, collected: Collected
    ) -> Aggregate:
        """Train on the federation's own text from what a round's silos came to; return that in its place."""
        before = after_the_others(self.run_dir, checkpoint, aggregate.params)
        after = self._train_server_silo(server_round, before, collected)
        return replace(aggregate, params=after.load_params(), kept={**aggregate.kept, **after.given})

    def _is_evaluated(self, server_round: int) -> bool:
        # Within another federation it is that one that asks.
        due = server_round % self.config.evaluation.every == 0 or server_round == self.config.rounds
        return due and self.config.federation.parent is None

    def _evaluated(self, written: Checkpoint) -> Evaluated | None:
        """Let silos measure the model of a checkpoint, those that train from it next among them."""
        state = written.state
        cohort: Sequence[Participant] = ()
        if state.round < self.config.rounds:
            silos = self._at.roster.silos()
            cohort = draw_cohort(self.config, self._strategy, silos, state.round + 1, state.ledger)
        # One that trains on the text of several silos is none of those that measure.
        names = [one.name for one in cohort if one.members == (one.name,)]
        return self._at.evaluation.of(written, self._sent_config, own=True, cohort=names)

    # --- before the first round -------------------------------------------------------------------

    def gather(self) -> list[SiloInfo]:
        """Wait for the silos and check that they go together.

        Raises
        ------
        PhotonError
            If they do not come, or do not fit.
        """
        federation = self.config.federation
        self._at.roster.wait(
            federation.silos,
            federation.wait_for_silos,
            nodes_may_join=federation.engine == "deployment" and federation.wait_for_silos > 0,
        )
        self._at.roster.agree_on(reference_of(self._at.roster.silos()))
        silos = self._at.roster.silos()
        check_silos(self.config, self._strategy, silos)
        # Silos start from weights that the server sends.
        self._sent_config = sent_config(self.config, silos[0].vocab_size)
        return silos

    def _settle(self, state: ServerState) -> None:
        """Let what was decided for all silos hold from now on."""
        self.config = settled(self.config, state, self.run_dir)
        if self.config.training != self._sent_config.training:
            self._sent_config = self._sent_config.model_copy(update={"training": self.config.training})

    def _begin(self, silos: Sequence[SiloInfo], assignment: Assignment | None) -> Checkpoint:
        """Write the checkpoint of round 0, and have it evaluated."""
        vocab_size = silos[0].vocab_size
        params, kept = first_params(self.config, self._strategy, self.run_dir, vocab_size, assignment)
        state = with_decided(first_state(silos[0], unlearned_before(self.config)), silos)
        self._settle(state)
        state = state.model_copy(update={"config": self._sent_config.text})
        self._started(state, silos, resumed_from=None)
        with self._checkpoints.writing(state, params, {}, {}, kept=kept) as written:
            if assignment is None:
                self._guard.check(written, self._evaluated(written))
        return self._checkpoints.load(state.round)

    def _go_on(self, silos: Sequence[SiloInfo]) -> Checkpoint:
        """Return the newest checkpoint that can be read."""
        checkpoint, passed_over = self._checkpoints.latest()
        for line in passed_over:
            self._events.notice("warning", f"a damaged checkpoint was passed over: {line}")
        before = checkpoint.state.round
        self._checkpoints.set_aside_after(before, self._checkpoints.aside_for(before))
        check_same_data(checkpoint, silos)
        self._settle(checkpoint.state)
        self._clean_store(checkpoint.state, all_rounds=True)
        self._started(checkpoint.state, silos, resumed_from=checkpoint.state.round)
        if self.config.federation.parent is not None:
            # What is asked from above has a name already.
            return checkpoint
        return replace(checkpoint, state=renewed(checkpoint.state, self._sent_config))

    def _started(self, state: ServerState, silos: Sequence[SiloInfo], resumed_from: int | None) -> None:
        participants = self._strategy.participants(silos)
        self._events.run_started(self.run_dir.name, state, silos, participants, resumed_from)

    def _clean_store(self, state: ServerState, *, all_rounds: bool) -> None:
        """Remove from the store what finished rounds left there."""
        try:
            self._at.link.collect(state.run_id, None if all_rounds else state.round)
        except PhotonError as error:
            self._events.notice("warning", f"the store could not be cleaned: {error}")

    # --- for the federation above -----------------------------------------------------------------

    def evaluate(self, assignment: Assignment) -> Evaluated:
        """Let every silo evaluate the model that came from the federation above.

        Raises
        ------
        PhotonError
            If none could.
        """
        silos = self.gather()
        began = assignment.begins > 0
        state = self._checkpoints.load(assignment.begins).state if began else first_state(silos[0])
        state = with_decided(state, silos)
        came = assignment.groups_file(self.run_dir)
        checkpoint = Checkpoint(self.run_dir, state, Received(came, came))
        evaluated = self._at.evaluation.of(checkpoint, self._sent_config, own=assignment.own)
        if evaluated is None:
            raise PhotonError(f"{self.run_dir.name}: no silo could evaluate the model")
        return evaluated
