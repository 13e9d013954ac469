"""What a reply must be before it may touch the global model."""

from collections.abc import Collection, Mapping

import torch

from photon.errors import PhotonError
from photon.link.coding import SparseTensor
from photon.link.messages import TrainOrder, TrainReport
from photon.link.records import Shapes
from photon.models.vocabulary import unpack_vocabulary


def shapes_of(groups: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Size]]:
    """Return the shapes of state groups."""
    return {group: {name: t.shape for name, t in tensors.items()} for group, tensors in groups.items()}


def nbytes_of(shapes: Shapes) -> int:
    """Return the bytes of state groups of some shapes in float32."""
    return 4 * sum(size.numel() for tensors in shapes.values() for size in tensors.values())


def problem_with(
    report: TrainReport,
    groups: Mapping[str, Mapping[str, torch.Tensor | SparseTensor]],
    order: TrainOrder,
    expected: Shapes,
    sequence_length: int,
    *,
    optional: Shapes | None = None,
    summed: Collection[str] = (),
    federation: bool = False,
    rows: int | None = None,
) -> str | None:
    """Return why a reply is to be rejected, or None.

    A reply must answer its own order, hold exactly the expected groups, names and shapes, and be finite; of a
    masked one what is summed are integers of 32 bits.

    Parameters
    ----------
    optional
        Groups that it may hold as well, or parts of them.
    summed
        Parameters that are masked if anything is.
    federation
        Whether it comes from a federation, whose pace and members are its own.
    rows
        Rows of the embedding, if the report must tell which of them were trained; else it must not.
    """
    if problem := _problem_with_report(report, order, sequence_length, federation=federation):
        return problem
    if problem := _problem_with_vocabulary(report.vocabulary, rows):
        return problem
    extra = optional or {}
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
            if order.masking is not None and group == "params" and name in summed:
                if tensor.dtype != torch.int32:
                    return f"{group}/{name} holds {tensor.dtype}, expected masked integers"
                continue
            if not tensor.dtype.is_floating_point:
                return f"{group}/{name} holds {tensor.dtype}, expected floating point"
            values = tensor.values if isinstance(tensor, SparseTensor) else tensor
            if values.numel() and not _finite(values):
                return f"{group}/{name} holds a value that is not finite"
    return None


def _problem_with_report(
    report: TrainReport, order: TrainOrder, sequence_length: int, *, federation: bool
) -> str | None:
    if (report.round, report.silo) != (order.round, order.silo):
        return f"it answers round {report.round} of {report.silo}, not round {order.round} of {order.silo}"
    of_batch = order.batch_size * sequence_length
    if federation:
        if report.steps < 1 or not 0 < report.tokens <= report.steps * report.leaves * of_batch:
            return f"it reports {report.tokens} tokens of {report.leaves} silos in {report.steps} steps"
        # One that has lost its state begins to count anew.
        if report.position < 1:
            return "it reports no round of its own"
    else:
        if report.steps != order.steps or report.tokens != order.steps * of_batch:
            return f"it reports {report.steps} steps and {report.tokens} tokens, not what was ordered"
        if report.position != order.position + order.steps * order.batch_size:
            return f"it took its text up to window {report.position}, not what was ordered"
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
