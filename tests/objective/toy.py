"""A masked objective, small enough to compute by hand, and one that takes no steps."""

import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.objective.base import Evaluation, Objective
from photon.training.groups import StateGroups
from photon.training.hooks import Batch, Loss


class Masked(Objective):
    """Mean cross-entropy of next tokens, but of those below a bound alone.

    Parameters
    ----------
    below
        Tokens from here on are no targets.
    """

    def __init__(self, below: int = 7) -> None:
        self.below = below

    def _counted(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:] < self.below

    def count(self, batch: Batch) -> Tensor:
        return self._counted(batch["tokens"]).sum()

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        tokens = batch["tokens"]
        logits = model(input_ids=tokens[:, :-1]).logits.flatten(0, 1)
        costs = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        counted = self._counted(tokens).flatten()
        mean = (costs * counted).sum() / counted.sum().clamp_min(1)
        right = (logits.argmax(1) == tokens[:, 1:].flatten()) & counted
        return Loss(mean, {"right": right.sum() / counted.sum().clamp_min(1)})

    def evaluate(self, model, data, rows, *, batch_size, device, precision, limit) -> Evaluation:
        total, count = 0.0, 0
        for windows in data.windows("validation"):
            batch = {"tokens": torch.from_numpy(windows[:limit].astype("int64")).to(device)}
            with torch.no_grad():
                items = int(self.count(batch))
                total, count = total + self.loss(model, batch, rows).value.item() * items, count + items
        return Evaluation({"masked": total}, count)

    def sample(self, size: int, sequence_length: int) -> Batch:
        return {"tokens": torch.zeros((size, sequence_length), dtype=torch.int64)}


class Sums(Masked):
    """Takes no steps: sums over text alone."""

    trains = False

    def statistics(self, model: nn.Module, data: SiloData, received: StateGroups, seed: int) -> StateGroups:
        return {"tokens": {"count": torch.from_numpy(data.token_counts()).double()}}


class Costs(Masked):
    """Tokens are costs, and 0 is not counted; the model's part in the loss is 0."""

    def count(self, batch: Batch) -> Tensor:
        return (batch["tokens"] > 0).sum()

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        tokens = batch["tokens"]
        nothing = 0 * model(input_ids=tokens).logits.sum()
        return Loss(nothing + tokens.sum() / self.count(batch).clamp_min(1))


class Weighted(Masked):
    """Needs what no prepared text has."""

    arrays = ("tokens", "weights")
