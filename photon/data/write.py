"""What a preparation writes of a side of a silo: its windows, and what the manifest says of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from photon.data.chat_windows import ChatEncoder, ChatWindows, EncodedChats, encode_chats, pack
from photon.data.documents import Chat, Document, Labelled, Pair, Question
from photon.data.labelled import MOST_CLASSES, label_windows
from photon.data.pairs import EncodedPairs, PairWindows, encode_pairs, pack_pairs
from photon.data.prepared import (
    ChatMarks,
    LabelMarks,
    SourceSkipped,
    Split,
    SplitName,
    array_file,
    count_tokens,
    file_sha256,
)
from photon.data.questions import EncodedQuestions, QuestionWindows, encode_questions, pack_questions
from photon.data.spool import sizes_of
from photon.data.template import ChatTemplate
from photon.data.tokenizer import EosTokenizer
from photon.errors import PhotonError


class Written(NamedTuple):
    """A side of a silo that was written.

    Attributes
    ----------
    entry
        What the manifest says of it.
    counts
        How often each token of the vocabulary is in its windows, int64.
    scored
        The same of the tokens that are scored: those that are told, or what the assistant says.
    """

    entry: Split
    counts: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Place:
    """Where a side of a silo is written, and in what form.

    Attributes
    ----------
    folder
        Of the prepared data.
    silo, side
        Whose it is.
    length
        Tokens in a sequence.
    dtype
        Of a token.
    vocab_size
        Entries of the vocabulary.
    """

    folder: Path
    silo: str
    side: SplitName
    length: int
    dtype: np.dtype
    vocab_size: int

    def file(self, array: str) -> Path:
        """Return the file of an array; its folder is there."""
        file = array_file(self.folder, self.silo, self.side, array)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def write_text(place: Place, documents: Sequence[Document], tokens: Iterable[np.ndarray]) -> Written:
    """Cut the tokens of documents into windows, and write them; what is too short for one is left out.

    A window's last token is the first of the next one, so that all but the very first are told once.

    Parameters
    ----------
    documents
        The documents, for their number and sizes.
    tokens
        Their tokens, some at a time.

    Raises
    ------
    PhotonError
        If there is not one window.
    """
    length, window = place.length, place.length + 1
    counts, scored = (np.zeros(place.vocab_size, dtype=np.int64) for _ in range(2))
    file = place.file("tokens")
    windows, found = 0, 0
    rest = np.empty(0, dtype=place.dtype)
    with open(file, "wb") as stream:
        _header(stream, place, 0)
        for block in tokens:
            found += len(block)
            rest = np.concatenate([rest, block])
            if len(rest) < window:
                continue
            cut = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(rest, window)[::length])
            rest = rest[len(cut) * length :]
            windows += len(cut)
            counts += np.bincount(cut.reshape(-1), minlength=place.vocab_size)
            scored += np.bincount(cut[:, 1:].reshape(-1), minlength=place.vocab_size)
            stream.write(cut.data)
        stream.seek(0)
        _header(stream, place, windows)
    if not windows:
        raise PhotonError(
            f"silo {place.silo!r} has {found} {place.side} tokens, fewer than one window of {window}: "
            "give it more text, shorten --sequence-length, or change --validation-fraction"
        )
    return Written(_entry(documents, windows, windows * length, file), counts, scored)


def _header(stream: BinaryIO, place: Place, windows: int) -> None:
    # numpy leaves room for the number of windows to grow, so that the last header is as long as the first.
    np.lib.format.write_array_header_1_0(
        stream,
        {
            "descr": np.lib.format.dtype_to_descr(place.dtype),
            "fortran_order": False,
            "shape": (windows, place.length + 1),
        },
    )


def chat_encoder(folder: Path, tokenizer: EosTokenizer, given: Path | None, length: int) -> ChatEncoder:
    """Write the chat template beside the tokenizer in ``folder``, and return what encodes by it.

    Parameters
    ----------
    given
        The tokenizer as the user named it, whose template it is; None: a plain one.
    length
        Tokens in a window.
    """
    template = ChatTemplate.of(given, tokenizer)
    template.save(folder / "tokenizer")
    return ChatEncoder(tokenizer, template, length)


def write_chats(
    place: Place,
    documents: Sequence[Document],
    encoder: ChatEncoder,
    advance: Callable[[int], None],
    skipped: list[SourceSkipped],
) -> Written:
    """Write conversations, pairs of them, or questions; what was left out of them is added to ``skipped``.

    Raises
    ------
    PhotonError
        If none can be used.
    """
    chats = [document for document in documents if isinstance(document, Chat)]
    pairs = [document for document in documents if isinstance(document, Pair)]
    questions = [document for document in documents if isinstance(document, Question)]
    read: EncodedChats | EncodedPairs | EncodedQuestions
    if questions:
        read = encode_questions(questions, encoder, advance)
    else:
        read = encode_pairs(pairs, encoder, advance) if pairs else encode_chats(chats, encoder, advance)
    if not read.encoded:
        raise PhotonError(
            f"silo {place.silo!r} has no {place.side} {read.called.removesuffix('s')} that can be used: "
            f"{read.faults.worst()}; give it others, or a tokenizer with another chat template"
        )
    told = f"{place.side} {read.called}"
    skipped += [SourceSkipped(name=place.silo, file=told, reason=why) for why in read.told()]
    end_of_text = encoder.tokenizer.eos_token_id
    packed: ChatWindows | PairWindows | QuestionWindows
    if isinstance(read, EncodedPairs):
        packed = pack_pairs(read.encoded, encoder.length, place.dtype, end_of_text)
    elif isinstance(read, EncodedQuestions):
        packed = pack_questions(read.encoded, encoder.length, place.dtype, end_of_text)
    else:
        packed = pack(read.encoded, encoder.length, place.dtype, end_of_text)
    files = {name: place.file(name) for name in packed._fields}
    for name, array in packed._asdict().items():
        np.save(files[name], array, allow_pickle=False)
    marks = ChatMarks(
        targets=int(packed.targets.sum(dtype=np.int64)),
        shortened=read.shortened,
        sha256={name: file_sha256(file) for name, file in files.items() if name != "tokens"},
    )
    used = [(chats or pairs or questions)[i] for i in read.used]
    entry = _entry(used, len(packed.tokens), packed.tokens.size, files["tokens"])
    return Written(
        entry.model_copy(update={"chat": marks}),
        count_tokens(packed.tokens, place.vocab_size),
        count_tokens(packed.tokens[packed.targets == 1], place.vocab_size),
    )


def classes_of(sides: Iterable[Sequence[Document]]) -> list[str]:
    """Return the names of the classes of documents, in the order of their numbers.

    Raises
    ------
    PhotonError
        If there are too many.
    """
    labels = {one.label for side in sides for one in side if isinstance(one, Labelled)} - {None}
    classes = sorted(label for label in labels if label is not None)
    if len(classes) > MOST_CLASSES:
        raise PhotonError(f"--labelled: {len(classes):,} classes, and {MOST_CLASSES:,} are the most")
    return classes


def write_labelled(
    place: Place,
    documents: Sequence[Document],
    tokenizer: EosTokenizer,
    classes: Sequence[str],
    advance: Callable[[int], None],
) -> Written:
    """Write texts with labels, one to a window.

    Parameters
    ----------
    classes
        Names of the classes, in the order of their numbers.
    """
    windows = label_windows(documents, tokenizer, classes, place.length, place.dtype, advance)
    files = {name: place.file(name) for name in windows._fields}
    for name, array in windows._asdict().items():
        np.save(files[name], array, allow_pickle=False)
    marks = LabelMarks(
        labelled=int((windows.labels >= 0).sum()),
        sha256={name: file_sha256(file) for name, file in files.items() if name != "tokens"},
    )
    entry = _entry(documents, len(windows.tokens), windows.tokens.size, files["tokens"])
    there = np.arange(place.length) < windows.lengths
    return Written(
        entry.model_copy(update={"labels": marks}),
        count_tokens(windows.tokens, place.vocab_size),
        count_tokens(windows.tokens[there], place.vocab_size),
    )


def _entry(documents: Sequence[Document], windows: int, tokens: int, file: Path) -> Split:
    return Split(
        documents=len(documents),
        bytes=int(sizes_of(documents).sum()),
        tokens=tokens,
        sequences=windows,
        sha256=file_sha256(file),
    )
