"""Tokenizers: a byte-level BPE trained on the spot, or one that exists."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from photon.data.words import Words, fits
from photon.errors import PhotonError, printable

END_OF_TEXT = "<|endoftext|>"

# 256 bytes and the end of text: below that some text could not be written.
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 2**24

# Characters of a text that the tokenizer learns from at once: many short inputs train faster than few, and
# the time for one word grows with the square of its length.
_PIECE = 4096

# Tokenizers of transformers that know nothing of their own beside tokenizer.json.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class EosTokenizer:
    """A tokenizer together with its end-of-sequence token, which ends every document.

    Attributes
    ----------
    tokenizer
        Encodes text as text: special tokens that a document spells out are not special (a source file that
        mentions ``<|endoftext|>`` does not end there).
    eos_token, eos_token_id
        The end of a document.
    notes
        What was changed in a tokenizer that was given, a line each.
    """

    tokenizer: Tokenizer
    eos_token: str
    eos_token_id: int
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def special_tokens(self) -> list[str]:
        """Return the tokens that are no text."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode each text; no special tokens are added.

        Raises
        ------
        PhotonError
            If the tokenizer gives up at a text.
        """
        try:
            return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as error:  # tokenizers raises bare Exception
            raise PhotonError(
                f"the tokenizer cannot write this text ({printable(error)}): give one that knows every byte, "
                "or has a token for what it does not know; without --tokenizer one is trained"
            ) from None

    def encoder(self) -> Callable[[str], "array[int]"]:
        """Return what encodes texts one by one as `encode` does, and remembers words where it can."""
        if fits(self.tokenizer):
            return Words(lambda text: self.encode([text])[0]).encode
        return lambda text: array("I", self.encode([text])[0])

    def lost(self, text: str) -> tuple[float, str]:
        """Return the share of a text that does not come back when it is encoded and decoded, and what does.

        What comes back between white space at the ends is aligned with the text; the share is one minus twice
        the characters that agree, by those of both.
        """
        found = self.tokenizer.decode(self.encode([text])[0], skip_special_tokens=False)
        text, back = text.strip(), found.strip()
        if text == back:
            return 0.0, back
        return 1.0 - SequenceMatcher(None, text, back, autojunk=False).ratio(), back

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' ``AutoTokenizer``."""
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(), encoding="utf-8")
        config = {
            # From a bare tokenizer.json, AutoTokenizer makes a tokenizer whose eos_token is None.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos_token,
            "eos_token": self.eos_token,
            "unk_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> EosTokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` entries, ``<|endoftext|>`` with id 0 among them.

    The same texts give the same ``tokenizer.json``, byte for byte.

    Raises
    ------
    PhotonError
        If ``vocab_size`` has no room for the 256 bytes and the end of text.
    """
    check_vocab_size(vocab_size)
    tokenizer = _byte_level(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return _with_eos(tokenizer, END_OF_TEXT)


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that has no room for the 256 bytes and the end of text, or is absurdly large.

    Raises
    ------
    PhotonError
        If it is smaller than 257 or larger than 2^24.
    """
    if vocab_size > LARGEST_VOCABULARY:
        raise PhotonError(f"a vocabulary of {vocab_size} is too large: at most {LARGEST_VOCABULARY}")
    if vocab_size < SMALLEST_VOCABULARY:
        raise PhotonError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
            f"{SMALLEST_VOCABULARY}; set --vocab-size to that or more"
        )


