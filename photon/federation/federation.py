"""The rounds of a run: cohort → encode → train → fold → outer step → evaluate → checkpoint → events."""

import contextlib
import math
import random
import re
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from photon.components import build, nearest
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation.agreement import client_cosine, consensus
from photon.federation.assignment import Assignment
from photon.federation.checks import nbytes_of, problem_with, shapes_of
from photon.federation.pace import learnt_patience, matched_steps
from photon.federation.roster import Roster, joined
from photon.federation.rounds import Failure, exchange
from photon.federation.secure import SecureSum
from photon.link.chains import check_names
from photon.link.coding import Packed
from photon.link.messages import (
    BODY,
    Body,
    EvaluateOrder,
    EvaluateReport,
    NodeLoss,
    SiloInfo,
    TrainOrder,
    TrainReport,
    pack,
    unpack,
)
from photon.link.records import Shapes, count_bytes, dense_groups
from photon.link.transport import ServerLink, Ticket, group_bytes
from photon.link.update import encode_change, subtract
from photon.models.build import build_model, parameter_count, self_contained
from photon.models.flops import mfu, model_flops_per_token
from photon.models.vocabulary import joined_vocabulary, token_parameters
from photon.state.checkpoint import (
    Checkpoint,
    CheckpointStore,
    LedgerEntry,
    Received,
    ServerState,
    weights_sha256,
)
from photon.state.tensors import StateGroups, load_groups, save_groups
from photon.strategy.base import Aggregate, Participant, Reply, Strategy
from photon.strategy.key_layers import INITIAL, key_layers, unpack_residuals
from photon.telemetry.events import (
    Checkpointed,
    ClientFailed,
    ClientFinished,
    Diagnostics,
    Evaluated,
    EventStream,
    Notice,
    RoundFinished,
    RoundStarted,
    RunStarted,
    SiloEvaluation,
)
from photon.training.groups import read_params
from photon.training.loop import state_shapes

