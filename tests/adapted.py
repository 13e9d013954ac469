"""An adapter to tune on conversations or on preferences: silos' data, a base model, questions to ask it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from photon.data.prepared import PreparedData
from photon.models.build import build_model
from tests.conftest import SMALL, composed

OBJECTIVES = {
    "sft": ["objective=sft", "model.sequence_length=48"],
    "dpo": ["objective=dpo", "model.sequence_length=80"],
}


@dataclass(frozen=True)
class Adapted:
    """What a run tunes.

    Attributes
    ----------
    data
        Prepared data.
    overrides
        Objective, adapter and base model.
    """

    data: Path
    overrides: list[str]


def adapted(folder: Path, objective: str, write: Callable[[Path, dict[str, str]], Path]) -> Adapted:
    """Write data for an objective, and a base model none of whose values a seed gives."""
    silos = {"alpha": "abcdefgh", "beta": "ijklmnop", "gamma": "qrstuvwxyz"}
    data, ways = write(folder, silos), ["model.architecture.n_layer=2", *OBJECTIVES[objective]]
    config = composed(*SMALL, *ways, "data.path=elsewhere")
    model = build_model(config.model, PreparedData.open(data).manifest.vocab_size, seed=7)
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    base = folder / "base"
    model.save_pretrained(base)
    lora = ["adapter=lora", "adapter.rank=2", "optimizer.lr=0.01", f"model.warm_start={base}"]
    return Adapted(data, [*ways, *lora])


def write_quiz(folder: Path) -> Path:
    """Write the task ``quiz``, eight questions with two answers each, and return its folder."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(count))

    rows = [{"query": words(3), "choices": [words(1), words(2)], "gold": draw.randrange(2)} for _ in range(8)]
    folder.mkdir()
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
