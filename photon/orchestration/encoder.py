"""Vectors of texts: hashed n-grams of characters, or a sentence encoder from a folder."""

import unicodedata
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from photon.errors import PhotonError, printable
from photon.orchestration.method import EncoderSection

Encode = Callable[[Sequence[str]], Tensor]
"""Makes vectors of texts: float32 of shape (n, d), in unit length."""

#: Characters of an n-gram.
_LENGTHS = (1, 2, 3, 4)
#: Where a text begins and ends.
_BEGIN, _END = "\x02", "\x03"
#: Characters of a text that are looked at, and tokens.
_MOST, _MOST_TOKENS = 20_000, 256


class NGrams:
    """Hashes the n-grams of a text's characters into a vector, each with a sign (feature hashing).

    The same everywhere and always: a checksum decides, and no random state.

    Parameters
    ----------
    size
        d, the numbers of a vector.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors: float32 of shape (n, d), in unit length."""
        made = torch.zeros((len(texts), self.size))
        for row, text in enumerate(texts):
            for gram, count in _grams(text).items():
                code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
                made[row, (code >> 1) % self.size] += count**0.5 * (1 if code & 1 else -1)
        # Of a text whose n-grams cancel out nothing is left; then one number stands for it.
        made[made.norm(dim=1) == 0, 0] = 1.0
        return torch.nn.functional.normalize(made, dim=1)


def _grams(text: str) -> dict[str, int]:
    plain = " ".join(unicodedata.normalize("NFKC", text[:_MOST]).casefold().split())
    framed = f"{_BEGIN}{plain}{_END}"
    counts: dict[str, int] = {}
    for length in _LENGTHS:
        for start in range(len(framed) - length + 1):
            gram = framed[start : start + length]
            if gram not in (_BEGIN, _END):
                counts[gram] = counts.get(gram, 0) + 1
    return counts


class Sentences:
    """A sentence encoder such as all-MiniLM-L6-v2: the mean of its last states, in unit length.

    Parameters
    ----------
    folder
        Its model and tokenizer in the form of transformers; nothing is downloaded.

    Raises
    ------
    PhotonError
        If it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        if not (folder / "config.json").is_file():
            raise PhotonError(f"encoder.folder={printable(folder)}: has no config.json, so it is no encoder")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
            self.size: int = self._model.config.hidden_size
        except Exception as error:  # transformers raises what it likes
            why = " ".join(str(error).split())[:300]
            raise PhotonError(f"encoder.folder={printable(folder)}: cannot be opened ({why})") from error

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors: float32 of shape (n, d), in unit length."""
        tokens = self._tokenizer(
            [text[:_MOST] for text in texts],
            padding=True,
            truncation=True,
            max_length=_MOST_TOKENS,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean.float(), dim=1)


def encoder_of(section: EncoderSection) -> NGrams | Sentences:
    """Return the encoder that settings name."""
    return NGrams(section.size) if section.folder is None else Sentences(Path(section.folder))
