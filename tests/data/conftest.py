"""A small vocabulary of nonsense, from which texts are made that do not resemble each other."""

import random
from collections.abc import Callable

import pytest

from photon.data.documents import Document


@pytest.fixture
def make_text() -> Callable[..., str]:
    """Return a maker of texts: the same seed gives the same text, two seeds give unrelated ones."""

    def make(seed: int, words: int = 120, alphabet: str = "abcdefghij") -> str:
        rng = random.Random(seed)
        vocabulary = ["".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(60)]
        lines = [" ".join(rng.choices(vocabulary, k=10)) for _ in range(words // 10)]
        return "\n".join(lines) + "\n"

    return make


@pytest.fixture
def corpus(make_text) -> dict[str, list[Document]]:
    """Return two sources of thirty documents each, from different letters."""
    return {
        "low": [Document(f"low:{i}", make_text(i)) for i in range(30)],
        "high": [Document(f"high:{i}", make_text(100 + i, alphabet="qrstuvwxyz")) for i in range(30)],
    }
