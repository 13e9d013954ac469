"""From documents to a folder of prepared data: deduplicate, partition, split, tokenize, pack, count."""

import errno
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from photon.data.documents import Document
from photon.data.partition import check_silo_name, parse_partition, partition_documents
from photon.data.prepared import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    SiloEntry,
    SourceRead,
    Sources,
    SourceSkipped,
    Split,
    count_tokens,
    file_sha256,
    is_prepared,
    silo_file,
)
from photon.data.split import Comparison, drop_exact_duplicates, split_documents
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
    text_field: str = "text",
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Prepare local files: read them with ``read_documents``, then do as ``prepare_documents``.

    Parameters
    ----------
    sources
        Files and folders by the name of their source, which is the silo's for the partition "by-source".
    text_field
        Field or column of JSON and parquet files that holds the text.

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
    }
    Options(**options)
    for name in sources:
        check_silo_name(name)
    source_field = parse_partition(partition).field or None
    documents: dict[str, list[Document]] = {}
    skipped: list[SourceSkipped] = []
    with progress_bar(show=progress) as bar:
        task = bar.add_task("reading", total=sum(len(paths) for paths in sources.values()))
        for name in sorted(sources):
            documents[name] = []
            for path in sources[name]:
                reading = read_documents(path, text_field=text_field, source_field=source_field)
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
    task = bar.add_task("tokenizing documents", total=sum(len(t) + len(v) for t, v in split.values()))
    entries: dict[str, tuple[Split, Split]] = {}
    counts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, sides in split.items():
        written = [
            _write_split(
                silo_file(folder, name, side),
                name,
                side,
                [documents[i] for i in _order(len(documents), options.seed, name, number)],
                tokenizer,
                dtype,
                options.sequence_length,
                lambda count: bar.advance(task, count),
            )
            for number, (side, documents) in enumerate(zip(("train", "validation"), sides, strict=True))
        ]
        entries[name] = (written[0][0], written[1][0])
        counts[name] = tuple(count_tokens(windows, vocab_size) for _, windows in written)  # type: ignore[assignment]
        np.save(silo_file(folder, name, "unigram"), counts[name][0], allow_pickle=False)
    manifest = _manifest(folder, entries, counts, tokenizer, lost, sources, options, dtype)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_split(
    file: Path,
    silo: str,
    side: str,
    documents: list[Document],
    tokenizer: EosTokenizer,
    dtype: np.dtype,
    sequence_length: int,
    advance: Callable[[int], None],
) -> tuple[Split, np.ndarray]:
    """Write one split; return its entry and the windows."""
    ids = _encode(documents, tokenizer, dtype, advance)
    sequences = len(ids) // sequence_length
    if not sequences:
        raise PhotonError(
            f"silo {silo!r} has {len(ids)} {side} tokens, fewer than one window of {sequence_length}: give "
            "it more text, shorten --sequence-length, or change --validation-fraction"
        )
    windows = ids[: sequences * sequence_length].reshape(sequences, sequence_length)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, windows, allow_pickle=False)
    entry = Split(
        documents=len(documents),
        bytes=_size(documents),
        tokens=windows.size,
        sequences=sequences,
        sha256=file_sha256(file),
    )
    return entry, windows


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


def _size(documents: list[Document]) -> int:
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
