"""Direct preference optimisation (2305.18290): prefer what was chosen, measured from the run's start."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.models.adapter import adapters_off, has_adapters
from photon.models.loss import run_apart
from photon.models.reference import add_reference, reference_of, without_reference
from photon.objective.base import Evaluation, Objective
from photon.objective.perplexity import batches_of, reading
from photon.objective.sft import check_keeps_apart
from photon.training.groups import Tensors
from photon.training.hooks import Batch, Loss
from photon.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is reported of pairs.
FIGURES = ("loss", "reward_accuracy", "reward_margin")


class DirectPreference(Objective):
    """Train on pairs of answers y_w, which was chosen, and y_l, which was rejected, to a question x.

        r(y) = beta · (log π(y|x) − log π_ref(y|x)),   loss = −log σ(r(y_w) − r(y_l))

    π_ref is the model that the run started from. Full weights have a frozen copy of it beside them; of a
    model with adapters it is the model without them. What is reported beside the loss are the share of pairs
    whose chosen answer has the larger reward r, and the mean of r(y_w) − r(y_l).

    Parameters
    ----------
    beta
        How little the model may move away from its start.
    """

    arrays = ("tokens", "positions", "targets", "pairs")
    shards = False

    def __init__(self, *, beta: float = 0.1) -> None:
        if not beta > 0:
            raise ValueError(f"beta={beta:g}: must be above 0")
        self.beta = beta

    def build(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the model with its reference beside it, unless adapters make it.

        Raises
        ------
        PhotonError
            If it does not keep the answers of a window apart.
        """
        check_keeps_apart(model)
        return model if has_adapters(model) else add_reference(model)

    def plain(self, params: Tensors) -> Tensors:
        """Return the parameters without those of the reference."""
        return without_reference(params)

    def count(self, batch: Batch) -> Tensor:
        """Return how many pairs a batch has."""
        # The sides are numbered in each window, the rejected ones evenly.
        return batch["pairs"].amax(1).sum() // 2

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        """Return the mean loss of the pairs of a batch; see `Objective.loss`."""
        return self._of(*self._rewards(model, batch, rows))

    def _rewards(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return r(y_w) − r(y_l) in each place that may have a pair, and which have one: (n,) and bool."""
        with torch.no_grad():
            if (reference := reference_of(model)) is not None:
                before = log_probabilities(reference, batch, rows)
            else:
                with adapters_off(getattr(model, "module", model)):
                    before = log_probabilities(model, batch, rows)
        now = log_probabilities(model, batch, rows)
        moved = self.beta * (now - before)
        numbers = torch.arange(1, moved.shape[1] + 1, device=moved.device)
        there = numbers <= batch["pairs"].amax(1, keepdim=True) // 2
        return (moved[..., 0] - moved[..., 1]).flatten(), there.flatten()

    @staticmethod
    def _of(margins: Tensor, there: Tensor) -> Loss:
        pairs = there.sum().clamp_min(1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(there, values, 0.0).sum() / pairs

        loss = mean(-nn.functional.logsigmoid(margins))
        with torch.no_grad():
            figures = (loss.detach(), mean((margins > 0).float()), mean(margins))
        return Loss(loss, dict(zip(FIGURES, figures, strict=True)))

    def evaluate(
        self,
        model: "PreTrainedModel",
        data: SiloData,
        rows: Tensor | None,
        *,
        batch_size: int,
        device: torch.device,
        precision: Precision,
        limit: int | None,
    ) -> Evaluation:
        """Return the summed figures of the validation pairs; see `Objective.evaluate`."""
        sums, count = dict.fromkeys(FIGURES, 0.0), 0
        with reading(model, device, precision):
            for arrays in data.arrays("validation"):
                for batch in batches_of(arrays, model, batch_size=batch_size, device=device, limit=limit):
                    items = int(self.count(batch))
                    for name, value in self.loss(model, batch, rows).figures.items():
                        sums[name] += float(value) * items
                    count += items
        return Evaluation(sums, count)

    def sample(self, size: int, sequence_length: int) -> Batch:
        """Return a batch of one pair a row; see `Objective.sample`."""
        half = (sequence_length + 1) // 2
        places = torch.arange(sequence_length)
        second = places >= half
        rows = {
            "tokens": torch.zeros(sequence_length, dtype=torch.int64),
            "positions": torch.where(second, places - half, places),
            "targets": torch.ones(sequence_length, dtype=torch.int64),
            "pairs": second.long() + 1,
        }
        return {name: row.expand(size, -1).contiguous() for name, row in rows.items()}


def log_probabilities(model: nn.Module, batch: Batch, rows: Tensor | None = None) -> Tensor:
    """Return the summed log-probability of each answer of a batch of pairs.

    Parameters
    ----------
    model
        A causal language model, or a wrapper of one.
    batch
        Windows of pairs, as `photon.data.pairs` packs them.
    rows
        Rows of the vocabulary that the softmax runs over, bool; None: all.

    Returns
    -------
    Tensor
        float32, (windows, most pairs of a window, 2): of the chosen answer and the rejected one. 0 where a
        window has fewer pairs.
    """
    tokens, sides = batch["tokens"], batch["pairs"]
    windows, length = tokens.shape
    logits = run_apart(model, tokens[:, :-1], batch["positions"][:, :-1]).logits
    if rows is not None:
        logits = logits.masked_fill(~rows, -torch.inf)
    answers = batch["targets"][:, 1:] == 1
    # Side 0 is that of no pair. A side has at least two tokens, a question's and an answer's.
    most = 2 * (length // 4 + 1)
    places = (torch.arange(windows, device=tokens.device)[:, None] * (most + 1) + sides[:, 1:]).flatten()
    targets = tokens[:, 1:].flatten()
    if logits.device.type == "cpu":
        # Most tokens may be no answers. On a GPU their number would have to be waited for.
        kept = answers.flatten()
        found = -nn.functional.cross_entropy(logits[answers].float(), targets[kept], reduction="none")
        places = places[kept]
    else:
        found = -nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
        found = found * answers.flatten()
    summed = found.new_zeros(windows * (most + 1)).index_add(0, places, found)
    return summed.view(windows, most + 1)[:, 1:].unflatten(1, (-1, 2))
