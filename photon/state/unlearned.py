"""What was taken out of a model: who asked for it, what was changed, and figures before and after."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from photon.errors import PhotonError
from photon.files.atomic import write_text

#: The file of an exported model that says what was taken out of it.
NAME = "unlearned.json"
#: Most characters of a text in it, such as who asks.
LONGEST = 400
_Text = Annotated[str, Field(max_length=LONGEST)]
# Of each set of questions, and of each silo's text.
_Figures = Annotated[dict[str, float], Field(max_length=100_000)]


class Changed(BaseModel):
    """A matrix that was changed beside the first one.

    Attributes
    ----------
    weight, layer, ridge, coefficient, hash_before, hash_after
        As those of `Unlearned`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: _Text
    layer: int = Field(ge=0)
    ridge: float = Field(ge=0)
    coefficient: float
    hash_before: _Text
    hash_after: _Text


class Unlearned(BaseModel):
    """One request that something be forgotten, and what was done.

    Attributes
    ----------
    asked_by, reason
        Who asked, and why, in their own words.
    time
        Unix seconds at which the model was changed.
    weight
        Name of the parameter that was changed.
    layer, ridge, coefficient, positions
        How: the block, λ, c, and which tokens of a prompt were steered.
    prompts
        Of each set of questions how many there were.
    before, after
        Figures of the model, measured in the same way: `forget/rouge1` is one of a set of questions.
    hash_before, hash_after
        BLAKE3 of the changed parameter.
    solver
        What has found the change.
    also
        Matrices that were changed with it.
    questions
        Of each set of questions a BLAKE3, by which it is known again; the questions are not kept.
    attacks
        What was tried to bring back what was forgotten, and ROUGE-1 recall after it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    asked_by: _Text
    reason: _Text = ""
    time: float = Field(ge=0)
    weight: _Text
    layer: int = Field(ge=0)
    ridge: float = Field(ge=0)
    coefficient: float
    positions: _Text
    prompts: dict[str, int] = Field(max_length=10)
    before: _Figures
    after: _Figures
    hash_before: _Text
    hash_after: _Text
    solver: _Text = "closed"
    also: tuple[Changed, ...] = Field(default=(), max_length=1000)
    questions: dict[str, _Text] = Field(default={}, max_length=10)
    attacks: dict[str, float] = Field(default={}, max_length=100)


_LIST = TypeAdapter(list[Unlearned])


def write_unlearned(folder: Path, requests: Sequence[Unlearned]) -> None:
    """Write what was taken out of a model beside it, the oldest first; nothing if nothing was."""
    if requests:
        listed = [request.model_dump(mode="json") for request in requests]
        write_text(folder / NAME, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


def read_unlearned(folder: Path) -> list[Unlearned]:
    """Return what was taken out of an exported model, the oldest first.

    Raises
    ------
    PhotonError
        If the file cannot be read.
    """
    file = folder / NAME
    try:
        return _LIST.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise PhotonError(f"{file}: cannot be read ({first}); remove the file to go on without it") from error
