"""The gate of a node: what is judged of a request, in which order, before anything of it is done.

It is the only way in, for every kind of message and every kind of node (`photon.subfederation.nodes`): in a
silo's worker, in a simulation, for the silos within a federation and for the islands of a silo. What may be
forbidden is in `photon.silo.policy`.
"""

from functools import partial

import torch
from flwr.app import RecordDict

from photon.config.compose import parse
from photon.errors import LostError, PhotonError, RefusedError
from photon.link.answer import Answer, MessageType, NodeConfig
from photon.link.messages import (
    BODY,
    Body,
    Describe,
    Description,
    EvaluateRequest,
    Stand,
    Stood,
    TrainRequest,
    pack,
    pack_loss,
    pack_refusal,
)
from photon.link.request import read_request
from photon.preflight import check_federation, preflight, preflight_gateway
from photon.silo import secure
from photon.silo.ahead import check_ahead, contract_asked
from photon.silo.arriving import kept_params, measured_model, trained_groups
from photon.silo.site import find_site, read_settings
from photon.silo.use import count_use
from photon.subfederation.branch import with_border
from photon.subfederation.nodes import node_of


def answer(
    message_type: MessageType,
    content: RecordDict,
    node_config: NodeConfig,
    islands: Answer | None = None,
    *,
    outermost: bool = True,
) -> RecordDict:
    """Do what a message asks for, if all that stands before it is passed.

    Parameters
    ----------
    message_type
        What kind of message it is.
    content
        Its content: a body, the run's configuration, and state groups where the request brings any.
    node_config
        What the node's operator has set.
    islands
        What answers for each island of a silo; None: this function, in this process.
    outermost
        Whether the request comes from outside the node. One of a federation here to its own silos was judged
        and counted with the request that this federation was asked.

    Returns
    -------
    RecordDict
        The content of the reply; a refusal where the operator forbids what is asked, and word of it where
        the node has lost what it is to have.

    Raises
    ------
    PhotonError
        If the message, the node's data or its state do not fit.
    """
    try:
        return _answer(message_type, content, node_config, islands or answer, outermost)
    except RefusedError as refusal:
        return RecordDict({BODY: pack_refusal(refusal)})
    except LostError as loss:
        return RecordDict({BODY: pack_loss(loss)})
    except (MemoryError, RuntimeError) as error:
        # Torch has a type of its own for a GPU's memory, and none for that of a machine.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise PhotonError(f"{message_type}: there is not enough memory here for what is asked") from error
        raise


def _answer(
    message_type: MessageType,
    content: RecordDict,
    node_config: NodeConfig,
    islands: Answer,
    outermost: bool,
) -> RecordDict:
    """Let a request through the gate. Nothing of a step runs if one before it refuses."""
    # 1. The message: sizes and types of its body.
    request = read_request(message_type, content)
    body, silo = request.body, request.silo

    # 2. The configuration, by schema alone: nothing is imported, built, or read from this disk.
    run = parse(request.config)

    # 3. Policy on names and sizes, before anything is imported; and which node this is, by the node config.
    settings = read_settings(node_config)
    decided = body.decided if isinstance(body, TrainRequest | EvaluateRequest) else None
    site, config = find_site(node_config, with_border(run, silo), decided)
    policy = site.policy
    policy.check_names(silo or "the node", config)
    if from_elsewhere := outermost and settings.island is None and not settings.simulated:
        policy.check_components(silo or "the node", config)
    within = partial(answer, outermost=False)
    node = node_of(settings, site, config, request, node_config, within, islands)
    if silo is not None:
        node.check_asked(silo, body.members if isinstance(body, TrainRequest) else [silo])

    # 4. Whether it can run: components are imported and built, once for a text.
    preflight(run)
    if node.is_federation:
        check_federation(config, silo or "this node")
    if node.rules is not None:
        preflight_gateway(config, node.rules)
    if from_elsewhere:
        policy.check_model(config)
    if node.inside is not None:
        preflight(node.inside)
    if isinstance(body, Describe):
        described = node.describe()
        check_ahead(described, site, config)
        return _reply(Description(silos=described))
    if isinstance(body, Stand):
        policy.check_standing()
        site.check_store("a standing request comes through the run's store")
        return _reply(Stood(answered=0, why="it may begin"))
    if not isinstance(body, TrainRequest | EvaluateRequest):
        return _reply(node.query(body))

    # 5. Contract: what may arrive and leave, which the request does not say.
    policy.check_run(body.silo, config, node.vocab_size)
    if isinstance(body, EvaluateRequest):
        policy.check_evaluation(body.silo, config.evaluation.sequences if from_elsewhere else None)
        model, is_kept = measured_model(content, body, site, config, node.vocab_size)
        return _reply(node.evaluate(body, model).model_copy(update={"kept": is_kept}))
    policy.check_train_request(body)
    contract = contract_asked(body, site, config, node.vocab_size, federation=node.is_federation)
    node.check_contract(contract)
    held = kept_params(body, site, config, contract)
    secure.prepare(body, site, config, is_federation=node.is_federation)

    # 6. and 7. What it costs each silo whose text it touches, against limits and counts; and it is counted.
    if outermost and settings.island is None and not node.has_answered(body):
        count_use(body, node.cost(body), site, config, told=not node.is_federation)

    # 8. The tensors are read, and the node works.
    groups = trained_groups(content, body, site, config, contract, held)
    trained, report = node.train(body, groups, contract)

    # 9. The reply: what the contract says and nothing else, under masks where the run has them.
    contract.check_reply(trained)
    if body.masking is not None:
        trained = secure.mask(body, trained, site, config, contract)
    file = node.kept_file(body) if body.masking is None else None
    reply = site.link.send(trained, content, file)
    reply[BODY] = pack(report)
    return reply


def _reply(body: Body) -> RecordDict:
    return RecordDict({BODY: pack(body)})
