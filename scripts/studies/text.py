"""What the studies on text share: text that the installation brings, a small model, whole federations.

Every run is a whole federation in this process.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon.data.documents import Document
    from photon.link.answer import Answer

#: Of every run, so that only what is compared differs and nothing is shown.
COMMON = [
    "federation=inprocess",
    "data=prepared",
    "schedule=cosine",
    "training.threads=1",
    "training.precision=fp32",
    "telemetry.display=none",
    "telemetry.report=false",
    "telemetry.export=false",
]
BATCH = 4
SEQUENCE_LENGTH = 64
VOCABULARY = 512
#: Of the smallest model, which all studies but that of trees train.
SETTINGS = [
    "model.architecture.n_layer=2",
    "model.architecture.n_embd=64",
    "model.architecture.n_head=2",
    f"model.sequence_length={SEQUENCE_LENGTH}",
    "model.recipe.warmup_steps=32",
    f"training.batch_size={BATCH}",
    "evaluation.sequences=96",
]
#: Decays for runs as short as these.
QUICK = "optimizer.betas=[0.8,0.99]"
MUON = ["strategy=photon", "optimizer=muon", "optimizer.weight_decay=0.0"]


def add_data(run: argparse.ArgumentParser) -> None:
    """Add the option that says where prepared text lies."""
    run.add_argument("--data", type=Path, default=Path(".photon/convergence"), help="folder of the text")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for ``federate``, which goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="photon-text-") as folder:
        yield Path(folder)


def federate(
    overrides: list[str], run_dir: Path, between: "Callable[[Answer], Answer] | None" = None
) -> dict[str, Any] | None:
    """Run a federation of ``COMMON`` and these overrides; return its summary, or None if it diverged.

    Parameters
    ----------
    between
        Makes of what answers for a node what answers in its place; None: nothing stands between.
    """
    from photon.config.compose import compose
    from photon.engine.inprocess import run_inprocess
    from photon.errors import RunError
    from photon.federation.run import prepare_run
    from photon.node import answer
    from photon.preflight import preflight

    config = prepare_run(preflight(compose([*COMMON, *overrides, f"run_dir={run_dir}"])))
    try:
        return run_inprocess(config, between(answer) if between else answer, resume=False)
    except RunError as error:
        if "diverged" not in str(error) and "finite" not in str(error):
            raise
        return None


def dealt_evenly(folder: Path, clients: int) -> Path:
    """Return the installation's text dealt out evenly over some silos."""
    path, partition = folder / f"iid-{clients}", f"iid:{clients}"
    return prepared(path, VOCABULARY, SEQUENCE_LENGTH, partition=partition)


def prepared(
    path: Path,
    vocabulary: int,
    sequence_length: int,
    *,
    partition: str = "by-source",
    deal: "Callable[[dict[str, list[Document]]], dict[str, list[Document]]] | None" = None,
) -> Path:
    """Return the installation's own text in the folder ``path``, prepared now if it is not there.

    Parameters
    ----------
    vocabulary
        Entries of the tokenizer.
    deal
        What to make of the documents by domain before they are partitioned; None: nothing.
    """
    from photon.data.embedded import embedded_documents
    from photon.data.prepare import prepare_documents
    from photon.data.prepared import is_prepared

    if not is_prepared(path):
        documents = embedded_documents()
        prepare_documents(
            deal(documents) if deal else documents,
            path,
            vocab_size=vocabulary,
            sequence_length=sequence_length,
            partition=partition,
            seed=0,
        )
    return path
