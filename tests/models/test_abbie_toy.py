"""AbbIE on a source with a memory of two symbols: which variants bear more iterations than in training."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.config.abbie import AbbieSection
from photon.config.compose import compose
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.training.schedule import WsdSchedule

SYMBOLS, LENGTH, ROWS, STEPS = 32, 47, 32, 600
#: Least and most perplexity at r = 16, of that at r = 2.
BOUNDS = {
    ("C", "inter"): (1.15, math.inf),
    ("D", "inter"): (1.0, 1.05),
    ("D", "post"): (1.0, 1.05),
    ("D", "input"): (1.0, math.inf),
}


def source(seed: int) -> Tensor:
    """Return the probability of the next symbol after each pair, (symbols, symbols, symbols)."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=generator)).softmax(-1)


def draw(chances: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return texts of `LENGTH` symbols and one more, (rows, LENGTH + 1)."""
    drawn = [torch.randint(SYMBOLS, (rows,), generator=generator) for _ in range(2)]
    while len(drawn) <= LENGTH:
        nexts = torch.multinomial(chances[drawn[-2], drawn[-1]], 1, generator=generator)
        drawn.append(nexts.squeeze(1))
    return torch.stack(drawn, 1)


def perplexities(variant: str, mode: str, seed: int) -> dict[int, float]:
    """Train at r = 2; return the validation perplexity at each number of iterations."""
    abbie: Any = {
        "head_blocks": 1,
        "body_blocks": 2,
        "tail_blocks": 1,
        "variant": variant,
        "residual_mode": mode,
    }
    tiny = compose(["model=tiny"]).model
    assert tiny.architecture is not None
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 4, "initializer_range": 0.0275}
    update = {
        "architecture": tiny.architecture | shape,
        "abbie": AbbieSection(**abbie),
        "sequence_length": LENGTH,
        "vocab_size": SYMBOLS,
    }
    model = build_model(tiny.model_copy(update=update), SYMBOLS, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = WsdSchedule(steps=STEPS, warmup_steps=30)
    chances, generator = source(seed), torch.Generator().manual_seed(seed + 100)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step)
        optimizer.zero_grad()
        causal_loss(model, draw(chances, ROWS, generator)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    texts, found = draw(chances, 256, torch.Generator().manual_seed(seed + 200)), {}
    model.eval()
    for r in (1, 2, 3, 4, 8, 16):
        model.config.iterations = r
        with torch.no_grad():
            found[r] = float(causal_loss(model, texts).exp())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("variant", "mode"), BOUNDS)
def test_which_variants_bear_more_iterations(variant: str, mode: str, seed: int) -> None:
    found = perplexities(variant, mode, seed)
    assert min(found, key=found.__getitem__) == 2
    least, most = BOUNDS[variant, mode]
    assert least <= found[16] / found[2] <= most
