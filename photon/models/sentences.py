"""Sentence encoders, such as MiniLM, from folders of transformers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from photon.errors import PhotonError, printable
from photon.models.pretrained import first_line, quiet_transformers

#: Characters of a text that are looked at, and tokens; texts at a time.
_MOST, _MOST_TOKENS, _TOGETHER = 20_000, 256, 32


class Sentences:
    """A sentence encoder: the mean of a model's last states over a text's tokens, in unit length.

    Parameters
    ----------
    folder
        Model and tokenizer in the form of transformers; nothing is downloaded, and none of its code runs.
    option
        What the user has named the folder with, for errors.

    Raises
    ------
    PhotonError
        If the folder holds none.
    """

    def __init__(self, folder: Path, option: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        named = f"{option}={printable(folder)}"
        if not (folder / "config.json").is_file():
            raise PhotonError(f"{named}: has no config.json; {option} takes a folder of transformers")
        here = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet_transformers():
                self._tokenizer = AutoTokenizer.from_pretrained(folder, **here)
                self._model = AutoModel.from_pretrained(folder, use_safetensors=True, **here).eval()
        except Exception as error:  # what broken files raise depends on what is broken
            raise PhotonError(f"{named}: cannot be opened, it is no encoder ({first_line(error)})") from error
        if self._tokenizer.pad_token is None:
            raise PhotonError(f"{named}: is no encoder of sentences (its tokenizer has no padding)")
        self.size: int = self._model.config.hidden_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the vectors: float32 of shape (texts, size), in unit length."""
        found = [self._encoded(texts[at : at + _TOGETHER]) for at in range(0, len(texts), _TOGETHER)]
        return torch.cat(found) if found else torch.zeros((0, self.size))

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        # An empty text may have no token of its own to be the mean of.
        some = [text[:_MOST].strip() or "." for text in texts]
        tokens = self._tokenizer(
            some, padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            states = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(means.float(), dim=1)