#: Seconds that Flower keeps a message when rounds have no deadline.
NO_DEADLINE_TTL = 7 * 86400.0


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
        self._grid = grid
        self._stream = stream
        self._checkpoints = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep)
        self._strategy: Strategy = build(config.strategy.as_mapping(), "strategy", config)
        self._link = ServerLink(config.link_in_use, run_dir, self._time_to_live)
        self._roster = Roster(grid, config, lambda text: self._notice("warning", text))
        self._not_evaluating: set[str] = set()
        self._sent_config = config
        self._flops_per_token = 0.0
        self._roofline: dict[str, float | None] = {}
        self._shapes: dict[str, dict[str, torch.Size]] = {}
        #: What the round's silos have decoded of the parameters, where the link sends their change.
        self._reference: dict[str, torch.Tensor] | None = None

    def run(self, *, resume: bool, assignment: Assignment | None = None) -> Checkpoint:
        """Train all rounds that are left and return the last checkpoint.

        Parameters
        ----------
        resume
            Go on from the newest checkpoint.
        assignment
            What the federation above wants, if there is one: where to start, and which rounds.

        Raises
        ------
        PhotonError
            If the silos do not fit the configuration or each other, or there is nothing to resume.
        RunError
            If a round cannot count.
        """
        silos = self._gather()
        if resume:
            checkpoint, passed_over = self._checkpoints.latest()
            for line in passed_over:
                self._notice("warning", f"a damaged checkpoint was passed over: {line}")
            self._checkpoints.discard_after(checkpoint.state.round)
            self._check_same_data(checkpoint, silos)
            self._collect(checkpoint.state, all_rounds=True)
            self._started(checkpoint, silos, resumed_from=checkpoint.state.round)
        else:
            checkpoint = self._initialise(silos, assignment)
        if assignment is not None and checkpoint.state.round == assignment.begins:
            checkpoint = self._adopt(checkpoint, assignment)
        last = self.config.rounds if assignment is None else assignment.ends
        while checkpoint.state.round < last:
            checkpoint = self._round(checkpoint)
            self._collect(checkpoint.state, all_rounds=False)
        self._collect(checkpoint.state, all_rounds=True)
        return checkpoint

    def evaluate(self, assignment: Assignment) -> EvaluateReport:
        """Let every silo evaluate the model that came from the federation above.

        Raises
        ------
        PhotonError
            If none could.
        """
        silos = self._gather()
        began = assignment.begins > 0
        state = self._checkpoints.load(assignment.begins).state if began else _first_state(silos[0])
        came = assignment.groups_file(self.run_dir)
        evaluated = self._evaluate(Checkpoint(self.run_dir, state, Received(came, came)), own=assignment.own)
        if evaluated is None:
            raise PhotonError(f"{self.run_dir.name}: no silo could evaluate the model")
        return EvaluateReport(
            round=assignment.round,
            silo=self.run_dir.name,
            loss=evaluated.loss,
            tokens=sum(silo["tokens"] for silo in evaluated.per_silo.values()),
            per_node={
                name: NodeLoss(loss=node["loss"], tokens=node["tokens"])
                for name, node in evaluated.per_node.items()
            },
        )

    def describe(self) -> SiloInfo:
        """Wait for the silos, and describe them together under the name of the run's folder."""
        silos = self._gather()
        together = joined(self.run_dir.name, silos)
        peaks = [silo.roofline_flops for silo in silos if silo.roofline_flops is not None]
        if self.config.federation.engine != "deployment" or len(peaks) < len(silos):
            return together
        # They train at the same time, each on a device of its own.
        return together.model_copy(update={"roofline_flops": sum(peaks)})

    def _gather(self) -> list[SiloInfo]:
        """Wait for the silos and check that they go together."""
        federation = self.config.federation
        self._roster.wait(
            federation.silos,
            federation.wait_for_silos,
            nodes_may_join=federation.engine == "deployment" and federation.wait_for_silos > 0,
        )
        silos = self._roster.silos()
        self._check_silos(silos)
        # Silos build the model without the server's disk, and start from weights that the server sends.
        self._sent_config = self.config.model_copy(
            update={"model": self_contained(self.config.model, silos[0].vocab_size)}
        )
        return silos

    # --- before the first round -------------------------------------------------------------------

    def _check_silos(self, silos: Sequence[SiloInfo]) -> None:
        participants = self._strategy.participants(silos)
        cohort = self.config.cohort
        # A tree says itself how many there are.
        if cohort is not None and cohort > len(silos) and self.config.federation.tree is None:
            raise PhotonError(
                f"cohort={cohort} is larger than the federation of {len(silos)} silos "
                f"({', '.join(silo.name for silo in silos)}); set cohort={len(silos)} or cohort=null"
            )
        if self.config.federation.quorum > len(participants):
            raise PhotonError(
                f"federation.quorum={self.config.federation.quorum} is larger than the "
                f"{len(participants)} participants; lower it"
            )
        names = [silo.name for silo in silos]
        if self._own is not None and self._own not in names:
            raise PhotonError(
                f"federation.own_silo={self._own}: no such silo{nearest(self._own, names)}; "
                f"there are {', '.join(names)}"
            )
        reference = silos[0]
        for silo in silos:
            for what in ("tokenizer_sha256", "vocab_size", "sequence_length"):
                if getattr(silo, what) != getattr(reference, what):
                    raise PhotonError(
                        f"silos {reference.name} and {silo.name} differ in {what} "
                        f"({getattr(reference, what)} and {getattr(silo, what)}); "
                        "prepare both with the same tokenizer and sequence length"
                    )
        if reference.sequence_length > self.config.model.sequence_length:
            raise PhotonError(
                f"the data's sequence length {reference.sequence_length} is longer than the model's "
                f"(model.sequence_length={self.config.model.sequence_length}); prepare the data with "
                "--sequence-length, or raise model.sequence_length and the architecture's positions"
            )

    def _check_same_data(self, checkpoint: Checkpoint, silos: Sequence[SiloInfo]) -> None:
        state = checkpoint.state
        if silos[0].tokenizer_sha256 != state.tokenizer_sha256:
            raise PhotonError(
                f"{checkpoint.path}: the run began with another tokenizer than the silos have now; "
                "put the original data back"
            )

    def _initialise(self, silos: Sequence[SiloInfo], assignment: Assignment | None) -> Checkpoint:
        reference = silos[0]
        kept: StateGroups = {}
        if assignment is not None:
            params = load_groups(assignment.groups_file(self.run_dir))["params"]
            layers = key_layers(self.config)
            initial = None if layers is None else layers.initial(None, params)
            kept = {} if initial is None else {INITIAL: initial}
        else:
            model = build_model(self.config.model, reference.vocab_size, seed=self.config.seed)
            if self._strategy.sparse is not None:
                self._strategy.sparse.attach(model)
            params = read_params(model)
        check_names(self.config.link, params)
        state = _first_state(reference)
        checkpoint = Checkpoint(self.run_dir / "checkpoints", state)
        self._started(checkpoint, silos, resumed_from=None)
        with self._checkpoints.writing(state, params, {}, {}, kept=kept) as written:
            if assignment is None:
                self._evaluate(written, own=True)
        return self._checkpoints.load(state.round)

    def _adopt(self, checkpoint: Checkpoint, assignment: Assignment) -> Checkpoint:
        """Return a checkpoint with the backbone from above and key layers that have looked at those there."""
        groups = load_groups(assignment.groups_file(self.run_dir))
        params, layers = groups["params"], key_layers(self.config)
        if layers is not None:
            own = checkpoint.load_params()
            parts = layers.split(own)
            initial = checkpoint.load_kept().get(INITIAL)
            params, figures = layers.pull(
                {name: own[name] for name in parts.key_names},
                params,
                unpack_residuals(groups, assignment.residuals, parts),
                initial,
            )
            if figures:
                values = {f"{figure}/down": value for figure, value in figures.items()}
                self._stream.emit(Diagnostics(round=checkpoint.state.round, values=values))
        return assignment.adopt(self.run_dir, checkpoint, params)

    def _started(self, checkpoint: Checkpoint, silos: Sequence[SiloInfo], resumed_from: int | None) -> None:
        state, config = checkpoint.state, self.config
        model = build_model(config.model, state.vocab_size, seed=config.seed, device="meta")
        self._flops_per_token = model_flops_per_token(model, state.sequence_length)
        self._roofline = {silo.name: silo.roofline_flops for silo in silos}
        self._roofline["centralized"] = silos[0].roofline_flops
        participants = self._strategy.participants(silos)
        self._stream.emit(
            RunStarted(
                run_id=state.run_id,
                name=self.run_dir.name,
                strategy=config.strategy.target.rpartition(".")[2],
                model=config.model.name,
                parameters=parameter_count(model),
                silos=[
                    {
                        "name": silo.name,
                        "train_tokens": silo.train_tokens,
                        "validation_tokens": silo.validation_tokens,
                        "unigram_loss": silo.unigram_loss,
                    }
                    for silo in silos
                ],
                rounds=config.rounds,
                cohort=min(config.cohort or len(participants), len(participants)),
                local_steps=config.local_steps,
                batch_size=participants[0].batch_size,
                sequence_length=state.sequence_length,
                engine=config.federation.engine,
                device=silos[0].device,
                roofline_flops=silos[0].roofline_flops,
                resumed_from=resumed_from,
                flops_per_token=self._flops_per_token,
                privacy={
                    "noise_multiplier": config.privacy.noise_multiplier,
                    "delta": config.privacy.delta,
                },
                tree=config.federation.tree if isinstance(config.federation.tree, dict) else None,
            )
        )

    # --- one round --------------------------------------------------------------------------------

    def _round(self, checkpoint: Checkpoint) -> Checkpoint:
        begin = time.perf_counter()
        before = checkpoint.state
        server_round = before.round + 1
        self._roster.refresh()
        cohort = self._sample(server_round)
        self._stream.emit(
            RoundStarted(round=server_round, cohort=[p.name for p in cohort], global_step=before.global_step)
        )
        replies: dict[str, TrainReport] = {}
        arrivals: dict[str, float] = {}
        traffic = _Traffic()
        if self._own is not None and self._strategy.schedule == "sequential":
            checkpoint = self._train_itself(server_round, checkpoint, replies, arrivals, traffic)
        aggregate = self._strategy.aggregate_train(
            server_round,
            checkpoint,
            self._train(server_round, checkpoint, cohort, replies, arrivals, traffic),
        )
        after = self._advance(before, replies, arrivals, aggregate)
        # Within another federation it is that one that asks.
        evaluated = self.config.federation.parent is None and (
            server_round % self.config.evaluation.every == 0 or server_round == self.config.rounds
        )
        clock = {"checkpoint": -time.perf_counter(), "evaluate": 0.0}

        def finish() -> None:
            now = time.perf_counter()
            clock["checkpoint"] += now
            training = self._training_seconds(replies.values())
            seconds = {
                "round": now - begin,
                "training": training,
                "fold": aggregate.fold_seconds,
                "outer": aggregate.outer_seconds,
                **clock,
                "overhead": now - begin - training,
            }
            self._stream.emit(_round_finished(after, aggregate, replies, traffic, seconds))
            self._stream.emit(_diagnostics(after, aggregate, replies))

        with self._checkpoints.writing(
            after,
            aggregate.params,
            aggregate.outer,
            aggregate.averaged,
            finish,
            self._reference,
            aggregate.kept,
        ) as written:
            if evaluated:
                now = time.perf_counter()
                self._evaluate(written, own=True)
                clock["evaluate"] = time.perf_counter() - now
                clock["checkpoint"] -= clock["evaluate"]
        saved = self._checkpoints.load(server_round)
        self._stream.emit(
            Checkpointed(
                round=server_round,
                path=str(saved.path.relative_to(self.run_dir)),
                bytes=sum(file.stat().st_size for file in saved.path.iterdir()),
                seconds=clock["checkpoint"],
            )
        )
        return saved

    def _sample(self, server_round: int) -> list[Participant]:
        """Draw the cohort: a function of seed, round and who is online, so a resumed run draws the same."""
        everybody = self._strategy.participants(self._roster.silos())
        online = [participant for participant in everybody if participant.name != self._own]
        size = min(self.config.cohort or len(online), len(online))
        drawn = random.Random(f"{self.config.seed}/{server_round}").sample(online, size)
        if self._strategy.schedule == "parallel":
            drawn += [participant for participant in everybody if participant.name == self._own]
        return sorted(drawn, key=lambda participant: participant.name)

    def _train_itself(
        self,
        server_round: int,
        checkpoint: Checkpoint,
        reports: dict[str, TrainReport],
        arrivals: dict[str, float],
        traffic: "_Traffic",
    ) -> Checkpoint:
        """Train on the federation's own text; return the checkpoint that starts from the result."""
        participants = self._strategy.participants(self._roster.silos())
        own = [participant for participant in participants if participant.name == self._own]
        try:
            for reply in self._train(server_round, checkpoint, own, reports, arrivals, traffic):
                start = self.run_dir / "own.safetensors"
                params = {**checkpoint.load_params(), **reply.groups["params"]}
                save_groups(start, {"params": params})
                before = checkpoint.received or Received(start)
                return replace(checkpoint, received=replace(before, params=start))
        except RunError as error:
            self._notice("warning", f"round {server_round}: nothing was trained on own text: {error}")
        return checkpoint

    @property
    def _own(self) -> str | None:
        """The silo that the federation itself trains on."""
        return self.config.federation.own_silo

    def _train(
        self,
        server_round: int,
        checkpoint: Checkpoint,
        cohort: Sequence[Participant],
        reports: dict[str, TrainReport],
        arrivals: dict[str, float],
        traffic: "_Traffic",
    ) -> Iterator[Reply]:
        """Send train orders; yield checked replies in cohort order, counting failures as they come."""
        orders = self._orders(checkpoint, server_round, cohort)
        failures: dict[str, Failure] = {}
        size = len(cohort)

        def failed(name: str, failure: Failure) -> None:
            failures[name] = failure
            self._failed(server_round, name, failure)
            self._check_failures(server_round, size, failures)

        secure = self._secure_sum(orders, cohort, traffic, failed)
        if secure is not None:
            orders = secure.agree()
            cohort = [participant for participant in cohort if participant.name in orders]
        messages, expected, tickets = self._train_messages(server_round, checkpoint, cohort, orders)
        down = {
            name: (count_bytes(message.content), group_bytes(message.content))
            for name, message in messages.items()
        }
        shapes = self._shapes_of_params(checkpoint)
        optional = self._strategy.optional_groups(shapes)
        summed = frozenset(self._strategy.summed_params(shapes))
        check = partial(
            problem_with,
            sequence_length=checkpoint.state.sequence_length,
            optional=optional,
            summed=summed,
            rows=self._rows(shapes),
        )

        def receive(name: str, message: Message) -> Reply | Failure:
            arrived = time.monotonic() - begin
            report = unpack(message.content, TrainReport)
            groups = self._link.receive(message.content, tickets[name], {**optional, **expected[name]})
            if problem := check(
                report, groups, orders[name], expected[name], federation=self._is_federation(name)
            ):
                return Failure("rejected", problem)
            # A silo that had trained the round before a crash answers at once; that is not what it takes.
            arrivals[name] = max(arrived, report.seconds["total"])
            update = groups.pop("params") if self.config.link.up_of == "update" else None
            if secure is not None:
                assert update is not None, "the configuration sees to it"
                masked = {key: delta for key, delta in update.items() if key in summed}
                secure.add(name, dense_groups({"params": masked})["params"])
                update = {key: delta for key, delta in update.items() if key not in summed}
            return Reply(
                name,
                report,
                dense_groups(groups),
                count_bytes(message.content),
                group_bytes(message.content),
                update,
            )

        federation = self.config.federation
        patience = learnt_patience(
            federation.patience, orders, checkpoint.state.ledger, self._bearable_failures(len(cohort))
        )
        waiting: list[Reply] = []
        begin = time.monotonic()
        for name, answer in exchange(
            self._grid, messages, receive, deadline=federation.deadline, patience=patience
        ):
            if isinstance(answer, Failure):
                failed(name, answer)
                continue
            reports[name] = answer.report
            traffic.add(answer, *down[name])
            self._client_finished(answer, *down[name])
            if secure is None:
                yield self._foldable(checkpoint, answer)
            else:
                waiting.append(answer)
            del answer
        if secure is not None:
            # Of each the mean of all, whose mean it is; beside what it has sent without a mask.
            mean = secure.mean()
            for answer in waiting:
                yield self._foldable(checkpoint, replace(answer, update={**mean, **(answer.update or {})}))

    def _foldable(self, checkpoint: Checkpoint, reply: Reply) -> Reply:
        """Turn an update into parameters for a strategy that folds those."""
        if reply.update is None or self._strategy.folds_updates:
            return reply
        sent = checkpoint.load_params()
        params = {key: subtract(sent[key], delta) for key, delta in reply.update.items()}
        return replace(reply, update=None, groups={**reply.groups, "params": params})

    def _secure_sum(
        self,
        orders: Mapping[str, TrainOrder],
        cohort: Sequence[Participant],
        traffic: "_Traffic",
        on_failure: Callable[[str, Failure], None],
    ) -> SecureSum | None:
        """Return a new attempt at the round's sum, if silos are to mask their updates."""
        if not self.config.privacy.secure_aggregation:
            return None
        members = {participant.name: participant.members for participant in cohort}

        def ask(bodies: Mapping[str, Body], kind: type[Body]) -> dict[str, Body | Failure]:
            messages = {}
            for name, body in bodies.items():
                content = RecordDict({BODY: pack(body, self._sent_config)})
                traffic.down += count_bytes(content)
                messages[name] = self._message(content, members[name], "query", "secure")

            def receive(_: str, message: Message) -> Body:
                traffic.up += count_bytes(message.content)
                return unpack(message.content, kind)

            deadline = self.config.federation.deadline
            return dict(exchange(self._grid, messages, receive, deadline=deadline))

        return SecureSum(self.config.privacy, orders, ask, on_failure)

    def _orders(
        self, checkpoint: Checkpoint, server_round: int, cohort: Sequence[Participant]
    ) -> dict[str, TrainOrder]:
        state = checkpoint.state
        due_params = self._strategy.due_params(server_round, self._shapes_of_params(checkpoint))
        most = self.config.steps_of(server_round)
        steps = dict.fromkeys((participant.name for participant in cohort), most)
        if self.config.federation.match_speed:
            steps = matched_steps(most, steps, state.ledger)
        orders = {}
        for participant in cohort:
            entry = state.ledger.get(participant.name, LedgerEntry())
            orders[participant.name] = TrainOrder(
                run_id=state.run_id,
                model_id=state.model_id,
                round=server_round,
                silo=participant.name,
                members=list(participant.members),
                global_step=state.global_step,
                steps=steps[participant.name],
                batch_size=participant.batch_size,
                local_state=self._strategy.local_state,
                last_round=entry.last_round,
                position=entry.position,
                cohort=len(cohort),
                due=self._strategy.due_groups(server_round),
                due_params=due_params,
                mixing=self._strategy.mixing,
                averaged_rounds=state.averaged_rounds,
                scalars=state.local_scalars,
                residuals=self._strategy.residual_tags(checkpoint, participant.name),
                own_layers=participant.name != self._own,
            )
        return orders

    def _train_messages(
        self,
        server_round: int,
        checkpoint: Checkpoint,
        cohort: Sequence[Participant],
        orders: Mapping[str, TrainOrder],
    ) -> tuple[dict[str, Message], dict[str, Shapes], dict[str, Ticket | None]]:
        run_id = checkpoint.state.run_id
        groups = self._strategy.configure_train(server_round, checkpoint, cohort)
        change, base = self._change(server_round, checkpoint)
        encoded: dict[tuple[int, bool], RecordDict] = {}
        messages: dict[str, Message] = {}
        expected: dict[str, Shapes] = {}
        tickets: dict[str, Ticket | None] = {}
        for participant in cohort:
            own = groups[participant.name]
            whole = len(own["params"]) == len(self._shapes["params"])
            follows = change is not None and orders[participant.name].last_round == checkpoint.state.round
            # Participants that get the same groups share the encoded arrays, in memory and in the SuperLink.
            if (key := (id(own), follows)) not in encoded:
                encoded[key] = self._encode(own, change if follows else None, run_id, server_round, whole)
            content = RecordDict(dict(encoded[key]))
            due = self._expected(checkpoint, orders[participant.name])
            expected[participant.name] = due
            tickets[participant.name] = self._link.admit(content, nbytes_of(due), run_id, server_round)
            order = orders[participant.name].model_copy(
                update={"whole": whole, "base": base if follows else None}
            )
            content[BODY] = pack(order, self._sent_config)
            messages[participant.name] = self._message(
                content, participant.members, "train", f"round-{server_round}"
            )
        return messages, expected, tickets

    def _change(
        self, server_round: int, checkpoint: Checkpoint
    ) -> tuple[Mapping[str, Packed] | None, str | None]:
        """Return what brings the last round's silos to this round's parameters, and the hash of theirs.

        What all silos have after that is kept for the checkpoint. None: there is nothing to add to.
        """
        if self.config.link.down_of == "parameters":
            return None, None
        params, before = checkpoint.load_params(), checkpoint.load_reference()
        if not before:
            self._reference = params
            return None, None
        seed = f"{self.config.seed}/{server_round}/down"
        change, self._reference = encode_change(params, before, self.config.link, seed=seed)
        return change, weights_sha256(before)

    def _encode(
        self,
        groups: Mapping[str, Mapping[str, torch.Tensor]],
        change: Mapping[str, Packed] | None,
        run_id: str,
        server_round: int,
        whole: bool,
    ) -> RecordDict:
        if self._reference is None:
            return self._link.send(groups, run_id, server_round)
        if not whole:
            raise PhotonError(
                "link.down_of=update: the strategy sends parameters in parts; set link.down_of=parameters"
            )
        if change is None:
            return self._link.send({**groups, "params": self._reference}, run_id, server_round)
        beside = {group: tensors for group, tensors in groups.items() if group != "params"}
        return self._link.send_change(change, beside, run_id, server_round)

    @property
    def _time_to_live(self) -> float:
        """Seconds that a message is good for: longer than the deadline, it is ours to say what is late."""
        deadline = self.config.federation.deadline
        return 2 * deadline + 600 if deadline else NO_DEADLINE_TTL

    def _collect(self, state: ServerState, *, all_rounds: bool) -> None:
        """Remove from the store what finished rounds left there."""
        try:
            self._link.collect(state.run_id, None if all_rounds else state.round)
        except PhotonError as error:
            self._notice("warning", f"the store could not be cleaned: {error}")

    def _expected(self, checkpoint: Checkpoint, order: TrainOrder) -> Shapes:
        """Return the shapes of the state groups that a reply must hold."""
        params = self._shapes_of_params(checkpoint)
        if len(order.due) > 1 and len(self._shapes) == 1:
            self._shapes |= state_shapes(self.config.optimizer.as_mapping(), params)
        expected = {group: self._shapes[group] for group in order.due}
        if order.due_params is not None:
            expected["params"] = {name: params[name] for name in order.due_params}
        return expected

    def _rows(self, params: Mapping[str, torch.Size]) -> int | None:
        """Return how many rows the embedding has, if silos tell which of them they train."""
        return params[token_parameters(self.config.model)[0]][0] if self._strategy.trims else None

    def _is_federation(self, name: str) -> bool:
        return any(silo.federation for silo in self._roster.silos() if silo.name == name)

    def _shapes_of_params(self, checkpoint: Checkpoint) -> Mapping[str, torch.Size]:
        if not self._shapes:
            self._shapes = shapes_of({"params": checkpoint.load_params()})
        return self._shapes["params"]

    def _message(self, content: RecordDict, members: Sequence[str], kind: str, group: str) -> Message:
        return Message(
            content,
            dst_node_id=self._roster.node_of(members),
            message_type=kind,
            ttl=self._time_to_live,
            group_id=group,
        )

    def _bearable_failures(self, cohort: int) -> int:
        """Return how many participants of a cohort may fail in a round that counts."""
        federation = self.config.federation
        without = cohort - min(federation.quorum, cohort)
        accepted = federation.accepted_failures
        return without if accepted is None else min(without, accepted)

    def _check_failures(self, server_round: int, cohort: int, failures: Mapping[str, Failure]) -> None:
        if len(failures) <= self._bearable_failures(cohort):
            return
        federation = self.config.federation
        accepted = federation.accepted_failures
        reasons = "; ".join(f"{name}: {failure.reason}" for name, failure in failures.items())
        too_many = accepted is not None and len(failures) > accepted
        limit = f"accepted_failures={accepted}" if too_many else f"quorum={federation.quorum}"
        raise RunError(
            f"round {server_round}: {len(failures)} of {cohort} clients failed, beyond federation.{limit} "
            f"({reasons})"
        )

    def _advance(
        self,
        before: ServerState,
        reports: Mapping[str, TrainReport],
        arrivals: Mapping[str, float],
        aggregate: Aggregate,
    ) -> ServerState:
        server_round = before.round + 1
        step = aggregate.step
        if not math.isfinite(step.pseudo_gradient_norm) or not math.isfinite(step.parameter_norm):
            raise RunError(
                f"round {server_round}: the outer step leaves no finite parameters; lower outer.lr or the "
                "learning rate in config.yaml"
            )
        ledger = dict(before.ledger)
        for name, report in reports.items():
            tokens = ledger.get(name, LedgerEntry()).tokens + report.tokens
            ledger[name] = LedgerEntry(
                last_round=server_round,
                position=report.position,
                tokens=tokens,
                steps_per_second=report.steps / report.seconds["training"],
                arrival_seconds=arrivals[name],
            )
        return before.model_copy(
            update={
                "round": server_round,
                "global_step": before.global_step + self.config.steps_of(server_round),
                "tokens": before.tokens + sum(report.tokens for report in reports.values()),
                "model_id": uuid.uuid4().hex,
                "ledger": ledger,
                "outer_scalars": dict(aggregate.outer_scalars),
                "averaged_rounds": before.averaged_rounds | dict.fromkeys(aggregate.averaged, server_round),
                "local_scalars": _typical_scalars(reports.values()),
                "residuals": list(aggregate.residuals),
                "vocabulary": _joined(before.vocabulary, reports.values()),
                "noise": before.noise.add(
                    aggregate.step.pseudo_gradient_norm, [reports[k].update_norm for k in aggregate.weights]
                ),
            }
        )

    # --- evaluation -------------------------------------------------------------------------------

    def _evaluate(self, checkpoint: Checkpoint, *, own: bool) -> Evaluated | None:
        """Let every online silo evaluate a model on its own validation text; None if no silo could."""
        begin = time.perf_counter()
        state = checkpoint.state
        # The next round trains from what is evaluated here.
        records = self._link.send({"params": checkpoint.load_params()}, state.run_id, state.round + 1)
        messages = {}
        for silo in self._roster.silos():
            if silo.validation_tokens is None:
                self._does_not_evaluate(silo.name, "it keeps its validation figures")
                continue
            content = RecordDict(dict(records))
            order = EvaluateOrder(
                round=state.round,
                silo=silo.name,
                run_id=state.run_id,
                last_round=state.ledger.get(silo.name, LedgerEntry()).last_round,
                own=own,
            )
            content[BODY] = pack(order, self._sent_config)
            messages[silo.name] = self._message(content, [silo.name], "evaluate", f"evaluate-{state.round}")
        if not messages:
            return None
        traffic = {"up": 0, "down": sum(count_bytes(message.content) for message in messages.values())}

        def receive(name: str, message: Message) -> EvaluateReport | Failure:
            traffic["up"] += count_bytes(message.content)
            report = unpack(message.content, EvaluateReport)
            losses = [report.loss, *(node["loss"] for node in report.per_node.values())]
            if (report.round, report.silo) != (state.round, name) or not all(map(math.isfinite, losses)):
                return Failure("rejected", f"its evaluation is not one of round {state.round}")
            return report

        per_silo: dict[str, SiloEvaluation] = {}
        per_node: dict[str, SiloEvaluation] = {}
        for name, answer in exchange(self._grid, messages, receive, deadline=self.config.federation.deadline):
            if not isinstance(answer, Failure):
                per_silo[name] = per_node[name] = _evaluation(answer.loss, answer.tokens)
                per_node |= {
                    node: _evaluation(found["loss"], found["tokens"])
                    for node, found in answer.per_node.items()
                }
            elif answer.kind == "refused":
                self._does_not_evaluate(name, answer.reason)
            else:
                self._failed(state.round, name, answer)
        if not per_silo:
            self._notice("warning", f"round {state.round}: no silo could evaluate the model")
            return None
        tokens = sum(silo["tokens"] for silo in per_silo.values())
        loss = math.fsum(silo["loss"] * silo["tokens"] for silo in per_silo.values()) / tokens
        evaluated = Evaluated(
            round=state.round,
            per_silo=per_silo,
            per_node=per_node if own else {},
            loss=loss,
            perplexity=_perplexity(loss),
            tokens_trained=state.tokens,
            bytes_up=traffic["up"],
            bytes_down=traffic["down"],
            seconds=time.perf_counter() - begin,
        )
        self._stream.emit(evaluated)
        return evaluated

    # --- events -----------------------------------------------------------------------------------

    def _training_seconds(self, reports: Collection[TrainReport]) -> float:
        """Return the seconds in which clients trained: side by side on own machines, else in turn."""
        federation = self.config.federation
        side_by_side = {"inprocess": 1, "simulation": federation.clients_in_parallel}
        each = [report.seconds["training"] for report in reports]
        return max(*each, sum(each) / side_by_side.get(federation.engine, len(each)))

    def _client_finished(self, reply: Reply, bytes_down: int, group_bytes_down: dict[str, int]) -> None:
        report = reply.report
        speed = report.tokens / report.seconds["training"]
        roofline = self._roofline.get(reply.participant)
        self._stream.emit(
            ClientFinished(
                round=report.round,
                silo=reply.participant,
                steps=report.steps,
                tokens=report.tokens,
                loss=report.loss,
                loss_last=report.loss_last,
                learning_rate=report.learning_rate,
                seconds=report.seconds,
                bytes_up=reply.bytes_up,
                bytes_down=bytes_down,
                update_norm=report.update_norm,
                tokens_per_second=speed,
                mfu=mfu(speed, self._flops_per_token, roofline),
                gradient_norm=report.gradient_norm,
                group_bytes_up=reply.group_bytes_up,
                group_bytes_down=group_bytes_down,
                release=(
                    None
                    if report.release is None
                    else {
                        "clip_norm": report.release.clip_norm,
                        "noise_multiplier": report.release.noise_multiplier,
                        "releases": report.release.releases,
                    }
                ),
            )
        )
        if report.state_lost:
            self._notice(
                "warning",
                f"round {report.round}: {reply.participant} had lost its local state; it went on from the "
                "right place in its text with a fresh local optimizer",
            )

    def _failed(self, server_round: int, name: str, failure: Failure) -> None:
        reason = " ".join(failure.reason.split())
        self._stream.emit(ClientFailed(round=server_round, silo=name, kind=failure.kind, reason=reason))

    def _does_not_evaluate(self, name: str, reason: str) -> None:
        """Say once that a silo's policy leaves it out of the perplexities; that is no failure."""
        if name not in self._not_evaluating:
            self._not_evaluating.add(name)
            self._notice("info", f"{name} does not evaluate the model: {reason}")

    def _notice(self, level: Any, message: str) -> None:
        self._stream.emit(Notice(level=level, message=message))


