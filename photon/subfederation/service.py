"""What a federation in the place of a silo does with a message; see `photon.silo.service`."""

from collections.abc import Callable

from flwr.app import RecordDict

from photon.errors import PhotonError, RefusedError, RunError
from photon.link.answer import MessageType
from photon.link.messages import (
    BODY,
    Describe,
    Description,
    EvaluateOrder,
    Query,
    TrainOrder,
    pack,
    pack_refusal,
    unpack,
)
from photon.link.records import dense_groups
from photon.link.transport import SiloLink
from photon.silo import secure
from photon.silo import service as silo_service
from photon.silo.shapes import contract_of, evaluated_shapes
from photon.strategy.contract import PARAMS
from photon.subfederation.member import Member


def answer(member: Member, message_type: MessageType, content: RecordDict) -> RecordDict:
    """Do what an order of the federation above asks for.

    Raises
    ------
    PhotonError
        If it cannot be done; rounds that are finished stay.
    """
    try:
        return _train(member, content) if message_type == "train" else _evaluate(member, content)
    except RunError as error:
        raise PhotonError(f"{member.node.name}: {error}") from error


def answer_as_silo(
    member: Member, message_type: MessageType, content: RecordDict, judge: Callable[[TrainOrder], None]
) -> RecordDict:
    """Answer for a federation that looks like a silo from above; ``judge`` refuses orders to train."""
    name, policy = member.node.name, member.site.policy
    if message_type == "query":
        if isinstance(unpack(content, Query).root, Describe):
            described = member.describe()
            if not policy.share_validation:
                described = described.model_copy(update={"validation_tokens": None, "unigram_loss": None})
            return RecordDict({BODY: pack(Description(silos=[described]))})
        return silo_service.answer_at(message_type, content, member.site, member.above)
    try:
        policy.check_run(name, member.above, member.described.vocab_size)
        if message_type == "evaluate":
            policy.check_evaluation(name)
        else:
            judge(unpack(content, TrainOrder))
    except RefusedError as refusal:
        return RecordDict({BODY: pack_refusal(refusal)})
    return answer(member, message_type, content)


def _train(member: Member, content: RecordDict) -> RecordDict:
    link = SiloLink(member.site.store, member.site.state)
    order = unpack(content, TrainOrder)
    contract = contract_of(member.above, _vocab_size(member), order.round, order.silo, federation=True)
    if others := [group for group in contract.due if group != PARAMS]:
        raise PhotonError(
            f"{order.silo} is a federation, which has no {', '.join(others)} of its own; use a strategy that "
            "averages parameters alone"
        )
    packed, report = member.train(order, dense_groups(link.receive(content, contract.arriving)), contract)
    if order.masking is not None:
        packed = secure.mask(order, order.masking, packed, member.site, member.above, contract.masked)
    reply = link.send(packed, content)
    reply[BODY] = pack(report)
    return reply


def _evaluate(member: Member, content: RecordDict) -> RecordDict:
    link = SiloLink(member.site.store, member.site.state)
    shapes = evaluated_shapes(member.above, _vocab_size(member))
    order = unpack(content, EvaluateOrder)
    groups = dense_groups(link.receive(content, shapes))
    return RecordDict({BODY: pack(member.evaluate(order, groups["params"]))})


def _vocab_size(member: Member) -> int:
    """Return the tokens of the members' tokenizer, which unseen members alone know."""
    return member.described.vocab_size if member.unseen else member.site.prepared().manifest.vocab_size
