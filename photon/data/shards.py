"""Work on the documents of a spool in several processes at once, each on a run of documents of its own.

What a process finds out goes to files, and depends on the documents alone: the result is the same for any
number of processes. Few documents are worked on in the process that asks.

    python -m photon.data.shards FOLDER     # a job from standard input, documents done to standard output
"""

import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter
from tokenizers import Tokenizer

from photon.code import command, environment
from photon.data.alike import Comparison, Looks, look
from photon.data.spool import Documents, Texts, disk_fault
from photon.data.tokenizer import EosTokenizer
from photon.errors import PhotonError
from photon.files.processes import end_with_parent

# Bytes of text for which another process is worth its start.
ENOUGH = 4_000_000
# Documents between two words about how far a process is.
_STEP = 64

Advance = Callable[[int], None]


class _Job(BaseModel):
    """Work on some documents of a spool; ``name`` is how its files begin."""

    name: str

    def texts(self, folder: Path) -> Iterator[str]:
        """Yield the texts."""
        texts = Texts.open(folder)
        for number in self.numbers(folder):
            yield texts[number]

    def numbers(self, folder: Path) -> np.ndarray:
        """Return the numbers of the documents, int64."""
        return np.load(folder / f"{self.name}-numbers.npy")


class LookJob(_Job):
    """Look at documents, to tell which are alike."""

    task: Literal["look"] = "look"
    comparison: Comparison
    seed: int

    def run(self, folder: Path, advance: Advance) -> None:
        """Do it, in the folder of the spool."""
        count = len(self.numbers(folder))
        look(self.texts(folder), count, self.comparison, self.seed, advance).save(folder, self.name)


class EncodeJob(_Job):
    """Encode documents, each with the end of text behind it: their tokens, and how many each has."""

    task: Literal["encode"] = "encode"
    eos_token: str
    eos_token_id: int
    dtype: Literal["uint16", "uint32"]

    def run(self, folder: Path, advance: Advance) -> None:
        """Do it, in the folder of the spool."""
        tokenizer = Tokenizer.from_str((folder / _TOKENIZER).read_text(encoding="utf-8"))
        tokenizer.encode_special_tokens = True
        ids_of = EosTokenizer(tokenizer, self.eos_token, self.eos_token_id).encoder()
        counts = array("q")
        with open(folder / f"{self.name}-tokens.bin", "wb") as file:
            for text in self.texts(folder):
                ids = ids_of(text)
                ids.append(self.eos_token_id)
                counts.append(len(ids))
                file.write(np.frombuffer(ids, dtype=np.uint32).astype(self.dtype).data)
                advance(1)
        np.save(folder / f"{self.name}-counts.npy", np.array(counts, dtype=np.int64))


_TOKENIZER = "tokenizer.json"
_JOB: TypeAdapter[LookJob | EncodeJob] = TypeAdapter(
    Annotated[LookJob | EncodeJob, Field(discriminator="task")]
)


def look_at(
    documents: Documents, comparison: Comparison, seed: int, *, workers: int, advance: Advance
) -> list[Looks]:
    """Look at documents, to tell which are alike; the results are of some documents, then of the next."""
    folder = documents.spool.folder
    names = _shared_out(documents, "look", workers)
    jobs = [LookJob(name=name, comparison=comparison, seed=seed) for name in names]
    _work(folder, jobs, advance)
    return [Looks.load(folder, job.name) for job in jobs]


def encode(
    documents: Documents, tokenizer: EosTokenizer, dtype: np.dtype, *, workers: int, advance: Advance
) -> "Encoded":
    """Encode documents in their order, each with the end of text behind it.

    Raises
    ------
    PhotonError
        If the tokenizer gives up at a text.
    """
    folder = documents.spool.folder
    (folder / _TOKENIZER).write_text(tokenizer.tokenizer.to_str(), encoding="utf-8")
    jobs = [
        EncodeJob(
            name=name,
            eos_token=tokenizer.eos_token,
            eos_token_id=tokenizer.eos_token_id,
            dtype="uint16" if dtype == np.uint16 else "uint32",
        )
        for name in _shared_out(documents, "encode", workers)
    ]
    _work(folder, jobs, advance)
    counts = [np.load(folder / f"{job.name}-counts.npy") for job in jobs]
    return Encoded([folder / f"{job.name}-tokens.bin" for job in jobs], dtype, np.concatenate(counts))


