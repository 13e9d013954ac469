"""The server's gate: what a reply must be before it may touch the global model or a figure."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Message
from pydantic import ValidationError

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.federation.exchange import Failure
from photon.federation.sizes import Measured, believed_norm, clip_problem, measure, too_large
from photon.link.bounded import one_line
from photon.link.encoding import SparseTensor
from photon.link.messages import (
    Body,
    Described,
    EvaluateReport,
    SiloInfo,
    TrainReport,
    TrainRequest,
    unpack,
)
from photon.link.pipelines import uplink_pipelines
from photon.link.transport import ServerLink, Ticket
from photon.models.vocabulary import token_parameters, unpack_vocabulary
from photon.strategy.contract import PARAMS, Contract

#: Largest multiplier of noise that a silo is believed to have added of its own.
MOST_NOISE = 100.0


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
    """A reply to a train request that may count.

    Attributes
    ----------
    report
        Its report; the norm of the update in it is computed.
    groups
        Its state groups as they came.
    measured
        How large they are.
    """

    report: TrainReport
    groups: dict[str, dict[str, torch.Tensor | SparseTensor]]
    measured: Measured


@dataclass(frozen=True)
class Asked:
    """What a participant was asked to train, and what it has said of itself before.

    Attributes
    ----------
    request, contract, ticket
        What was asked, what the reply may hold, and where it may have been written.
    sent
        The global parameters.
    silo
        What it has said; None: several silos train together, as one.
    sequence_length
        Tokens of a window.
    text_tokens
        Tokens of the training text of its members.
    local_steps
        Local steps of a silo in a round of its own.
    """

    request: TrainRequest
    contract: Contract
    ticket: Ticket | None
    sent: Mapping[str, torch.Tensor]
    silo: SiloInfo | None
    sequence_length: int
    text_tokens: int
    local_steps: int

    @property
    def is_federation(self) -> bool:
        """Whether it is a federation, whose pace and members are its own."""
        return self.silo is not None and self.silo.federation

    @property
    def leaves(self) -> int:
        """Silos that train for it, as it has said before."""
        return self.silo.leaves if self.silo is not None else 1

    @property
    def steps(self) -> int:
        """Most local steps that one of its silos can have taken."""
        if self.silo is None or not self.silo.federation:
            return self.request.steps
        return max(self.request.steps, self.silo.pace * self.local_steps)

    @property
    def tokens(self) -> int:
        """Most tokens that it can have trained."""
        if not self.request.steps:
            return self.text_tokens
        return self.steps * self.leaves * self.request.batch_size * self.sequence_length


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
        up = uplink_pipelines(config.link)
        codecs = [*up.params, *(codec for _, named in up.named for codec in named)]
        self._lossy = not all(codec.on_bytes for codec in codecs)

    def described(self, message: Message) -> tuple[list[SiloInfo], list[str]]:
        """Return the silos that a node describes, and why others of its are turned away.

        Raises
        ------
        PhotonError
            If its answer cannot be read.
        """
        entries = unpack(message.content, Described).silos
        silos, problems = [], []
        times = Counter(str(entry.get("name")) for entry in entries)
        for entry in entries:
            name = one_line(str(entry.get("name")), 64)
            try:
                silo = SiloInfo.model_validate(entry)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"])
                problems.append(one_line(f"silo {name!r} is turned away: its {where}: {first['msg']}"))
                continue
            if times[silo.name] > 1:
                problems.append(f"silo {name!r} is turned away: it is described more than once")
            else:
                silos.append(silo)
        return silos, list(dict.fromkeys(problems))

    def shared(self, message: Message, kind: type[Body]) -> Body | Failure:
        """Return a silo's part of a secure sum: its keys, its shares, or what unmasks the sum.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        return unpack(message.content, kind)

    def trained(self, message: Message, asked: Asked) -> Trained | Failure:
        """Return a reply to a train request, or why it is rejected.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        report = unpack(message.content, TrainReport)
        contract = asked.contract
        groups = self._link.receive(message.content, asked.ticket, {**contract.optional, **contract.due})
        problem = problem_with(
            report, groups, asked, rows=self._rows(contract)
        ) or _problem_with_before_merge(report, asked.silo, own_nodes(self._config, asked.request.silo))
        if problem:
            return Failure("rejected", problem)
        is_update = self._config.link.uplink_payload == "update"
        masked = asked.request.masking is not None
        measured = measure(
            groups, contract, asked.sent, update=is_update, masked=masked, steps=max(1, report.steps)
        )
        if problem := too_large(measured) or self._beyond_clip_norm(report, measured, asked):
            return Failure("rejected", problem)
        if measured.norm is not None:
            norm = believed_norm(report.update_norm, measured.norm, lossy=self._lossy)
            report = report.model_copy(update={"update_norm": norm})
        elif report.update_norm is None:
            return Failure("rejected", "it reports no norm of its masked update")
        return Trained(report, groups, measured)

    def _beyond_clip_norm(self, report: TrainReport, measured: Measured, asked: Asked) -> str | None:
        """Return why an update is longer than the run, or the border that it has crossed, allows."""
        privacy = self._config.privacy
        root = self._config.federation.root
        node = None if root is None else root.child(asked.request.silo)
        if node is not None and node.privacy is not None:
            privacy = self._config.border_privacy(node)
        elif asked.is_federation:
            # Its silos' updates are bounded, and it has added up those of several rounds.
            return None
        rounded = self._lossy or bool(self._config.link.downlink)
        by_parameters = self._config.link.uplink_payload == "parameters"
        # Parameters that travel rounded differ from the sent ones by more than the update.
        if privacy.clip_norm is None or measured.whole is None or (rounded and by_parameters):
            return None
        if asked.contract.own:
            # Theirs is measured from what the silo had itself.
            return None
        told = report.privacy.noise_multiplier if report.privacy is not None else 0.0
        count = sum(shape.numel() for shape in asked.contract.due.get(PARAMS, {}).values())
        # A silo's own policy may ask for more noise than the run does, and for a smaller bound.
        noise = max(privacy.noise_multiplier, min(told, MOST_NOISE))
        return clip_problem(measured.whole, count, privacy.clip_norm, noise, lossy=self._lossy)

    def evaluated(
        self, message: Message, server_round: int, silo: SiloInfo, names: Collection[str]
    ) -> EvaluateReport | Failure:
        """Return a silo's evaluation, or why it is rejected.

        Parameters
        ----------
        silo
            What it has said of itself.
        names
            Nodes of whose own models it may tell.

        Raises
        ------
        PhotonError
            If it cannot be read.
        """
        report = unpack(message.content, EvaluateReport)
        if (report.round, report.silo) != (server_round, silo.name):
            return Failure("rejected", f"its evaluation is not one of round {server_round}")
        most = silo.validation_tokens or 0
        told = [report.tokens, *(node["tokens"] for node in report.per_node.values())]
        if max(told) > most:
            return Failure(
                "rejected", f"its evaluation is over {max(told):,} tokens, and it has described {most:,}"
            )
        if strangers := sorted(set(report.per_node) - set(names)):
            return Failure("rejected", f"its evaluation tells of {strangers[0]}, which is none of its own")
        return report

    def _rows(self, contract: Contract) -> int | None:
        """Return how many rows the embedding has, if silos tell which of them they train."""
        if not contract.tells_rows:
            return None
        return contract.arriving[PARAMS][token_parameters(self._config.model)[0]][0]


def own_nodes(config: RunConfig, name: str) -> list[str]:
    """Return the nodes of whose own models a silo, or a federation of the tree, may tell."""
    node = None if config.federation.root is None else config.federation.root.child(name)
    if node is None or node.is_silo:
        return [name]
    return [one.name for _, one in node.levels()]


def problem_with(
    report: TrainReport,
    groups: Mapping[str, Mapping[str, torch.Tensor | SparseTensor]],
    asked: Asked,
    *,
    rows: int | None = None,
) -> str | None:
    """Return why a reply is to be rejected, or None.

    A reply must answer its own request, say that it has done what was asked and no more than it has
    described, and hold exactly the groups, names and shapes of the contract. Sums are finite and in float64.
    What is masked are integers: of 32 bits in updates, of 64 bits in sums.

    Parameters
    ----------
    rows
        Rows of the embedding, if the report must tell which of them were trained; else it must not.
    """
    request, contract = asked.request, asked.contract
    judged = (
        _problem_with_report(report, asked)
        if request.steps
        else _problem_with_reading(report, request, asked.text_tokens)
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
            leaving = contract.leaving[group]
            masked = request.masking is not None and name in leaving.masked
            if problem := _problem_with_values(tensor, leaving.kind, masked=masked):
                return f"{group}/{name} holds {problem}"
    return None


def _problem_with_values(tensor: torch.Tensor | SparseTensor, kind: str, *, masked: bool) -> str | None:
    """Return what a tensor holds that it must not.

    Parameters
    ----------
    kind
        As of `Leaving`.
    """
    if masked:
        integers = torch.int64 if kind == "sum" else torch.int32
        return None if tensor.dtype == integers else f"{tensor.dtype}, expected masked integers"
    if kind == "sum" and tensor.dtype != torch.float64:
        return f"{tensor.dtype}, expected a sum in float64"
    if not tensor.dtype.is_floating_point:
        return f"{tensor.dtype}, expected floating point"
    if kind != "sum":
        return None  # How large they are is measured, and whether they are numbers at all.
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


def _problem_with_report(report: TrainReport, asked: Asked) -> str | None:
    request = asked.request
    if problem := _problem_with_origin(report, request):
        return problem
    if None in _figures_of_steps(report):
        return "it reports steps without a loss that is a number"
    of_batch = request.batch_size * asked.sequence_length
    if asked.is_federation:
        if not (0 < report.steps <= asked.steps and report.leaves <= asked.leaves):
            return (
                f"it reports {report.steps} steps of {report.leaves} silos, and described {asked.leaves}, "
                f"which take {asked.steps} at most"
            )
        if not 0 < report.tokens <= report.steps * report.leaves * of_batch:
            return f"it reports {report.tokens} tokens of {report.leaves} silos in {report.steps} steps"
        # One that has lost its state begins to count anew.
        if report.position < 1:
            return "it reports no round of its own"
        return None
    if (report.steps, report.tokens, report.leaves) != (request.steps, request.steps * of_batch, 1):
        return f"it reports {report.steps} steps and {report.tokens} tokens, not what was asked for"
    if report.position != request.position + request.steps * request.batch_size:
        return f"it took its text up to window {report.position}, not what was asked for"
    return None


def _problem_with_before_merge(
    report: TrainReport, silo: SiloInfo | None, names: Collection[str]
) -> str | None:
    """Return why what a reply tells of models that were not averaged yet cannot be.

    Parameters
    ----------
    silo
        What the participant has said of itself.
    names
        Nodes of whose own models it may tell.
    """
    if not report.before_merge:
        return None
    if strangers := sorted(set(report.before_merge) - set(names)):
        return f"it tells the loss of {strangers[0]}, which is none of its own"
    most = (silo.validation_tokens if silo is not None else None) or 0
    told = max(found["tokens"] for found in report.before_merge.values())
    return f"its loss is over {told:,} tokens, and it has described {most:,}" if told > most else None


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
