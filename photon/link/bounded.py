"""Types of what comes from the other side: each has a range, so that nothing enormous or odd gets in."""

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from photon.config.tree import SILO_NAME

#: Largest whole number that is counted: windows, tokens, steps.
MAX_COUNT = 2**48
#: Largest magnitude of a figure, such as a norm or a learning rate; its square is still far from overflow.
MAX_FIGURE = 1e12
#: Largest validation loss, in nats: its perplexity is still a number.
MAX_LOSS = 700.0
#: Characters of a text for people.
MAX_TEXT = 400


def one_line(text: str, most: int = MAX_TEXT) -> str:
    """Return a text of the other side as one line that is safe to print, cut to ``most`` characters.

    Control characters, and those that turn the direction of writing or are not seen, become blanks.
    """
    # Cut first: nothing of what is left out is looked at.
    head = text[: 4 * most]
    seen = "".join(" " if unicodedata.category(each).startswith("C") else each for each in head)
    line = " ".join(seen.split())
    is_cut = len(line) > most or len(text) > len(head)
    return f"{line[: most - 2]} …" if is_cut else line


def as_figure(value: float) -> float | None:
    """Return a measured figure as it may be told; None if it is not finite, or beyond all bounds."""
    return value if abs(value) <= MAX_FIGURE else None


def as_loss(value: float) -> float:
    """Return a measured validation loss as it may be told: one beyond the bound, or no number, as the bound.

    So whoever looks at the models of a run sees that one of them is ruined.
    """
    return value if value <= MAX_LOSS else MAX_LOSS


def _printable(text: str) -> str:
    if one_line(text) != text:
        raise ValueError(f"is no line of at most {MAX_TEXT} printable characters")
    return text


#: It becomes the name of a folder, on the other side's word.
SiloName = Annotated[str, StringConstraints(pattern=SILO_NAME)]
#: It becomes the name of a file.
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
#: A line for people.
Line = Annotated[str, AfterValidator(_printable)]
#: The name of a figure, such as ``exp_avg_norm`` or ``activation_norm/h.0``.
FigureName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.+\-/ ]{1,200}$")]
#: How many there are of something.
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
#: How many there are, at least one.
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
#: A figure of either sign.
Figure = Annotated[float, Field(ge=-MAX_FIGURE, le=MAX_FIGURE, allow_inf_nan=False)]
#: A figure that is not negative.
Norm = Annotated[float, Field(ge=0, le=MAX_FIGURE, allow_inf_nan=False)]
#: Mean loss over predictions on validation text, in nats.
ValidationLoss = Annotated[float, Field(ge=0, le=MAX_LOSS, allow_inf_nan=False)]
#: Time that something has really taken, by a clock: speeds are computed from it.
Seconds = Annotated[float, Field(ge=1e-6, le=1e8, allow_inf_nan=False)]
