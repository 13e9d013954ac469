"""What the scripts that train on text share: runs that are done once and kept, their text, their pages.

Every run is a whole federation in this process; the script on images shares all but that. Its result is a
line of a JSON Lines file, which lies beside the page that is made from it. A run that has a line is not done
again, so a script may be stopped at any time, and several processes may share the work.
"""

import argparse
import fcntl
import hashlib
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


def parsers(description: str | None, output: str) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of a script with the commands ``run`` and ``table``, and that of ``run``.

    Parameters
    ----------
    description
        The script's docstring.
    output
        The page that ``table`` writes if ``--output`` does not say. Results are beside it, as ``.jsonl``, if
        ``--results`` does not say.
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
        results = Path(output).with_suffix(".jsonl")
        command.add_argument("--results", type=Path, default=results, help="a line for each run")
    return made, run


class Runs:
    """Do what is missing in a file of results.

    Parameters
    ----------
    file
        JSON Lines, one line for each run; made if it is not there.
    minutes
        After so long no run begins.
    shown
        The figure of a result that is printed when it is there.
    """

    def __init__(self, file: Path, minutes: float, shown: str = "perplexity") -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._until = time.monotonic() + 60 * minutes
        self._shown = shown

    def once(self, name: str, train: Callable[[], dict[str, Any]]) -> None:
        """Keep what ``train`` returns, with the CPU time it took, under ``name``.

        Nothing is done if that is there, or if another process is at it.
        """
        if time.monotonic() > self._until:
            return
        with self._claim(name) as claimed:
            if not claimed or any(one["run"] == name for one in self.results()):
                return
            began = time.process_time()
            result = {"run": name, **train()}
            result["cpu_seconds"] = round(time.process_time() - began, 1)
            with self._file.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(result, ensure_ascii=False) + "\n")
        figure = f"{self._shown} {result[self._shown]}"
        print(f"{name}: {figure}, {result['cpu_seconds']:.0f} s of CPU", flush=True)

    def results(self) -> list[dict[str, Any]]:
        return load(self._file)

    @contextmanager
    def _claim(self, name: str) -> Iterator[bool]:
        """Say whether no other process is at this run; the system takes the claim back from one that ends."""
        key = hashlib.sha256(f"{self._file.resolve()} {name}".encode()).hexdigest()[:24]
        with (Path(tempfile.gettempdir()) / f"photon-run-{key}").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def load(file: Path) -> list[dict[str, Any]]:
    """Return all results of a file, by name."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=lambda one: one["run"])


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for ``federate``, which goes when the block ends."""
    with tempfile.TemporaryDirectory(prefix="photon-text-") as folder:
        yield Path(folder)


def federate(overrides: list[str], run_dir: Path) -> dict[str, Any] | None:
    """Run a federation of ``COMMON`` and these overrides; return its summary, or None if it diverged."""
    from photon.config.compose import compose
    from photon.engine.inprocess import run_inprocess
    from photon.errors import RunError
    from photon.federation.run import prepare_run
    from photon.node import answer

    config = prepare_run(compose([*COMMON, *overrides, f"run_dir={run_dir}"]))
    try:
        return run_inprocess(config, answer, resume=False)
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