@dataclass
class _Traffic:
    """Bytes of a round's training on the link, over all clients, and those of each state group."""

    up: int = 0
    down: int = 0
    groups_up: Counter[str] = field(default_factory=Counter)
    groups_down: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply, down: int, groups_down: Mapping[str, int]) -> None:
        self.up += reply.bytes_up
        self.down += down
        self.groups_up.update(reply.group_bytes_up)
        self.groups_down.update(groups_down)


def _round_finished(
    after: ServerState,
    aggregate: Aggregate,
    reports: Mapping[str, TrainReport],
    traffic: "_Traffic",
    seconds: Any,
) -> RoundFinished:
    names = list(aggregate.weights)
    weights = [aggregate.weights[name] for name in names]
    norms = [reports[name].update_norm for name in names]
    norm = aggregate.step.pseudo_gradient_norm
    tokens = sum(report.tokens for report in reports.values())
    agreed = consensus(norm, weights, norms)
    return RoundFinished(
        round=after.round,
        global_step=after.global_step,
        tokens=after.tokens,
        train_loss=math.fsum(r.loss * r.tokens for r in reports.values()) / tokens,
        pseudo_gradient_norm=norm,
        client_cosine=client_cosine(norm, weights, norms),
        consensus=math.nan if agreed is None else agreed,
        parameter_norm=aggregate.step.parameter_norm,
        bytes_up=traffic.up,
        bytes_down=traffic.down,
        seconds=seconds,
        group_bytes_up=dict(traffic.groups_up),
        group_bytes_down=dict(traffic.groups_down),
    )


