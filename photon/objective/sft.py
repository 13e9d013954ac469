"""Supervised fine-tuning: predict what the assistant says in conversations."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from photon.errors import PhotonError
from photon.models.loss import causal_losses, run_apart
from photon.objective.causal_lm import CausalLM
from photon.training.hooks import Batch, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SupervisedFineTuning(CausalLM):
    """The mean cross-entropy of what the assistant says, in nats per token, each from its own conversation.

    A batch has conversations packed into windows, as `photon.data.chat_windows` packs them. The mean is over
    all of the assistant's tokens of a step, however they are spread over micro-batches and devices. The
    auxiliary loss of a mixture of experts counts all tokens alike.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tokens", "positions", "targets")

    def build(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the model, if it keeps texts apart whose positions begin anew.

        Raises
        ------
        PhotonError
            If it does not.
        """
        check_keeps_apart(model)
        return model

    def count(self, batch: Batch) -> Tensor:
        """Return how many tokens of a batch the assistant says."""
        return _targets(batch)[:, 1:].sum()

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        """Return the loss of a batch of conversations; see `Objective.loss`."""
        losses = causal_losses(
            model, batch["tokens"], rows, targets=_targets(batch), positions=batch["positions"]
        )
        return self._of(losses)

    def sample(self, size: int, sequence_length: int) -> Batch:
        """Return a batch that the assistant says, in two conversations a row; see `Objective.sample`."""
        tokens = torch.zeros((size, sequence_length), dtype=torch.int64)
        places = torch.arange(sequence_length) % max(1, sequence_length - 1)
        return {
            "tokens": tokens,
            "positions": places.expand(size, -1).contiguous(),
            "targets": torch.ones_like(tokens),
        }


def check_keeps_apart(model: "PreTrainedModel") -> None:
    """Check that a model keeps conversations apart that share a window; one of meta tensors passes.

    Raises
    ------
    PhotonError
        If it does not.
    """
    if model.device.type != "meta" and not keeps_apart(model):
        raise PhotonError(
            f"model: conversations that share a window see each other in a {model.config.model_type} of "
            "transformers; take a model that goes by position_ids, such as gpt2 or llama"
        )


def keeps_apart(model: nn.Module) -> bool:
    """Return whether what a model says of a text is the same whatever text shares its row."""
    tokens = torch.zeros((2, 6), dtype=torch.int64, device=next(model.parameters()).device)
    tokens[1, :3] = 1
    positions = torch.tensor([0, 1, 2, 0, 1, 2], device=tokens.device).expand(2, -1)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = run_apart(model, tokens, positions).logits[:, 3:].float()
    except TypeError:  # it takes no positions
        return False
    finally:
        model.train(training)
    return torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def _targets(batch: Batch) -> Tensor:
    return batch["targets"] == 1
