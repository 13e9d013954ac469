import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from photon.objective.perplexity import OwnTokens, Score, evaluate_windows


class Table(nn.Module):
    """Predicts the next token from the current one by a table of logits, and notes what it was shown."""

    def __init__(self, logits: torch.Tensor, positions: int = 64) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(vocab_size=logits.shape[0], max_position_embeddings=positions)
        self.seen: list[torch.Tensor] = []
        self.modes: list[bool] = []

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.seen.append(input_ids)
        self.modes.append(self.training or torch.is_grad_enabled())
        return SimpleNamespace(logits=self.logits[input_ids])


def evaluate(model: nn.Module, windows: np.ndarray, limit: int | None = None, batch_size: int = 2) -> Score:
    return evaluate_windows(
        model,  # type: ignore[arg-type]
        windows,
        batch_size=batch_size,
        device="cpu",
        precision="fp32",
        limit=limit,
    )


def test_uniform_predictions_have_the_vocabulary_as_perplexity() -> None:
    windows = np.random.default_rng(0).integers(0, 50, (7, 9), dtype=np.uint16)
    score = evaluate(Table(torch.full((50, 50), 3.0)), windows)
    assert score.tokens == 7 * 8
    assert score.perplexity == pytest.approx(50, rel=1e-6)


def test_known_probabilities_by_hand() -> None:
    # From 0: to 0 with 1/2, to 1 with 1/4, to 2 with 1/4. From 1: to 2 with 9/10. From 2: to 1 with 1/5.
    table = torch.tensor([[0.5, 0.25, 0.25], [0.05, 0.05, 0.9], [0.4, 0.2, 0.4]])
    windows = np.array([[0, 0, 1, 2], [2, 1, 2, 1]], dtype=np.uint32)
    score = evaluate(Table(table.log()), windows)
    expected = -math.log(0.5 * 0.25 * 0.9) - math.log(0.2 * 0.9 * 0.2)
    assert score == (pytest.approx(expected, rel=1e-6), 6)
    assert score.perplexity == pytest.approx(math.exp(expected / 6), rel=1e-6)


def test_a_model_of_some_tokens_leaves_a_share_to_those_it_has_never_seen() -> None:
    """Tokens 0 to 2 of six; 0 occurs once among ten: u = 2/12, for each other token a third of that."""
    own = OwnTokens.of(np.array([1, 4, 5, 0, 0, 0]), rows=8)
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    shares = logits[:, :3].softmax(1) * (10 / 12)
    score = evaluate_windows(
        Table(torch.cat([logits, torch.zeros(2, 8)])),  # type: ignore[arg-type]
        np.array([[0, 1, 5, 2]]),
        batch_size=2,
        device="cpu",
        precision="fp32",
        own=own,
    )
    expected = -math.log(shares[0, 1]) - math.log(2 / 12 / 3) - math.log(shares[5, 2])
    assert score == (pytest.approx(expected, rel=1e-6), 3)
    every = torch.cat([own.losses(logits[:1], torch.tensor([token])) for token in range(6)])
    assert float((-every).exp().sum()) == pytest.approx(1, rel=1e-6), "rows beyond the tokenizer have none"


def test_a_model_of_all_tokens_is_measured_as_any() -> None:
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 3])
    own = OwnTokens.of(np.array([1, 2, 3, 4]), rows=4)
    plain = nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(own.losses(logits, targets), plain)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_without_gradients_and_left_as_it_was(training: bool) -> None:
    model = Table(torch.zeros(4, 4)).train(training)
    evaluate(model, np.zeros((3, 5), dtype=np.uint16))
    assert model.training is training
    assert not any(model.modes)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("limit", "rows"), [(None, range(10)), (99, range(10)), (5, [0, 2, 4, 6, 8]), (3, [0, 3, 6])]
)
def test_a_limit_takes_evenly_spaced_windows(limit: int | None, rows: list[int]) -> None:
    windows = np.repeat(np.arange(10, dtype=np.uint16)[:, None], 4, axis=1)
    model = Table(torch.zeros(10, 10))
    score = evaluate(model, windows, limit)
    assert torch.cat(model.seen)[:, 0].tolist() == list(rows)
    assert score.tokens == len(rows) * 3


def test_the_batch_does_not_matter() -> None:
    windows = np.random.default_rng(0).integers(0, 20, (11, 6), dtype=np.uint16)
    model = Table(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)))
    assert evaluate(model, windows, batch_size=1).nll == pytest.approx(
        evaluate(model, windows, batch_size=32).nll
    )


def test_an_enormous_loss_is_an_infinite_perplexity() -> None:
    assert Score(nll=1e6, tokens=10).perplexity == math.inf
