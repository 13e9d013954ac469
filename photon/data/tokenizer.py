"""Tokenizers: a byte-level BPE trained on the spot, or one that exists."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from photon.errors import PhotonError

END_OF_TEXT = "<|endoftext|>"

# 256 bytes and the end of text: below that some text could not be written.
SMALLEST_VOCABULARY = 257


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
    """

    tokenizer: Tokenizer
    eos_token: str
    eos_token_id: int

    @property
    def vocab_size(self) -> int:
        """Highest token id plus one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode each text; no special tokens are added."""
        return [found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

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
    """Refuse a vocabulary that has no room for the 256 bytes and the end of text.

    Raises
    ------
    PhotonError
        If it is smaller than 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise PhotonError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need "
            f"{SMALLEST_VOCABULARY}; set --vocab-size to that or more"
        )


def load_tokenizer(path: Path) -> EosTokenizer:
    """Load a ``tokenizer.json``, or a Hugging Face folder with one or with ``vocab.json`` and ``merges.txt``.

    The end of sequence is the one that the folder's ``tokenizer_config.json`` or ``special_tokens_map.json``
    names, or else ``<|endoftext|>``, which is added if the vocabulary lacks it.

    Raises
    ------
    PhotonError
        If there is no such tokenizer, or it encodes "Hello world" to nothing.
    """
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise PhotonError(f"{path} does not exist: --tokenizer takes a tokenizer.json or its folder")
    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    try:
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            tokenizer = _byte_level(BPE.from_file(str(vocab), str(merges)))
        else:
            raise PhotonError(
                f"{path} holds neither tokenizer.json nor vocab.json with merges.txt: "
                "write one with transformers' tokenizer.save_pretrained"
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        loaded = _with_eos(tokenizer, _declared_eos(folder) or END_OF_TEXT)
        ids = loaded.encode(["Hello world"])[0]
    except PhotonError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise PhotonError(f"{path} is not a tokenizer that can be used ({error})") from None
    if not ids:
        raise PhotonError(
            f'the tokenizer {path} encodes "Hello world" to nothing: its files do not fit together'
        )
    return loaded


def _byte_level(model: BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_eos(tokenizer: Tokenizer, eos_token: str) -> EosTokenizer:
    # Also for a token that the vocabulary has: only a special one is left out when text is decoded.
    tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    eos_token_id = tokenizer.token_to_id(eos_token)
    assert eos_token_id is not None
    return EosTokenizer(tokenizer, eos_token, eos_token_id)


def _declared_eos(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            value: Any = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise PhotonError(f"{folder / name} cannot be read ({error})") from None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at ends of lines into pieces of some kilobytes: many short inputs train faster than few."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.find("\n", start + 4096) + 1 or len(text)
            yield text[start:end]
            start = end
