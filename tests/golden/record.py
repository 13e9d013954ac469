"""Record runs: let `drive.py` do them with a checkout's code, and read what they leave."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.golden.names import as_known
from tests.golden.reading import Record, read_corpus, read_run
from tests.golden.table import CORPUS, Table, jobs

DRIVE = Path(__file__).with_name("drive.py")
#: The checkout that this file is in.
PRESENT = Path(__file__).parents[2]


@dataclass
class Recording:
    """What the runs of one checkout gave.

    Attributes
    ----------
    machine
        What the bits depend on beside the code; see `drive.machine`.
    records
        Run to its record.
    failed
        Run to what went wrong.
    seconds
        Run to its processor time.
    """

    machine: str
    records: dict[str, Record] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.__dict__, indent=1))


class Recorder:
    """A process that does runs with the code of one checkout; it begins at once.

    Parameters
    ----------
    checkout
        Folder of the code.
    table, names
        The table, and which runs of it.
    folder
        An empty folder for what the runs write.
    """

    def __init__(self, checkout: Path, table: Table, names: Sequence[str], folder: Path) -> None:
        self._folder = folder
        self._checkout = checkout
        self._jobs = jobs(as_known(table, checkout), list(names), folder)
        (folder / "jobs.json").write_text(json.dumps(self._jobs, indent=1))
        environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "PHOTON_HOME": str(folder / "home"),
            # Where a sum is shared among threads, their number decides its bits.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            # A member's update_norm is summed over a set of names, in a request that hashes of text decide.
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with open(folder / "drive.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(DRIVE), str(folder / "jobs.json"), str(folder / "result.json")],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()

    def finish(self) -> Recording:
        """Wait for the runs, and read them.

        Raises
        ------
        RuntimeError
            If the process could not do any.
        """
        if self._process.wait() != 0:
            said = (self._folder / "drive.log").read_text().strip().splitlines()[-5:]
            raise RuntimeError(f"{self._checkout}: the runs could not be done: {' | '.join(said)}")
        result = json.loads((self._folder / "result.json").read_text())
        recording = Recording(result["machine"], failed=result["failed"], seconds=result["seconds"])
        for job in self._jobs:
            name = job["name"]
            if name not in recording.failed:
                read = read_corpus if name.startswith(CORPUS) else read_run
                recording.records[name] = read(Path(job["folder"]))
        return recording


def record(checkouts: Sequence[Path], table: Table, names: Sequence[str]) -> list[Recording]:
    """Record the runs of several checkouts side by side, in folders that are removed afterwards."""
    # A short path: silo workers listen at sockets in their state folders, whose paths must not be long.
    with tempfile.TemporaryDirectory(prefix="golden-", ignore_cleanup_errors=True) as folder:
        recorders = []
        try:
            for number, checkout in enumerate(checkouts):
                own = Path(folder) / str(number)
                own.mkdir()
                recorders.append(Recorder(checkout, table, names, own))
            return [recorder.finish() for recorder in recorders]
        finally:
            for recorder in recorders:
                recorder.__exit__()
