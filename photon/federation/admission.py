"""The server's gate: what a reply must be before it may touch the global model or a figure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Message

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.federation.exchange import Failure
from photon.link.encoding import SparseTensor
from photon.link.messages import (
    Body,
    Description,
    EvaluateReport,
    SiloInfo,
    TrainReport,
    TrainRequest,
    unpack,
)
from photon.link.transport import ServerLink, Ticket
from photon.models.vocabulary import token_parameters, unpack_vocabulary
from photon.strategy.contract import PARAMS, Contract


def shapes_of(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of state groups."""
    return {group: {name: t.shape for name, t in tensors.items()} for group, tensors in groups.items()}


def nbytes_of(contract: Contract) -> int:
    """Return the bytes of what is due: sums in float64, all else in float32."""
    return sum(
        (8 if leaving.kind == "sum" else 4) * sum(size.numel() for size in leaving.shapes.values())
        for leaving in contract.leaving.values()
        if leaving.required
    )


@dataclass(frozen=True)
class Trained:
    """A reply to a train request that may count: its report, and its state groups as they came."""

    report: TrainReport
    groups: dict[str, dict[str, torch.Tensor | SparseTensor]]


class Admission:
    """Judges all that comes from nodes: descriptions, replies, evaluations, and parts of secure sums.

    Each kind has one method, which returns a value or a rejection.

    Parameters
    ----------
    config
        The run's configuration.
    link
        Decodes them.
    """

    def __init__(self, config: RunConfig, link: ServerLink) -> None:
        self._config = config
        self._link = link

    def described(self, message: Message) -> list[SiloInfo] | Failure:
        """Return the silos that a node describes, or why it is turned away.

        Raises
        ------
        PhotonError
            If its answer cannot be read.
        """
        silos = unpack(message.content, Description).silos
        names = [silo.name for silo in silos]
        if len(set(names)) < len(names):
            return Failure("rejected", f"it describes {max(names, key=names.count)} more than once")
        return silos

    def shared(self, message: Message, kind: type[Body]) -> Body | Failure:
        """Return a silo's part of a secure sum: its keys, its shares, or what unmasks the sum.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        return unpack(message.content, kind)

    def trained(
        self,
        message: Message,
        request: TrainRequest,
        contract: Contract,
        ticket: Ticket | None,
        *,
        sequence_length: int,
        text_tokens: int,
        federation: bool,
    ) -> Trained | Failure:
        """Return a reply to a train request, or why it is rejected.

        Parameters
        ----------
        message
            The reply.
        request, contract, ticket
            What was asked, what the reply may hold, and where it may have been written.
        sequence_length
            Tokens of a window.
        text_tokens
            Tokens of the training text that it has described.
        federation
            Whether it comes from a federation, whose pace and members are its own.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        report = unpack(message.content, TrainReport)
        groups = self._link.receive(message.content, ticket, {**contract.optional, **contract.due})
        problem = problem_with(
            report,
            groups,
            request,
            contract,
            sequence_length,
            text_tokens=text_tokens,
            rows=self._rows(contract),
            federation=federation,
        )
        return Failure("rejected", problem) if problem else Trained(report, groups)

    def evaluated(self, message: Message, server_round: int, silo: str) -> EvaluateReport | Failure:
        """Return a silo's evaluation, or why it is rejected.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        report = unpack(message.content, EvaluateReport)
        losses = [report.loss, *(node["loss"] for node in report.per_node.values())]
        if (report.round, report.silo) != (server_round, silo) or not all(map(math.isfinite, losses)):
            return Failure("rejected", f"its evaluation is not one of round {server_round}")
        return report

    def _rows(self, contract: Contract) -> int | None:
        """Return how many rows the embedding has, if silos tell which of them they train."""
        if not contract.tells_rows:
            return None
        return contract.arriving[PARAMS][token_parameters(self._config.model)[0]][0]


def problem_with(
    report: TrainReport,
    groups: Mapping[str, Mapping[str, torch.Tensor | SparseTensor]],
    request: TrainRequest,
    contract: Contract,
    sequence_length: int,
    *,
    text_tokens: int = 0,
    federation: bool = False,
    rows: int | None = None,
) -> str | None:
    """Return why a reply is to be rejected, or None.

    A reply must answer its own request, hold exactly the groups, names and shapes of the contract, and be
    finite; of a masked one what is summed are integers of 32 bits. Sums are in float64.

    Parameters
    ----------
    text_tokens
        Tokens of the training text, which a request of no steps has the silo read once.
    federation
        Whether it comes from a federation, whose pace and members are its own.
    rows
        Rows of the embedding, if the report must tell which of them were trained; else it must not.
    """
    judged = (
        _problem_with_report(report, request, sequence_length, federation=federation)
        if request.steps
        else _problem_with_reading(report, request, text_tokens)
    )
    if judged:
        return judged
    if problem := _problem_with_vocabulary(report.vocabulary, rows):
        return problem
    expected, extra = contract.due, contract.optional
    if set(groups) - set(extra) != set(expected):
        return f"it holds the groups {sorted(groups)}, expected {sorted(expected)}"
    for group, tensors in groups.items():
        shapes = expected[group] if group in expected else extra[group]
        names = set(shapes) ^ set(tensors) if group in expected else set(tensors) - set(shapes)
        if names:
            return f"group {group} has missing or unknown tensors, such as {min(names)}"
        for name, tensor in tensors.items():
            if tensor.shape != shapes[name]:
                return f"{group}/{name} has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
            masked = request.masking is not None and group == PARAMS and name in contract.masked
            kind = "masked" if masked else contract.leaving[group].kind
            if problem := _problem_with_values(tensor, kind):
                return f"{group}/{name} holds {problem}"
    return None


def _problem_with_values(tensor: torch.Tensor | SparseTensor, kind: str) -> str | None:
    """Return what a tensor holds that it must not.

    Parameters
    ----------
    kind
        As of `Leaving`; or ``"masked"``.
    """
    if kind == "masked":
        return None if tensor.dtype == torch.int32 else f"{tensor.dtype}, expected masked integers"
    if kind == "sum" and tensor.dtype != torch.float64:
        return f"{tensor.dtype}, expected a sum in float64"
    if not tensor.dtype.is_floating_point:
        return f"{tensor.dtype}, expected floating point"
    values = tensor.values if isinstance(tensor, SparseTensor) else tensor
    return "a value that is not finite" if values.numel() and not _finite(values) else None


def _problem_with_reading(report: TrainReport, request: TrainRequest, text_tokens: int) -> str | None:
    if problem := _problem_with_origin(report, request):
        return problem
    if _figures_of_steps(report) != [None] * 4:
        return "it reports a loss, and no steps were ordered"
    if (report.steps, report.tokens, report.position) != (0, text_tokens, request.position):
        return (
            f"it reports {report.steps} steps, {report.tokens} tokens and window {report.position}, not that "
            f"it has read its {text_tokens} tokens once"
        )
    return None


def _figures_of_steps(report: TrainReport) -> list[float | None]:
    return [report.loss, report.loss_last, report.learning_rate, report.gradient_norm]


def _problem_with_origin(report: TrainReport, request: TrainRequest) -> str | None:
    if (report.round, report.silo) != (request.round, request.silo):
        return (
            f"it answers round {report.round} of {report.silo}, not round {request.round} of {request.silo}"
        )
    return None


def _problem_with_report(
    report: TrainReport, request: TrainRequest, sequence_length: int, *, federation: bool
) -> str | None:
    if problem := _problem_with_origin(report, request):
        return problem
    if None in _figures_of_steps(report):
        return "it reports steps without a loss that is a number"
    of_batch = request.batch_size * sequence_length
    if federation:
        if report.steps < 1 or not 0 < report.tokens <= report.steps * report.leaves * of_batch:
            return f"it reports {report.tokens} tokens of {report.leaves} silos in {report.steps} steps"
        # One that has lost its state begins to count anew.
        if report.position < 1:
            return "it reports no round of its own"
    else:
        if report.steps != request.steps or report.tokens != request.steps * of_batch:
            return f"it reports {report.steps} steps and {report.tokens} tokens, not what was asked for"
        if report.position != request.position + request.steps * request.batch_size:
            return f"it took its text up to window {report.position}, not what was asked for"
    return None


def _problem_with_vocabulary(vocabulary: str | None, rows: int | None) -> str | None:
    if vocabulary is None or rows is None:
        if (vocabulary is None) == (rows is None):
            return None
        told = "no vocabulary" if vocabulary is None else "a vocabulary that was not asked for"
        return f"it tells {told}; set strategy.embeddings alike at every node"
    try:
        unpack_vocabulary(vocabulary, rows)
    except PhotonError as error:
        return str(error)
    return None


def _finite(tensor: torch.Tensor) -> bool:
    # One pass and no temporary: the extremes carry every NaN and infinity.
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))
