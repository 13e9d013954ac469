"""What the scripts that train on text share: runs that are done once and kept, their text, their pages.

Every run is a whole federation in this process; the script on images shares all but that. Its result is one
JSON file in a folder; a run that has one is not done again, so a script may be stopped at any time.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon.data.documents import Document

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


def parsers(
    description: str | None, folder: str, output: str
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of a script with the commands ``run`` and ``table``, and that of ``run``.

    Parameters
    ----------
    description
        The script's docstring.
    folder
        Where results are kept if ``--folder`` does not say.
    output
        The page that ``table`` writes if ``--output`` does not say.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do runs that are missing")
    run.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so long")
    table = commands.add_parser("table", help="write the page, and the plot if there is one")
    table.add_argument("--output", type=Path, default=Path(output))
    for command in (run, table):
        command.add_argument("--folder", type=Path, default=Path(folder), help="the results")
    return made, run


class Runs:
    """Do what is missing in a folder of results.

    Parameters
    ----------
    folder
        Made if it is not there.
    minutes
        After so long no run begins.
    shown
        The figure of a result that is printed when it is there.
    """

    def __init__(self, folder: Path, minutes: float, shown: str = "perplexity") -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._until = time.monotonic() + 60 * minutes
        self._shown = shown

    def once(self, name: str, train: Callable[[], dict[str, Any]]) -> None:
        """Keep what ``train`` returns, with the CPU time it took, under ``name``, unless that is there."""
        path = self._folder / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in name)}.json"
        if path.exists() or time.monotonic() > self._until:
            return
        began = time.process_time()
        result = train()
        result["cpu_seconds"] = time.process_time() - began
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(path)
        figure = f"{self._shown} {result[self._shown]}"
        print(f"{name}: {figure}, {result['cpu_seconds']:.0f} s of CPU", flush=True)

    def results(self) -> list[dict[str, Any]]:
        return load(self._folder)


def load(folder: Path) -> list[dict[str, Any]]:
    """Return all results of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for ``federate``, which goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="photon-text-") as folder:
        yield Path(folder)


def federate(overrides: list[str], run_dir: Path) -> dict[str, Any] | None:
    """Run a federation of ``COMMON`` and these overrides; return its summary, or None if it diverged."""
    from photon.config import compose
    from photon.errors import RunError
    from photon.federation.run import prepare_run, run_inprocess

    config = prepare_run(compose([*COMMON, *overrides, f"run_dir={run_dir}"]))
    try:
        return run_inprocess(config, resume=False)
    except RunError as error:
        if "diverged" not in str(error) and "finite" not in str(error):
            raise
        return None


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


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as SVG that is the same, byte for byte, whenever its content is."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "photon"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
