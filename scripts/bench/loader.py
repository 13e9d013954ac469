"""The loader: tokens per second out of a window stream over warm files, one thread.

    python scripts/bench/loader.py

The files are memory-mapped and in the page cache. Photon's stream draws the windows of every batch in a
seeded order, gathers them and widens them to int64. The baseline is what numpy needs for the gathering alone:
one fancy index with ready indices in one array, and the widening. One array and four arrays of very different
lengths (pooled silos) hold the same windows.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Report, at_least, interleave, parser

from photon.data.loader import WindowStream


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    report = Report(arguments)
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as folder:
        for length in arguments.sequence_length:
            count = arguments.tokens // length
            path = Path(folder) / f"{length}.npy"
            generator = np.random.default_rng(0)
            np.save(path, generator.integers(0, 8000, (count, length), dtype=np.dtype(arguments.dtype)))
            windows = np.load(path, mmap_mode="r")
            for batch in arguments.batch_size:
                compare_streams(report, windows, batch, arguments)
    report.close()


def compare_streams(report: Report, windows: np.ndarray, batch: int, arguments: argparse.Namespace) -> None:
    count, length = windows.shape
    batches = max(1, arguments.work // (batch * length))
    cuts = [0, count // 2, count // 2 + count // 4, count // 2 + count // 4 + count // 100, count]
    parts = [windows[begin:end] for begin, end in itertools.pairwise(cuts)]
    plain = windows.view(np.ndarray)
    request = np.random.default_rng(1).permutation(count)
    indices = [np.take(request, range(i * batch, (i + 1) * batch), mode="wrap") for i in range(batches)]

    def numpy_index() -> None:
        for chosen in indices:
            torch.from_numpy(plain[chosen].astype(np.int64))

    def stream_of(arrays: list[np.ndarray]) -> Callable[[], None]:
        stream = WindowStream(arrays, seed=0)

        def run() -> None:
            for _ in range(batches):
                stream.next_batch(batch)

        return run

    cases: dict[str, Callable[[], None]] = {
        "numpy fancy index": numpy_index,
        "Photon, one array": stream_of([windows]),
        "Photon, four arrays": stream_of(parts),
    }
    report.rates(
        f"{windows.dtype}, windows of {length}, batches of {batch} (goal: 50 million tokens / CPU second)",
        dict.fromkeys(cases, batches * batch * length / 1e6),
        "million tokens",
        interleave(cases, arguments.repeats),
        digits=0,
    )


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--sequence-length", type=int, nargs="+", default=[128, 2048])
    made.add_argument("--batch-size", type=int, nargs="+", default=[8, 64])
    made.add_argument("--dtype", choices=["uint16", "uint32"], default="uint16")
    made.add_argument("--tokens", type=int, default=64_000_000, help="tokens in the files")
    made.add_argument("--work", type=int, default=10_000_000, help="tokens taken in one timing")
    made.add_argument("--repeats", type=at_least(1), default=9)
    return made.parse_args()


if __name__ == "__main__":
    main()
