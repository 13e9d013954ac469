"""Byte-level BPE word by word: what a word becomes depends on nothing around it, so it is looked up once."""

import re
from array import array
from collections.abc import Callable, Iterator
from itertools import chain, groupby

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

# How GPT-2's expression cuts ASCII. Other letters and digits are for the library to tell: its Unicode tables
# are not Python's.
_WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    re.ASCII,
)
# Between a sign that is no white space and a space with a letter behind it a word always ends: only a word
# that begins there has the space in it.
_CUT = re.compile(r"(?<=[!-~])(?= [A-Za-z])")
# Words remembered, and the longest: more than a text of prose or code has. A word that is longer is rare.
_MOST, _LONGEST = 2**20, 64


def fits(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer cuts text as GPT-2's does, and encodes each word by itself."""
    cut = tokenizer.pre_tokenizer
    return (
        isinstance(tokenizer.model, BPE)
        and not tokenizer.model.dropout
        and isinstance(cut, pre_tokenizers.ByteLevel)
        and cut.use_regex
        and not cut.add_prefix_space
        and tokenizer.normalizer is None
        and tokenizer.truncation is None
        and tokenizer.padding is None
        # Others are found in the text before it is cut.
        and tokenizer.encode_special_tokens
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


class Words(dict[str, tuple[int, ...]]):
    """Token ids by word.

    Parameters
    ----------
    ids_of
        Encodes any text by a tokenizer that `fits`.
    """

    def __init__(self, ids_of: Callable[[str], list[int]]) -> None:
        self._ids = ids_of

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._ids(word))
        if len(word) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> "array[int]":
        """Return the token ids of a text, as the tokenizer gives them without special tokens."""
        return array("I", chain.from_iterable(self._parts(text)))

    def _parts(self, text: str) -> Iterator[Iterator[int] | list[int]]:
        if text.isascii():
            yield chain.from_iterable(map(self.__getitem__, _WORD.findall(text)))
            return
        for ascii_alone, pieces in groupby(_CUT.split(text), str.isascii):
            piece = "".join(pieces)
            yield from self._parts(piece) if ascii_alone else (self._ids(piece),)