def load_tokenizer(path: Path) -> EosTokenizer:
    """Load a ``tokenizer.json``, or a Hugging Face folder with one or with ``vocab.json`` and ``merges.txt``.

    The end of sequence is the one that the folder's ``tokenizer_config.json`` or ``special_tokens_map.json``
    names, or else ``<|endoftext|>``, which is added if the vocabulary lacks it. Dropout and the tokens
    that a template adds are taken out, as the ``notes`` say: what is trained, written and
    exported encodes a text in one way.

    Raises
    ------
    PhotonError
        If there is no such tokenizer, or it encodes "Hello world" to nothing.
    """
    shown = printable(path)
    if not path.exists():
        raise PhotonError(f"{shown} does not exist: --tokenizer takes a tokenizer.json or its folder")
    try:
        tokenizer = _read_tokenizer(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        notes = [*_without_chance(tokenizer), *_without_template(tokenizer)]
        _check_ids(tokenizer, shown)
        loaded = _with_eos(tokenizer, _declared_eos(path), notes)
        ids = loaded.encode(["Hello world"])[0]
    except PhotonError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise PhotonError(f"{shown} is not a tokenizer that can be used ({printable(error)})") from None
    if not ids:
        raise PhotonError(
            f'the tokenizer {shown} encodes "Hello world" to nothing: its files do not fit together'
        )
    if loaded.eos_token_id in loaded.encode([f"a{loaded.eos_token}b {loaded.eos_token} c"])[0]:
        # Of unigrams and whole words a special token is one like any other, and there is no second spelling.
        said = f"a text that spells {printable(loaded.eos_token)} ends there: the tokenizer writes it so"
        loaded = replace(loaded, notes=(*loaded.notes, said))
    return loaded


def _check_ids(tokenizer: Tokenizer, shown: str) -> None:
    """Check that each token has a number of its own, none so large that counts of tokens fill the memory."""
    numbers = tokenizer.get_vocab(with_added_tokens=True).values()
    if max(numbers, default=0) >= LARGEST_VOCABULARY:
        raise PhotonError(
            f"the tokenizer {shown} has a token of number {max(numbers)}: at most {LARGEST_VOCABULARY - 1}"
        )
    if len(set(numbers)) < len(numbers):
        raise PhotonError(f"the tokenizer {shown} gives two tokens one number: its files are damaged")


def _declared_eos(path: Path) -> str:
    eos_token = declared(path, "eos_token")
    if isinstance(eos_token, dict):
        eos_token = eos_token.get("content")
    if eos_token is None:
        return END_OF_TEXT
    if not isinstance(eos_token, str) or not eos_token:
        raise PhotonError(
            f"the eos_token of the tokenizer {printable(path)} is {printable(repr(eos_token)):.40}, no text: "
            "write one into its tokenizer_config.json"
        )
    return eos_token


def _read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer as transformers does, with ``add_prefix_space`` of its configuration."""
    folder = path if path.is_dir() else path.parent
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    prefix = declared(path, "add_prefix_space")
    if file.is_file():
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        byte_level = isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        if byte_level and prefix is not None and declared(path, "tokenizer_class") not in _PLAIN_CLASSES:
            tokenizer.pre_tokenizer.add_prefix_space = bool(prefix)
        return tokenizer
    mend = "write a tokenizer.json with transformers' tokenizer.save_pretrained"
    if not (vocab.is_file() and merges.is_file()):
        raise PhotonError(
            f"{printable(path)} holds neither tokenizer.json nor vocab.json with merges.txt: {mend}"
        )
    tokenizer = _byte_level(BPE.from_file(str(vocab), str(merges)), add_prefix_space=bool(prefix))
    missing = [sign for sign in pre_tokenizers.ByteLevel.alphabet() if tokenizer.token_to_id(sign) is None]
    if missing:
        raise PhotonError(
            f"{printable(vocab)} is no byte-level vocabulary as GPT-2's is ({len(missing)} of 256 bytes are "
            f"not in it): {mend}"
        )
    return tokenizer


def _without_chance(tokenizer: Tokenizer) -> Iterator[str]:
    """Let a text be encoded in one way (a file can ask for dropout alone); yield what was taken out."""
    model = tokenizer.model
    if isinstance(model, BPE) and model.dropout:
        yield f"the tokenizer's dropout of {model.dropout:g} was taken out: text is encoded in one way alone"
        model.dropout = None


def _without_template(tokenizer: Tokenizer) -> Iterator[str]:
    """Let nothing be added to a text; yield what was taken out."""
    if not any(tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)):
        return
    added = ", ".join(printable(token) for token in tokenizer.encode("").tokens)
    yield f"the tokenizer's template ({added or 'for pairs'}) was taken out: no text is trained with it"
    tokenizer.post_processor = None


def _byte_level(model: BPE, *, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_eos(tokenizer: Tokenizer, eos_token: str, notes: Iterable[str] = ()) -> EosTokenizer:
    # Also for a token that the vocabulary has: only a special one is left out when text is decoded.
    tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    eos_token_id = tokenizer.token_to_id(eos_token)
    assert eos_token_id is not None
    return EosTokenizer(tokenizer, eos_token, eos_token_id, tuple(notes))


def declared(path: Path, name: str) -> Any:
    """Return what the configuration beside a tokenizer says under a name, or None.

    Raises
    ------
    PhotonError
        If a file of it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            value = json.loads(file.read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise PhotonError(f"{printable(file)} cannot be read ({printable(error)})") from None
        if value is not None:
            return value
    return None


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at ends of lines into pieces; a line that is too long between words, or anywhere."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + _PIECE, start + 2 * _PIECE) + 1
            if not end and len(text) > start + 2 * _PIECE:
                space = text.rfind(" ", start + _PIECE, start + 2 * _PIECE)
                end = space if space > 0 else start + 2 * _PIECE
            yield text[start : end or len(text)]
            start = end or len(text)
