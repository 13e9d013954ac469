"""How much of the text a tokenizer loses: what does not come back when it is encoded and decoded."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

from photon.data.documents import Document
from photon.data.tokenizer import EosTokenizer
from photon.errors import PhotonError

# A silo is judged by about PIECES pieces of PIECE characters, spread evenly over its text.
PIECES = 400
PIECE = 256

#: Share of a silo's text that a tokenizer may lose.
MOST_LOST = 0.01


def check_lost(
    tokenizer: EosTokenizer, silos: Mapping[str, Sequence[Document]], most: float = MOST_LOST
) -> dict[str, float]:
    """Return the share of each silo's text that the tokenizer loses, found on a sample.

    Parameters
    ----------
    tokenizer
        The tokenizer.
    silos
        Documents by silo, none empty.
    most
        Share that it may lose; 1 lets everything pass.

    Raises
    ------
    PhotonError
        If it gives up at the text, or loses more of one silo's.
    """
    shares: dict[str, float] = {}
    for silo, documents in silos.items():
        characters, lost, worst, example = 0, 0.0, 0.0, ""
        for piece in _sample(documents):
            share, back = tokenizer.lost(piece)
            characters += len(piece)
            lost += share * len(piece)
            if share > worst:
                worst, example = share, f"{piece[:40]!r} comes back as {back[:40]!r}"
        shares[silo] = lost / characters if characters else 0.0
        if shares[silo] > most:
            raise PhotonError(
                f"the tokenizer loses {shares[silo]:.1%} of the text of silo {silo!r} ({example}): give one "
                "that can write this text, or let `photon data prepare` train one; to go on with it, say how "
                f"much it may lose, --tokenizer-loss {min(1.0, ceil(shares[silo] * 100 + 1) / 100):g}"
            )
    return shares


def _sample(documents: Sequence[Document]) -> Iterator[str]:
    """Yield pieces of texts, without white space at their ends."""
    each = ceil(PIECES / len(documents))
    for document in documents[:: max(1, len(documents) // PIECES)]:
        text = document.text
        step = max(PIECE, len(text) // each)
        for start in range(0, len(text), step):
            piece = text[start : start + PIECE].strip()
            if piece:
                yield piece
