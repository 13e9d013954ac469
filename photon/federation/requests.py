"""What a round asks of its cohort: requests, and messages that bring state groups with them."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Message, RecordDict

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.federation.admission import nbytes_of, shapes_of
from photon.federation.once import SentOnce
from photon.federation.pace import adaptive_local_steps
from photon.federation.roster import Roster
from photon.link.encoding import Packed
from photon.link.messages import BODY, TrainRequest, pack
from photon.link.transport import ServerLink, Ticket, message_bytes
from photon.link.update import encode_change
from photon.objective.configured import steps_of
from photon.state.checkpoint import Checkpoint, LedgerEntry, weights_sha256
from photon.state.received import tensors_hash
from photon.strategy.base import Participant, Strategy
from photon.strategy.contract import PARAMS, Contract, check_promises, role_of

Groups = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Sent:
    """What goes out to a cohort, and what is expected back, by participant.

    Attributes
    ----------
    requests
        What each is to do.
    messages
        Emptied as they are sent.
    contracts
        What a reply may hold.
    tickets
        Where each may write its reply; None: inside its message.
    down
        Bytes of the message, and those of each state group in it.
    params
        The global parameters, memory-mapped.
    """

    requests: Mapping[str, TrainRequest]
    messages: dict[str, Message]
    contracts: Mapping[str, Contract]
    tickets: Mapping[str, Ticket | None]
    down: dict[str, tuple[int, dict[str, int]]]
    params: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Given:
    """The model that silos have measured last, and kept.

    Attributes
    ----------
    source
        Hash of its parameters, as of `tensors_hash`.
    received
        The same as silos decode them.
    silos
        Who has kept it.
    """

    source: str
    received: str
    silos: frozenset[str]


class RequestWriter:
    """Writes the requests of a run's rounds.

    Parameters
    ----------
    config
        The run's configuration.
    strategy
        Says who gets which state groups.
    link
        Encodes them.
    roster
        Knows where silos are.
    once
        Knows what they have that is sent once.
    """

    def __init__(
        self, config: RunConfig, strategy: Strategy, link: ServerLink, roster: Roster, once: SentOnce
    ) -> None:
        self._config = config
        self._strategy = strategy
        self._link = link
        self._roster = roster
        self._once = once
        self._shapes: dict[str, torch.Size] | None = None
        #: Hashes of parameters, by what they are of.
        self._models: dict[int, tuple[str, Mapping[str, torch.Tensor]]] = {}
        #: What the round's silos have decoded of the parameters, where the link sends their change.
        self.reference: dict[str, torch.Tensor] | None = None

    def shapes(self, checkpoint: Checkpoint) -> Mapping[str, torch.Size]:
        """Return the shape of every parameter."""
        if self._shapes is None:
            self._shapes = shapes_of({PARAMS: checkpoint.load_params()})[PARAMS]
        return self._shapes

    def contracts(
        self, server_round: int, checkpoint: Checkpoint, cohort: Sequence[Participant]
    ) -> dict[str, Contract]:
        """Return what each participant's reply of a round may hold; those of one role share one contract.

        Raises
        ------
        PhotonError
            If something would leave without the noise or the mask that the run promises.
        """
        server_silo = self._config.federation.server_silo
        federations = {silo.name for silo in self._roster.silos() if silo.federation}
        roles = {
            one.name: role_of(one.name, server_silo, federation=one.name in federations) for one in cohort
        }
        contracts = {
            role: self._strategy.contract(server_round, self.shapes(checkpoint), role)
            for role in set(roles.values())
        }
        for contract in contracts.values():
            check_promises(contract, self._config.privacy)
        return {name: contracts[role] for name, role in roles.items()}

    def train_requests(
        self,
        server_round: int,
        checkpoint: Checkpoint,
        cohort: Sequence[Participant],
        last: Collection[str] = (),
    ) -> dict[str, TrainRequest]:
        """Return what each participant is to do.

        Parameters
        ----------
        last
            Those of the cohort that also tell what they bring: it is their last round.
        """
        state, federation = checkpoint.state, self._config.federation
        most = steps_of(self._config, server_round)
        steps = dict.fromkeys((participant.name for participant in cohort), most)
        if federation.adaptive_local_steps and most:
            steps = adaptive_local_steps(most, steps, state.ledger)
        requests = {}
        for participant in cohort:
            entry = state.ledger.get(participant.name, LedgerEntry())
            # The members of a federation know for themselves.
            is_federation = self._roster.is_federation(participant.name)
            requests[participant.name] = TrainRequest(
                run_id=state.run_id,
                model_id=state.model_id,
                round=server_round,
                silo=participant.name,
                members=list(participant.members),
                global_step=state.global_step,
                steps=steps[participant.name],
                batch_size=participant.batch_size,
                last_round=entry.last_round,
                position=entry.position,
                cohort=len(cohort),
                averaged_rounds=state.averaged_rounds,
                scalars=state.local_scalars,
                routed=self._strategy.routed_tags(checkpoint, participant.name),
                decided=None if is_federation else state.decided_by(participant.name, participant.members),
                before_merge=participant.name in last,
            )
        return requests

    def write(
        self,
        server_round: int,
        checkpoint: Checkpoint,
        cohort: Sequence[Participant],
        requests: Mapping[str, TrainRequest],
        sent_config: RunConfig,
        given: Given | None = None,
    ) -> Sent:
        """Return the messages that bring requests and state groups to a cohort.

        Parameters
        ----------
        sent_config
            The configuration that silos are sent.
        given
            The model that silos have; None: they have none.
        """
        run_id = checkpoint.state.run_id
        groups = self._strategy.configure_train(server_round, checkpoint, cohort)
        change, base_hash = self._change(server_round, checkpoint)
        everything, params = len(self.shapes(checkpoint)), checkpoint.load_params()
        encoded: dict[tuple[int, tuple[str, ...], bool], RecordDict] = {}
        messages: dict[str, Message] = {}
        contracts = self.contracts(server_round, checkpoint, cohort)
        tickets: dict[str, Ticket | None] = {}
        bodies: dict[str, TrainRequest] = {}
        for participant in cohort:
            name = participant.name
            own: Groups = groups[name]
            is_full = len(own["params"]) == everything
            follows = change is not None and checkpoint.last_round_of(name) == checkpoint.state.round
            # One that trains apart from the others has decoded other parameters than they have.
            follows = follows and (name != self._config.federation.server_silo or len(cohort) > 1)
            own = self._once.split(own, params)
            held = self._held(participant, own[PARAMS], given)
            own, fixed = self._once.left(name, own)
            if held is not None:
                own = {group: tensors for group, tensors in own.items() if group != PARAMS}
            # Participants that get the same groups share the encoded arrays, in memory and in the SuperLink.
            if (key := (id(groups[name]), tuple(own), follows)) not in encoded:
                encoded[key] = self._encode(own, change if follows else None, run_id, server_round, is_full)
            content = RecordDict(dict(encoded[key]))
            due = nbytes_of(contracts[name])
            tickets[name] = self._link.admit(content, due, run_id, server_round, held=held is not None)
            bodies[name] = requests[name].model_copy(
                update={"base_hash": base_hash if follows else None, "fixed": fixed, "held": held}
            )
            content[BODY] = pack(bodies[name], sent_config)
            messages[name] = self._roster.message(
                content, participant.members, "train", f"round-{server_round}"
            )
        down = {name: message_bytes(message.content) for name, message in messages.items()}
        return Sent(bodies, messages, contracts, tickets, down, params)

    def whole(
        self,
        name: str,
        sent: Sent,
        checkpoint: Checkpoint,
        cohort: Sequence[Participant],
        sent_config: RunConfig,
    ) -> Message:
        """Return the message to a participant with the parameters that the first one left out.

        Its bytes are counted with those of the first. The arguments are those of `write`, and its result.
        """
        request = sent.requests[name]
        groups = self._strategy.configure_train(request.round, checkpoint, cohort)[name]
        own, _ = self._once.left(name, self._once.split(groups, checkpoint.load_params()))
        content = self._link.send(own, request.run_id, request.round)
        if (ticket := sent.tickets[name]) is not None:
            self._link.attach(ticket, content)
        content[BODY] = pack(request.model_copy(update={"held": None}), sent_config)
        (first, first_groups), (more, more_groups) = sent.down[name], message_bytes(content)
        sent.down[name] = first + more, dict(Counter(first_groups) + Counter(more_groups))
        return self._roster.message(content, request.members, "train", f"round-{request.round}")

    def _held(
        self, participant: Participant, params: Mapping[str, torch.Tensor], given: Given | None
    ) -> str | None:
        """Return the hash by which a participant has these parameters; None: they are to be sent."""
        if given is None or participant.name not in given.silos or self.reference is not None:
            return None
        if participant.members != (participant.name,):
            return None
        if id(params) not in self._models:
            self._models[id(params)] = tensors_hash(params), params
        return given.received if self._models[id(params)][0] == given.source else None

    def settle(self, accepted: Collection[str]) -> None:
        """Take note of whose replies of the last round were accepted: they have what they were sent."""
        self._once.settle(accepted)
        self._models.clear()

    def _change(
        self, server_round: int, checkpoint: Checkpoint
    ) -> tuple[Mapping[str, Packed] | None, str | None]:
        """Return what brings the last round's silos to this round's parameters, and the hash of theirs.

        What all silos have after that is kept for the checkpoint. None: there is nothing to add to.
        """
        if self._config.link.downlink_payload == "parameters":
            return None, None
        params, before = checkpoint.load_params(), checkpoint.load_reference()
        if not before:
            self.reference = params
            return None, None
        seed = f"{self._config.seed}/{server_round}/down"
        change, after = encode_change(self._once.moving(params), before, self._config.link, seed=seed)
        self.reference = {**params, **after}
        return change, weights_sha256(before)

    def _encode(
        self,
        groups: Mapping[str, Mapping[str, torch.Tensor]],
        change: Mapping[str, Packed] | None,
        run_id: str,
        server_round: int,
        is_full: bool,
    ) -> RecordDict:
        if self.reference is None:
            return self._link.send(groups, run_id, server_round)
        if not is_full:
            raise PhotonError(
                "link.downlink_payload=update: the strategy sends parameters in parts; set "
                "link.downlink_payload=parameters"
            )
        if change is None:
            reference = self._once.moving(self.reference)
            return self._link.send({**groups, PARAMS: reference}, run_id, server_round)
        beside = {group: tensors for group, tensors in groups.items() if group != "params"}
        return self._link.send_change(change, beside, run_id, server_round)
