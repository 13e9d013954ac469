"""Causal language modelling: predict every token of a packed window from those before it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.models.loss import CausalLosses, causal_losses
from photon.objective.base import Evaluation, Objective
from photon.objective.perplexity import OwnTokens, evaluate_windows
from photon.training.hooks import Batch, Loss
from photon.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(Objective):
    """The mean cross-entropy of the next token, in nats, over all tokens of a batch alike.

    Of a mixture of experts the router's auxiliary loss is trained with it, times the coefficient in the
    configuration of the model. The loss that is reported is the cross-entropy.
    """

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        """Return the loss of a batch of token ids; see `Objective.loss`."""
        return self._of(causal_losses(model, batch["tokens"], rows))

    @staticmethod
    def _of(losses: CausalLosses) -> Loss:
        """Return what is trained, and what is reported."""
        if losses.auxiliary is None:
            return Loss(losses.total)
        return Loss(losses.total, {"loss": losses.cross_entropy, "auxiliary_loss": losses.auxiliary})

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
        """Return the summed cross-entropy of the validation windows; see `Objective.evaluate`.

        A model whose softmax ran over some tokens alone leaves a share to all others, as of `OwnTokens`.
        """
        own = None if rows is None else OwnTokens.of(data.token_counts(), len(rows))
        scores = [
            evaluate_windows(
                model,
                arrays.pop("tokens"),
                batch_size=batch_size,
                device=device,
                precision=precision,
                limit=limit,
                own=own,
                beside=arrays,
            )
            for arrays in data.arrays("validation")
        ]
        return Evaluation({"loss": sum(score.nll for score in scores)}, sum(score.tokens for score in scores))

    def sample(self, size: int, sequence_length: int) -> Batch:
        """Return a batch of one token alone; see `Objective.sample`."""
        return {"tokens": torch.zeros((size, sequence_length + 1), dtype=torch.int64)}
