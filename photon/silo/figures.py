"""Figures of a fit: how far it went, and with ``telemetry.diagnostics`` what it did to the training state."""

import math
from collections.abc import Mapping

import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.link.messages import TrainRequest
from photon.silo.runtime import runtime_of
from photon.strategy.local import Start
from photon.training.devices import GroupResult
from photon.training.diagnostics import (
    activation_norms,
    basis_similarities,
    momentum_cosines,
    state_changes,
    state_norms,
)

#: Windows on which activations are measured.
DIAGNOSTIC_WINDOWS = 4


def diagnose(
    fitted: GroupResult,
    start: Start,
    data: PreparedData,
    request: TrainRequest,
    config: RunConfig,
) -> dict[str, float]:
    """Return the figures of the loss, and measure the trained state, what the round changed, and activations.

    Activations are measured on the same few windows each time.
    A group of processes leaves no model here to measure activations on.
    """
    figures = state_norms(fitted.groups) | fitted.result.figures
    if (before := start.optimizer) is not None:
        figures |= state_changes(before, fitted.groups)
        figures |= momentum_cosines(start.params, fitted.params, before)
        figures |= basis_similarities(before.get("basis", {}), fitted.groups.get("basis", {}))
    if config.training.processes == 1:
        runtime = runtime_of(config, data.manifest.vocab_size)
        windows = data.windows(request.members[0], "train")[:DIAGNOSTIC_WINDOWS].astype("int64")
        windows = windows[:, : data.manifest.sequence_length]
        runtime.model.eval()
        figures |= activation_norms(runtime.model, torch.from_numpy(windows).to(runtime.device))
    return figures


def distance(after: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> float:
    """Return ‖after − before‖ over all tensors."""
    squares = (
        float(torch.linalg.vector_norm(tensor.cpu() - before[name])) ** 2 for name, tensor in after.items()
    )
    return math.sqrt(sum(squares))
