"""From documents to a folder of prepared data: deduplicate, partition, split, tokenize, pack, count."""

import errno
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from photon.data.chat_windows import ChatEncoder, ChatWindows, encode_chats, pack
from photon.data.documents import Chat, Document, Pair, TextKind
from photon.data.pairs import FIELDS, EncodedPairs, PairWindows, encode_pairs, pack_pairs
from photon.data.partition import check_silo_name, parse_partition, partition_documents
from photon.data.prepared import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    ChatMarks,
    Manifest,
    SiloEntry,
    SourceRead,
    Sources,
    SourceSkipped,
    Split,
    SplitName,
    array_file,
    count_tokens,
    file_sha256,
    is_prepared,
    silo_file,
)
from photon.data.split import Comparison, drop_exact_duplicates, split_documents
from photon.data.template import ChatTemplate
from photon.data.text_files import read_documents
from photon.data.text_lost import MOST_LOST, check_lost
from photon.data.tokenizer import EosTokenizer, check_vocab_size, load_tokenizer, train_tokenizer
from photon.errors import PhotonError, printable
from photon.files.atomic import atomic_directory

# Characters that the tokenizer learns from, shared equally by the silos so that a large one does not drown a
# small one.
TOKENIZER_SAMPLE = 20_000_000
# Tokens in a window at most, and the largest seed that fits in 64 bits with a sign.
LONGEST_WINDOW = 2**24
LARGEST_SEED = 2**63 - 1
# Characters encoded at a time: bounds the memory of token lists, which take 30 times the text.
ENCODE_CHUNK = 1_000_000


@dataclass(frozen=True)
class Options:
    """How text is prepared.

    Attributes
    ----------
    partition
        ``by-source``, ``iid:N``, ``dirichlet:N:ALPHA``, or ``field:NAME`` for documents whose ``source`` is
        the field's value.
    vocab_size
        Entries of the tokenizer to train; a small corpus may give fewer. Unused with ``tokenizer``.
    tokenizer
        A ``tokenizer.json`` or a Hugging Face folder to take instead of training one.
    sequence_length
        Tokens in a window.
    validation_fraction
        Share of every silo's bytes that is held out, by whole documents; above 0, at most 0.5.
    seed
        Decides partition, split, order of documents and the sample that the tokenizer learns from.
    near_duplicates
        Which documents count as alike and are kept on one side of the split: alike in their "words", in words
        and "digits", or "none".
    tokenizer_loss
        Share of each silo's text that need not come back from the tokenizer, between 0 and 1.
    kind
        Running "text", which is cut into windows; conversations ("chat"), each of which goes into a window
        whole, written by the tokenizer's chat template or a plain one; or "pairs" of answers, as those.

    Raises
    ------
    PhotonError
        If one is out of its range.
    """

    partition: str
    vocab_size: int
    tokenizer: Path | None
    sequence_length: int
    validation_fraction: float
    seed: int
    near_duplicates: Comparison
    tokenizer_loss: float
    kind: TextKind = "text"

    def __post_init__(self) -> None:
        parse_partition(self.partition)
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        elif not self.tokenizer.exists():
            raise PhotonError(
                f"{printable(self.tokenizer)} does not exist: give a tokenizer.json or its folder"
            )
        if not 2 <= self.sequence_length <= LONGEST_WINDOW:
            raise PhotonError(
                f"sequence length {self.sequence_length} is out of range: from 2 to {LONGEST_WINDOW}"
            )
        if not 0 < self.validation_fraction <= 0.5:
            raise PhotonError(
                f"validation fraction {self.validation_fraction} is out of range: above 0, at most 0.5"
            )
        if not 0 <= self.seed <= LARGEST_SEED:
            what = "negative" if self.seed < 0 else "too large"
            raise PhotonError(f"seed {self.seed} is {what}: give 0 or more, at most {LARGEST_SEED}")
        if self.near_duplicates not in get_args(Comparison):
            raise PhotonError(
                f"near-duplicates {self.near_duplicates!r} is not understood: use words, digits or none"
            )
        if not 0 <= self.tokenizer_loss <= 1:
            raise PhotonError(f"tokenizer loss {self.tokenizer_loss} is out of range: a share from 0 to 1")
        if self.kind not in get_args(TextKind):
            raise PhotonError(f"kind {self.kind!r} is not understood: use text, chat or pairs")


