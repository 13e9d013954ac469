"""Restricted vocabularies (DEPT, 2410.05021): the rows of a model's token embedding that a silo trains.

A silo's vocabulary is the set of the tokens in its training text. Its softmax runs over these alone, and of
the parameters that have a row for each token it trains the rows of these alone. That is training with the
embedding cut to the vocabulary's rows, without a model of another shape.
"""

import base64
import binascii
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.link.bits import pack_bits, packed_bytes, unpack_bits


def token_parameters(model: ModelSection) -> tuple[str, ...]:
    """Return the names of the parameters with a row for each token: the embedding, and a head of its own.

    Raises
    ------
    PhotonError
        If the model has others in their places.
    """
    return _token_parameters(model.model_dump_json())


@lru_cache(maxsize=8)
def _token_parameters(model: str) -> tuple[str, ...]:
    from photon.models.build import build_model  # here: a configuration is checked without transformers

    # Names do not depend on how many tokens there are.
    built = build_model(ModelSection.model_validate_json(model), 1, seed=0, device="meta")
    layers = [built.get_input_embeddings(), built.get_output_embeddings()]
    found = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    named = {name: parameter for name, parameter in built.named_parameters() if id(parameter) in found}
    if None in layers or any(len(parameter) != built.config.vocab_size for parameter in named.values()):
        raise PhotonError(
            f"strategy.embeddings=restricted: {type(built).__name__} has no embedding and head of one row "
            "for each token; use strategy.embeddings=backbone"
        )
    return tuple(sorted(named))


def choose_rows(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return a tensor with the rows of ``one`` where ``rows`` is true, and those of ``other`` elsewhere.

    Parameters
    ----------
    rows
        bool, of shape (rows,).
    one, other
        Of the same shape (rows, …).
    """
    return torch.where(rows.view(-1, *[1] * (one.dim() - 1)), one, other)


def pack_vocabulary(vocabulary: Tensor) -> str:
    """Return a vocabulary as text: a bit for each row, in base64.

    Parameters
    ----------
    vocabulary
        bool, of shape (rows,).
    """
    return base64.b64encode(pack_bits(vocabulary, 1).numpy().tobytes()).decode()


def unpack_vocabulary(text: str, rows: int) -> Tensor:
    """Undo `pack_vocabulary`.

    Raises
    ------
    PhotonError
        If the text is not a vocabulary of so many rows, with at least one token.
    """
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PhotonError(f"its vocabulary cannot be read ({error})") from error
    if len(packed) != packed_bytes(rows, 1):
        raise PhotonError(f"its vocabulary has {len(packed)} bytes, {rows} rows need {packed_bytes(rows, 1)}")
    vocabulary = unpack_bits(torch.frombuffer(bytearray(packed), dtype=torch.uint8), 1, rows).bool()
    if not vocabulary.any():
        raise PhotonError("its vocabulary is empty")
    return vocabulary


def joined_vocabulary(one: str | None, other: str) -> str:
    """Return the union of two packed vocabularies of equally many rows; the first may be none yet."""
    if one is None:
        return other
    both = [np.frombuffer(base64.b64decode(text), dtype=np.uint8) for text in (one, other)]
    return base64.b64encode((both[0] | both[1]).tobytes()).decode()