def _first_state(silo: SiloInfo) -> ServerState:
    """Return the numbers of a run before its first round, whose silos are as this one."""
    return ServerState(
        run_id=uuid.uuid4().hex,
        round=0,
        global_step=0,
        tokens=0,
        vocab_size=silo.vocab_size,
        sequence_length=silo.sequence_length,
        tokenizer_sha256=silo.tokenizer_sha256,
    )


def _joined(before: str | None, reports: Collection[TrainReport]) -> str | None:
    """Return the rows that were trained, all that reports tell of them; None: no report tells any."""
    for report in reports:
        if report.vocabulary is not None:
            before = joined_vocabulary(before, report.vocabulary)
    return before


def _typical_scalars(reports: Collection[TrainReport]) -> dict[str, float]:
    """Return the median of each scalar state, which a single client cannot distort."""
    names = {name for report in reports for name in report.scalars}
    return {
        name: statistics.median_low([r.scalars[name] for r in reports if name in r.scalars])
        for name in sorted(names)
    }


def _diagnostics(after: ServerState, aggregate: Aggregate, reports: Mapping[str, TrainReport]) -> Diagnostics:
    step = aggregate.step
    values = {f"noise/{name}": value for name, value in after.noise.figures().items()}
    values |= {f"outer_{group}_norm/all": norm for group, norm in step.state_norms.items()}
    for figure, norms in (
        ("pseudo_gradient_norm", step.pseudo_gradient_norms),
        ("parameter_norm", step.parameter_norms),
    ):
        for layer, of_layer in _by_layer(norms).items():
            values[f"{figure}/{layer}"] = math.hypot(*of_layer)
    values |= aggregate.figures
    for silo, report in reports.items():
        values |= {f"{figure}/{silo}": value for figure, value in report.diagnostics.items()}
    return Diagnostics(round=after.round, values=values)


def _by_layer(norms: Mapping[str, float]) -> dict[str, list[float]]:
    """Gather the norms of parameters by layer: the numbered block, or else the module."""
    layers: dict[str, list[float]] = {}
    for name, norm in norms.items():
        block = re.match(r".*?\.\d+(?=\.)", name)
        layers.setdefault(block[0] if block else name.rpartition(".")[0] or name, []).append(norm)
    return layers


def _perplexity(loss: float) -> float:
    with contextlib.suppress(OverflowError):
        return math.exp(loss)
    return math.inf


def _evaluation(loss: float, tokens: int) -> SiloEvaluation:
    return {"loss": loss, "perplexity": _perplexity(loss), "tokens": tokens}