class Encoded:
    """Tokens of documents, one after the other in files.

    Parameters
    ----------
    files
        Tokens of some documents, then of the next.
    dtype
        Of a token.
    counts
        Tokens of each document, int64.
    """

    def __init__(self, files: Sequence[Path], dtype: np.dtype, counts: np.ndarray) -> None:
        self._files = files
        self._dtype = dtype
        self._ends = np.concatenate([[0], np.cumsum(counts)])

    def tokens(self, first: int, last: int, block: int = 2**20) -> Iterator[np.ndarray]:
        """Yield the tokens of the documents from ``first`` up to, and without, ``last``, some at a time."""
        place, end = int(self._ends[first]), int(self._ends[last])
        start = 0
        for file in self._files:
            size = file.stat().st_size // self._dtype.itemsize
            while start <= place < min(end, start + size):
                wanted = min(block, min(end, start + size) - place)
                offset = (place - start) * self._dtype.itemsize
                yield np.fromfile(file, dtype=self._dtype, count=wanted, offset=offset)
                place += wanted
            start += size


def _shared_out(documents: Documents, what: str, workers: int) -> list[str]:
    """Share documents out, about equally by their bytes; return the names of the parts."""
    ends = np.cumsum(documents.sizes())
    total = int(ends[-1]) if len(ends) else 0
    parts = max(1, min(workers, total // ENOUGH))
    cuts = np.searchsorted(ends, [total * part / parts for part in range(1, parts)])
    documents.spool.seal()
    names = []
    for number, part in enumerate(np.split(np.asarray(documents.numbers, dtype=np.int64), cuts)):
        names.append(f"{what}-{number}")
        np.save(documents.spool.folder / f"{names[-1]}-numbers.npy", part)
    return names


def _work(folder: Path, jobs: Sequence[LookJob | EncodeJob], advance: Advance) -> None:
    if len(jobs) == 1:
        jobs[0].run(folder, advance)
        return
    processes: list[subprocess.Popen[str]] = []
    try:
        for job in jobs:
            processes.append(_started(folder, job))
        with ThreadPoolExecutor(len(processes)) as pool:
            said = list(pool.map(lambda process: _follow(process, processes, advance), processes))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    # Those that were ended because another one gave up have said nothing.
    if faults := sorted(fault for fault in said if fault is not None):
        raise PhotonError(faults[-1] or "a process that prepares data has died; is there enough memory?")


def _started(folder: Path, job: LookJob | EncodeJob) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [*command("photon.data.shards"), str(folder)],
        # Each has a core; the library's own threads would only be in each other's way.
        env={**environment(), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(job.model_dump_json() + "\n")
    process.stdin.flush()
    return process


def _follow(
    process: "subprocess.Popen[str]", others: Sequence["subprocess.Popen[str]"], advance: Advance
) -> str | None:
    """Follow a process to its end; return None, or what it said when it gave up, perhaps nothing."""
    assert process.stdout is not None
    fault = ""
    for line in process.stdout:
        if line.strip().isdigit():
            advance(int(line))
        else:
            fault = line.strip()
    if process.wait() == 0:
        return None
    # What the others would find is not needed.
    for other in others:
        other.kill()
    return fault


def main() -> int:
    """Do a job; end when the process that gave it is gone."""
    # The process that gave it hears of an interrupt, and ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = _JOB.validate_json(sys.stdin.readline())
    end_with_parent()
    waiting = 0

    def advance(count: int) -> None:
        nonlocal waiting
        waiting += count
        if waiting >= _STEP:
            _say(waiting)
            waiting = 0

    try:
        job.run(Path(sys.argv[1]), advance)
    except PhotonError as error:
        _say(error)
        return 1
    except OSError as error:
        _say(disk_fault(Path(sys.argv[1]).parent, error))
        return 1
    _say(waiting)
    return 0


def _say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
