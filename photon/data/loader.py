"""Windows in a seeded order, with one integer as the whole state."""

import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch


def stream_seed(seed: int, members: list[str]) -> int:
    """Return the seed of the order in which the text of ``members`` is read."""
    return (seed << 32) + zlib.crc32("+".join(members).encode())


class WindowStream:
    """Endless, seeded stream of windows, shuffled without replacement in every epoch.

    Parameters
    ----------
    windows
        Memory-mapped arrays of shape (n_i, window) and any integer dtype, seen as their
        concatenation in the order given.
    seed
        Decides every epoch's order: epoch e is ``numpy.random.default_rng([seed, e]).permutation(total)``.
    position
        Windows taken so far; a stream opened at the position of another continues it exactly.

    Attributes
    ----------
    position
        Windows taken so far, the only state; it may be set.

    Raises
    ------
    ValueError
        If there are no windows, if they differ in length, or if a number is negative.
    """

    def __init__(self, windows: Sequence[np.ndarray], seed: int, position: int = 0) -> None:
        # Views of the plain array type: numpy.memmap repeats its bookkeeping on every indexing.
        self._windows = [array.view(np.ndarray) for array in windows if len(array)]
        if not self._windows:
            raise ValueError("a window stream needs at least one window")
        if any(array.ndim != 2 or array.shape[1] != windows[0].shape[1] for array in self._windows):
            raise ValueError(f"windows of different shapes: {[array.shape for array in windows]}")
        if seed < 0 or position < 0:
            raise ValueError(f"seed {seed} and position {position} must not be negative")
        self.seed = seed
        self.position = position
        whole = np.issubdtype(self._windows[0].dtype, np.integer)
        self._dtype = np.dtype(np.int64) if whole else self._windows[0].dtype
        # _ends[i] is the index, in the concatenation, after the last window of array i.
        self._ends = list(accumulate(len(array) for array in self._windows))
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def total(self) -> int:
        """Windows in one epoch."""
        return self._ends[-1]

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self.position / self.total

    def next_batch(self, size: int) -> torch.Tensor:
        """Take the next ``size`` windows; a batch may reach into the next epoch.

        Returns
        -------
        torch.Tensor
            Shape (size, window); int64 for whole numbers, such as token ids, else of their dtype.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} windows: it must hold at least one")
        batch = torch.from_numpy(self._gather(self._indices(size)))
        self.position += size
        return batch

    def _indices(self, size: int) -> np.ndarray:
        parts = []
        position, wanted = self.position, size
        while wanted:
            epoch, start = divmod(position, self.total)
            part = self._permutation(epoch)[start : start + wanted]
            parts.append(part)
            position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.total))
        return self._order[1]

    def _gather(self, indices: np.ndarray) -> np.ndarray:
        if len(self._windows) == 1:
            return self._windows[0][indices].astype(self._dtype)
        batch = np.empty((len(indices), self._windows[0].shape[1]), dtype=self._dtype)
        # A row at a time beats grouping the rows by array for every batch that fits a local step.
        for row, index in enumerate(indices.tolist()):
            owner = bisect_right(self._ends, index)
            # Negative: counted from the end of its array, where _ends[owner] points.
            batch[row] = self._windows[owner][index - self._ends[owner]]
        return batch


class BatchStream:
    """Batches of arrays that go together: the same windows of each, in the order of a `WindowStream`.

    Parameters
    ----------
    arrays
        Name to what a `WindowStream` takes.
    seed, position
        As of a `WindowStream`.
    tokens
        Tokens that a window counts for; None: as many as it has.

    Attributes
    ----------
    tokens
        The same.
    """

    def __init__(
        self,
        arrays: Mapping[str, Sequence[np.ndarray]],
        seed: int,
        position: int = 0,
        *,
        tokens: int | None = None,
    ) -> None:
        self.tokens = next(iter(arrays.values()))[0].shape[1] if tokens is None else tokens
        self._streams = {name: WindowStream(windows, seed, position) for name, windows in arrays.items()}
        if len({stream.total for stream in self._streams.values()}) != 1:
            raise ValueError(f"arrays {', '.join(arrays)}: they must have the same number of windows")

    @property
    def position(self) -> int:
        """Windows taken so far."""
        return next(iter(self._streams.values())).position

    def next_batch(self, size: int) -> dict[str, torch.Tensor]:
        """Take the next ``size`` windows of each array: name to tensor of shape (size, …)."""
        return {name: stream.next_batch(size) for name, stream in self._streams.items()}
