"""The text of one participant as methods and objectives see it: windows and counts, no path."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from photon.data.prepared import PreparedData, SplitName
from photon.data.tokenizer import EosTokenizer, load_tokenizer


class SiloData:
    """The text that one participant trains on: usually that of one silo.

    Parameters
    ----------
    prepared
        Prepared text in which it lies.
    members
        Silos whose text it is.
    """

    def __init__(self, prepared: PreparedData, members: Sequence[str]) -> None:
        self._prepared = prepared
        self.members = tuple(members)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer."""
        return self._prepared.manifest.vocab_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence: those that a model is given of a window of running text."""
        return self._prepared.manifest.sequence_length

    @cached_property
    def tokenizer(self) -> EosTokenizer:
        """The tokenizer that the text was written with."""
        return load_tokenizer(self._prepared.tokenizer_path)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that labels of the text are numbers of."""
        return tuple(self._prepared.manifest.classes)

    def windows(self, split: SplitName) -> list[np.ndarray]:
        """Return the memory-mapped windows of each member, (sequences, window)."""
        return [self._prepared.windows(member, split) for member in self.members]

    def arrays(self, split: SplitName) -> list[dict[str, np.ndarray]]:
        """Return all memory-mapped arrays of each member: name to (sequences, window)."""
        return [self._prepared.arrays(member, split) for member in self.members]

    def vocabulary(self) -> np.ndarray:
        """Return which tokens occur in the training text: bool, (vocab_size,)."""
        return self._prepared.vocabulary(self.members)

    def vocabulary_rows(self, rows: int) -> torch.Tensor:
        """Return which of so many rows of an embedding are of tokens in the training text: bool, (rows,).

        An embedding may have more rows than the tokenizer has tokens.
        """
        known = torch.zeros(rows, dtype=torch.bool)
        known[: self.vocab_size] = torch.from_numpy(self.vocabulary())
        return known

    def token_counts(self) -> np.ndarray:
        """Return how often each token occurs in the training text: int64, (vocab_size,)."""
        counts = [self._prepared.unigram(member) for member in self.members]
        return counts[0] if len(counts) == 1 else np.sum(counts, axis=0)
