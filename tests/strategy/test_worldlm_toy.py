"""WorldLM against its baselines on Markov sources of two regions, small enough to know what to expect."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from photon.config import compose
from photon.data.documents import Document
from photon.data.prepare import prepare_documents
from photon.federation.run import prepare_run, run_inprocess

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEF"
TREE = "federation.tree={north: [a, b], south: [c, d]}"
FEDAVG = ["strategy=photon", "strategy.weighting=uniform", "strategy.local_state=reset"]
LENGTH = 33


def sources() -> dict[str, np.ndarray]:
    """Return transition matrices of the leaves, 0.8 of it the region's: float64 of shape (32, 32)."""
    generator = np.random.default_rng(0)

    def matrix() -> np.ndarray:
        rows = np.exp(1.5 * generator.standard_normal((len(SYMBOLS), len(SYMBOLS))))
        return rows / rows.sum(axis=1, keepdims=True)

    regions = [matrix(), matrix()]
    return {name: 0.8 * regions[number // 2] + 0.2 * matrix() for number, name in enumerate("abcd")}


def write_sequences(folder: Path, trained_on: int) -> Path:
    """Prepare as many sequences of each leaf to train on, and as many to validate on."""
    generator = np.random.default_rng(1)
    documents = {}
    for name, transitions in sources().items():
        state = generator.integers(len(SYMBOLS), size=2 * trained_on)
        columns = [state]
        for _ in range(LENGTH - 2):  # the end of the document is a token, too
            drawn = generator.random((len(state), 1))
            state = (transitions.cumsum(axis=1)[state] < drawn).sum(axis=1).clip(max=len(SYMBOLS) - 1)
            columns.append(state)
        texts = ("".join(SYMBOLS[symbol] for symbol in row) for row in np.stack(columns, axis=1))
        documents[name] = [Document(f"{name}{number}", text) for number, text in enumerate(texts)]
    prepare_documents(
        documents, folder, vocab_size=257, sequence_length=LENGTH, validation_fraction=0.5, seed=0
    )
    return folder


def perplexity(data: Path, run_dir: Path, *overrides: str) -> float:
    """Train and return the mean over the leaves of the perplexity of their own model on their own text."""
    config = compose(
        [
            "model.architecture.n_layer=4",
            "model.architecture.n_embd=48",
            "model.architecture.n_head=4",
            f"model.sequence_length={LENGTH}",
            "federation=inprocess",
            "data=prepared",
            f"data.path={data}",
            "cohort=null",
            "rounds=12",
            "local_steps=20",
            "schedule=constant",
            "training.batch_size=32",
            "training.threads=1",
            "training.precision=fp32",
            "evaluation.every=12",
            "telemetry.display=none",
            "telemetry.report=false",
            "telemetry.export=false",
            f"run_dir={run_dir}",
            *overrides,
        ]
    )
    run_inprocess(prepare_run(config), resume=False)
    found = json.loads((run_dir / "summary.json").read_text())["perplexity"]["per_node"]
    return statistics.fmean(found[name] for name in "abcd")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_with_little_text_worldlm_is_better_than_fedavg_and_fedper(tmp_path: Path) -> None:
    """The text is seen 30 times over, so that a leaf alone would learn it by heart."""
    data = write_sequences(tmp_path / "data", 256)
    world = [TREE, "strategy.residuals.n_res=0", "strategy.local_state=reset", "strategy.key_fraction=0.5"]
    ours = perplexity(data, tmp_path / "world", "strategy=worldlm", *world)
    fedavg = perplexity(data, tmp_path / "fedavg", *FEDAVG)
    fedper = perplexity(data, tmp_path / "fedper", "strategy=fedper", *world)
    assert ours <= 0.95 * fedavg
    assert ours <= 0.9 * fedper