def prepare(
    sources: dict[str, list[Path]],
    output: Path,
    *,
    partition: str = "by-source",
    vocab_size: int = 8192,
    tokenizer: Path | None = None,
    sequence_length: int = 128,
    validation_fraction: float = 0.05,
    seed: int = 0,
    near_duplicates: Comparison = "words",
    tokenizer_loss: float = MOST_LOST,
    kind: TextKind = "text",
    text_field: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Prepare local files: read them with ``read_documents``, then do as ``prepare_documents``.

    Parameters
    ----------
    sources
        Files and folders by the name of their source, which is the silo's for the partition "by-source".
    text_field
        Field or column of JSON and parquet files that holds the text, or the messages of a conversation;
        None: "text", or "messages".

    The others are those of `prepare_documents` and `Options`.

    Raises
    ------
    PhotonError
        As ``read_documents`` and ``prepare_documents``.
    """
    check_output(output, overwrite=overwrite)
    # Before the files are read, which may take minutes.
    options: dict[str, Any] = {
        "partition": partition,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "near_duplicates": near_duplicates,
        "tokenizer_loss": tokenizer_loss,
        "kind": kind,
    }
    Options(**options)
    for name in sources:
        check_silo_name(name)
    source_field = parse_partition(partition).field or None
    if kind == "pairs" and text_field is not None:
        raise PhotonError(f"--text-field: pairs have the fields {', '.join(FIELDS)}; leave it out")
    field = text_field or ("messages" if kind == "chat" else "text")
    documents: dict[str, list[Document]] = {}
    skipped: list[SourceSkipped] = []
    with progress_bar(show=progress) as bar:
        task = bar.add_task("reading", total=sum(len(paths) for paths in sources.values()))
        for name in sorted(sources):
            documents[name] = []
            for path in sources[name]:
                reading = read_documents(path, text_field=field, source_field=source_field, kind=kind)
                documents[name] += reading.documents
                skipped += [SourceSkipped(name=name, file=s.file, reason=s.reason) for s in reading.skipped]
                bar.advance(task)
    return prepare_documents(
        documents, output, skipped=skipped, overwrite=overwrite, progress=progress, **options
    )


def prepare_documents(
    documents: dict[str, list[Document]],
    output: Path,
    *,
    partition: str = "by-source",
    vocab_size: int = 8192,
    tokenizer: Path | None = None,
    sequence_length: int = 128,
    validation_fraction: float = 0.05,
    seed: int = 0,
    near_duplicates: Comparison = "words",
    tokenizer_loss: float = MOST_LOST,
    kind: TextKind = "text",
    skipped: Sequence[SourceSkipped] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the folder of prepared data ``output``, whole or not at all.

    The same documents, options and versions of libraries give the same folder, byte for byte. All text is
    held in memory.

    Parameters
    ----------
    documents
        Documents by source. Their order matters only for which of two equal texts is kept.
    output
        Folder to write; it must not exist or be empty.
    skipped
        What reading skipped, for the manifest.
    overwrite
        Replace ``output`` if it is a folder of prepared data.
    progress
        Show bars on standard error if that is a terminal.

    The others are those of `Options`.

    Returns
    -------
    Manifest
        As written to ``manifest.json``.

    Raises
    ------
    PhotonError
        If an option is out of its range, a silo is too small for one window of train and one of validation or
        cannot be split, the tokenizer loses too much of the text, or the disk is full.
    """
    check_output(output, overwrite=overwrite)
    options = Options(
        partition=partition,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        seed=seed,
        near_duplicates=near_duplicates,
        tokenizer_loss=tokenizer_loss,
        kind=kind,
    )
    documents, duplicates = drop_exact_duplicates(documents)
    _check_sources(documents, duplicates)
    silos = partition_documents(documents, parse_partition(partition), seed)
    with progress_bar(show=progress) as bar:
        split = _split(silos, options, bar)
        loaded = _make_tokenizer(split, options, bar)
        lost = check_lost(loaded, silos, tokenizer_loss)
        sources = _sources(documents, duplicates, skipped)
        try:
            with atomic_directory(output.resolve()) as folder:
                return _write(folder, split, loaded, lost, sources, options, bar)
        except OSError as error:
            mend = "free some space" if error.errno == errno.ENOSPC else "give another --output"
            raise PhotonError(
                f"{printable(output)} cannot be written ({error.strerror or error}): {mend}"
            ) from None


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would replace something.

    Raises
    ------
    PhotonError
        If ``output`` is a file or a folder that is not empty, except for prepared data with ``overwrite``.
    """
    if output.is_dir():
        if not any(output.iterdir()) or (overwrite and is_prepared(output)):
            return
        if is_prepared(output):
            raise PhotonError(
                f"{printable(output)} holds prepared data already: give --overwrite or another --output"
            )
        raise PhotonError(
            f"{printable(output)} is not empty and holds no prepared data: give another --output"
        )
    if output.exists():
        raise PhotonError(f"{printable(output)} is a file: give a folder as --output")


def _check_sources(documents: dict[str, list[Document]], duplicates: dict[str, int]) -> None:
    if not documents:
        raise PhotonError("no silo was given: name one with --silo NAME=PATH")
    for name, kept in documents.items():
        check_silo_name(name)
        if not kept:
            reason = "repeats text of another silo" if duplicates[name] else "holds no documents"
            raise PhotonError(f"silo {name!r} {reason}: leave it out or give it text of its own")


def _sources(
    documents: dict[str, list[Document]], duplicates: dict[str, int], skipped: Sequence[SourceSkipped]
) -> Sources:
    return Sources(
        read=[
            SourceRead(name=name, documents=len(kept), bytes=_size(kept), duplicates=duplicates[name])
            for name, kept in documents.items()
        ],
        skipped=list(skipped),
    )


def _split(
    silos: dict[str, list[Document]], options: Options, bar: Progress
) -> dict[str, tuple[list[Document], list[Document]]]:
    task = bar.add_task("comparing documents", total=sum(map(len, silos.values())))
    # Eight bytes a token are more than any tokenizer here packs into one.
    smallest = 8 * options.sequence_length
    return split_documents(
        silos,
        options.validation_fraction,
        smallest,
        options.seed,
        advance=lambda count: bar.advance(task, count),
        comparison=options.near_duplicates,
    )


def _make_tokenizer(
    split: dict[str, tuple[list[Document], list[Document]]],
    options: Options,
    bar: Progress,
) -> EosTokenizer:
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    task = bar.add_task("training the tokenizer", total=None)
    # Validation text is left out: a tokenizer that has seen it would flatter the perplexity.
    trained = train_tokenizer(_tokenizer_sample(split, options.seed), options.vocab_size)
    bar.update(task, total=1, completed=1)
    return trained


def _tokenizer_sample(split: dict[str, tuple[list[Document], list[Document]]], seed: int) -> Iterator[str]:
    for name, (train, _) in sorted(split.items()):
        budget = TOKENIZER_SAMPLE // len(split)
        for index in _order(len(train), seed, name, 2):
            text = train[index].text[:budget]
            yield text
            budget -= len(text)
            if budget <= 0:
                break


def _write(
    folder: Path,
    split: dict[str, tuple[list[Document], list[Document]]],
    tokenizer: EosTokenizer,
    lost: dict[str, float],
    sources: Sources,
    options: Options,
    bar: Progress,
) -> Manifest:
    tokenizer.save(folder / "tokenizer")
    vocab_size = tokenizer.vocab_size
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    encoder = None
    if options.kind != "text":
        template = ChatTemplate.of(options.tokenizer, tokenizer)
        template.save(folder / "tokenizer")
        encoder = ChatEncoder(tokenizer, template, options.sequence_length)
    task = bar.add_task("tokenizing documents", total=sum(len(t) + len(v) for t, v in split.values()))
    entries: dict[str, tuple[Split, Split]] = {}
    counts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    skipped = list(sources.skipped)

    def advance(count: int) -> None:
        bar.advance(task, count)

    for name, sides in split.items():
        written: list[_Written] = []
        for number, side in enumerate(SPLITS):
            documents = [sides[number][i] for i in _order(len(sides[number]), options.seed, name, number)]
            if encoder is None:
                done = _write_split(folder, name, side, documents, tokenizer, dtype, options, advance)
            else:
                done = _write_chats(folder, name, side, documents, encoder, dtype, advance, skipped)
            written.append(done)
        entries[name] = (written[0].entry, written[1].entry)
        scored = [one.windows[one.targets] if one.targets is not None else one.windows for one in written]
        counts[name] = (count_tokens(scored[0], vocab_size), count_tokens(scored[1], vocab_size))
        whole = counts[name][0] if encoder is None else count_tokens(written[0].windows, vocab_size)
        np.save(silo_file(folder, name, "unigram"), whole, allow_pickle=False)
    sources = sources.model_copy(update={"skipped": skipped})
    manifest = _manifest(folder, entries, counts, tokenizer, lost, sources, options, dtype)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


class _Written(NamedTuple):
    """A split that was written: its entry, its windows, and the tokens that are scored, if not all are."""

    entry: Split
    windows: np.ndarray
    targets: np.ndarray | None = None


def _write_split(
    folder: Path,
    silo: str,
    side: SplitName,
    documents: list[Document],
    tokenizer: EosTokenizer,
    dtype: np.dtype,
    options: Options,
    advance: Callable[[int], None],
) -> _Written:
    sequence_length = options.sequence_length
    ids = _encode(documents, tokenizer, dtype, advance)
    sequences = len(ids) // sequence_length
    if not sequences:
        raise PhotonError(
            f"silo {silo!r} has {len(ids)} {side} tokens, fewer than one window of {sequence_length}: give "
            "it more text, shorten --sequence-length, or change --validation-fraction"
        )
    windows = ids[: sequences * sequence_length].reshape(sequences, sequence_length)
    file = _save(folder, silo, side, "tokens", windows)
    return _Written(_entry(documents, windows, file), windows)


def _write_chats(
    folder: Path,
    silo: str,
    side: SplitName,
    documents: list[Document],
    encoder: ChatEncoder,
    dtype: np.dtype,
    advance: Callable[[int], None],
    skipped: list[SourceSkipped],
) -> _Written:
    """Write conversations, or pairs of them; what was left out of them is added to ``skipped``."""
    chats = [document for document in documents if isinstance(document, Chat)]
    pairs = [document for document in documents if isinstance(document, Pair)]
    what = "pair" if pairs else "conversation"
    read = encode_pairs(pairs, encoder, advance) if pairs else encode_chats(chats, encoder, advance)
    if not read.encoded:
        raise PhotonError(
            f"silo {silo!r} has no {side} {what} that can be used: {read.faults.worst()}; give it others, or "
            "a tokenizer with another chat template"
        )
    skipped += [SourceSkipped(name=silo, file=f"{side} {what}s", reason=why) for why in read.told()]
    end_of_text = encoder.tokenizer.eos_token_id
    packed: ChatWindows | PairWindows
    if isinstance(read, EncodedPairs):
        packed = pack_pairs(read.encoded, encoder.length, dtype, end_of_text)
    else:
        packed = pack(read.encoded, encoder.length, dtype, end_of_text)
    files = {name: _save(folder, silo, side, name, array) for name, array in packed._asdict().items()}
    marks = ChatMarks(
        targets=int(packed.targets.sum(dtype=np.int64)),
        shortened=read.shortened,
        sha256={name: file_sha256(file) for name, file in files.items() if name != "tokens"},
    )
    entry = _entry([(chats or pairs)[i] for i in read.used], packed.tokens, files["tokens"])
    return _Written(entry.model_copy(update={"chat": marks}), packed.tokens, packed.targets == 1)


def _save(folder: Path, silo: str, side: SplitName, name: str, array: np.ndarray) -> Path:
    file = array_file(folder, silo, side, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, array, allow_pickle=False)
    return file


def _entry(documents: Sequence[Document], windows: np.ndarray, file: Path) -> Split:
    return Split(
        documents=len(documents),
        bytes=_size(documents),
        tokens=windows.size,
        sequences=len(windows),
        sha256=file_sha256(file),
    )


def _encode(
    documents: list[Document], tokenizer: EosTokenizer, dtype: np.dtype, advance: Callable[[int], None]
) -> np.ndarray:
    """Encode the documents in their order, each followed by the end of sequence."""
    parts: list[np.ndarray] = []
    chunk: list[str] = []
    size = 0
    for index, document in enumerate(documents):
        chunk.append(document.text)
        size += len(document.text)
        if size >= ENCODE_CHUNK or index == len(documents) - 1:
            for ids in tokenizer.encode(chunk):
                ids.append(tokenizer.eos_token_id)
                parts.append(np.array(ids, dtype=dtype))
            advance(len(chunk))
            chunk, size = [], 0
    return np.concatenate(parts)


def _manifest(
    folder: Path,
    entries: dict[str, tuple[Split, Split]],
    counts: dict[str, tuple[np.ndarray, np.ndarray]],
    tokenizer: EosTokenizer,
    lost: dict[str, float],
    sources: Sources,
    options: Options,
    dtype: np.dtype,
) -> Manifest:
    union = np.sum([train for train, _ in counts.values()], axis=0)
    silos = {
        name: SiloEntry(
            train=entries[name][0],
            validation=entries[name][1],
            unigram_loss=unigram_loss(union, validation),
            own_unigram_loss=unigram_loss(train, validation),
            text_lost=lost[name],
        )
        for name, (train, validation) in counts.items()
    }
    loss = unigram_loss(union, np.sum([validation for _, validation in counts.values()], axis=0))
    return Manifest(
        format=FORMAT,
        kind=options.kind,
        sequence_length=options.sequence_length,
        vocab_size=tokenizer.vocab_size,
        dtype="uint16" if dtype == np.uint16 else "uint32",
        partition=options.partition,
        seed=options.seed,
        validation_fraction=options.validation_fraction,
        near_duplicates=options.near_duplicates,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_sha256=file_sha256(folder / "tokenizer" / "tokenizer.json"),
        unigram_loss=loss,
        unigram_perplexity=math.exp(loss),
        silos=silos,
        sources=sources,
        notes=list(tokenizer.notes),
    )


def unigram_loss(train: np.ndarray, validation: np.ndarray) -> float:
    """Return the cross-entropy, in nats per token, of tokens under an add-one-smoothed unigram model.

    Parameters
    ----------
    train
        Counts that the model is made from, (vocab_size,).
    validation
        Counts of the tokens to predict, (vocab_size,).
    """
    log_probability = np.log(train + 1.0) - math.log(float(train.sum()) + len(train))
    return float(-(validation * log_probability).sum() / validation.sum())


def _order(count: int, seed: int, silo: str, purpose: int) -> list[int]:
    """Shuffle: each silo and purpose has its own generator, so that no silo's order hangs on another's."""
    generator = np.random.default_rng([seed, zlib.crc32(silo.encode()), purpose])
    return [int(index) for index in generator.permutation(count)]


def _size(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def progress_bar(*, show: bool) -> Progress:
    """Return bars on standard error, silent where that is no terminal or nobody wants them."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (show and console.is_terminal),
    )
