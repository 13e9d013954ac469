from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from photon.data.loader import BatchStream
from photon.training.hooks import Batch, Loss

VOCABULARY = 17
LENGTH = 8


class TinyLM(nn.Module):
    """The smallest thing with the face of a causal language model: two matrices, a tied head, a bias."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

        self.embedding = nn.Embedding(VOCABULARY, 6, _weight=random(VOCABULARY, 6).data)
        self.mix = random(6, 6)
        self.bias = random(6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        hidden = torch.tanh(self.embedding(input_ids) @ self.mix + self.bias)
        return SimpleNamespace(logits=self.head(hidden))


def exact_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    """The loss in the model's own precision, which Photon's leaves for float32."""
    logits = model(input_ids=input_ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


def exact_batch_loss(model: nn.Module, batch: Batch, _: Tensor | None) -> Loss:
    return Loss(exact_loss(model, batch["tokens"]))


def random_windows(count: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, size=(count, LENGTH), dtype=np.uint16)


def stream(position: int = 0, seed: int = 1, windows: np.ndarray | None = None) -> BatchStream:
    return BatchStream({"tokens": [random_windows() if windows is None else windows]}, seed, position)
