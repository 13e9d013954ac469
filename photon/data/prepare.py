"""From documents to a folder of prepared data: deduplicate, partition, split, tokenize, pack, count."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from photon.data.alike import Comparison, Looks
from photon.data.documents import Document, Question, TextKind
from photon.data.partition import check_silo_name, parse_partition, partition_documents
from photon.data.prepared import (
    FORMAT,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    SiloEntry,
    SourceRead,
    Sources,
    SourceSkipped,
    SplitName,
    file_sha256,
    is_prepared,
    silo_file,
)
from photon.data.questions import check_apart
from photon.data.shards import encode, look_at
from photon.data.split import drop_exact_duplicates, split_documents
from photon.data.spool import Documents, Spool, disk_fault, joined, sizes_of, taken
from photon.data.text_files import read_documents, row_reader
from photon.data.text_lost import MOST_LOST, check_lost
from photon.data.tokenizer import EosTokenizer, check_vocab_size, load_tokenizer, train_tokenizer
from photon.data.write import (
    Place,
    Written,
    chat_encoder,
    classes_of,
    write_chats,
    write_labelled,
    write_text,
)
from photon.errors import PhotonError, printable
from photon.files.atomic import atomic_directory
from photon.files.processes import usable_cores

# Characters that the tokenizer learns from, shared equally by the silos so that a large one does not drown a
# small one.
TOKENIZER_SAMPLE = 20_000_000
# Tokens in a window at most, and the largest seed that fits in 64 bits with a sign.
LONGEST_WINDOW = 2**24
LARGEST_SEED = 2**63 - 1
MOST_WORKERS = 1024

#: A silo and a side of it.
_Side = tuple[str, SplitName]


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
        Tokens that a model is given at once. A window of running text has one more, which is told alone.
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
        whole, written by the tokenizer's chat template or a plain one; "pairs" of answers, as those; or
        "questions" of which some are to be forgotten, each in a window of its own; or "labelled" texts, of
        each of which the beginning goes into a window of its own.
    workers
        Processes that compare and encode running text; None: as many as there are cores. Their number
        changes nothing in what is written.

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
    workers: int | None = None

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
            kinds = ", ".join(get_args(TextKind))
            raise PhotonError(f"kind {self.kind!r} is not understood: use one of {kinds}")
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise PhotonError(f"workers {self.workers} is out of range: from 1 to {MOST_WORKERS}")


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
    workers: int | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
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
    label_field
        Field or column that holds the label of kind "labelled".

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
        "workers": workers,
    }
    Options(**options)
    for name in sources:
        check_silo_name(name)
    reader = row_reader(kind, text_field, parse_partition(partition).field or None, label_field)
    skipped: list[SourceSkipped] = []
    with Spool.beside(output) as spool:
        documents = {name: spool.documents() for name in sorted(sources)}
        with progress_bar(show=progress) as bar:
            task = bar.add_task("reading", total=sum(len(paths) for paths in sources.values()))
            for name, into in documents.items():
                for path in sources[name]:
                    left_out = read_documents(path, into, reader)
                    skipped += [SourceSkipped(name=name, file=s.file, reason=s.reason) for s in left_out]
                    if left_out and kind == "questions":
                        # What was asked to be forgotten would stay.
                        told = f"{printable(left_out[0].file)}: {left_out[0].reason}"
                        raise PhotonError(f"silo {name!r}: {told}; mend it, no question is left out")
                    bar.advance(task)
        return prepare_documents(
            documents, output, skipped=skipped, overwrite=overwrite, progress=progress, **options
        )


def prepare_documents(
    documents: Mapping[str, Sequence[Document]],
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
    workers: int | None = None,
    skipped: Sequence[SourceSkipped] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the folder of prepared data ``output``, whole or not at all.

    The same documents, options and versions of libraries give the same folder, byte for byte. Running text
    is kept on the disk beside ``output`` until the end; of conversations what is encoded is held in memory.

    Parameters
    ----------
    documents
        Documents by source: all in memory, or all in one spool. Their order matters only for which of two
        equal texts is kept.
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
        workers=workers,
    )
    try:
        with ExitStack() as stack:
            stored = [part for part in documents.values() if isinstance(part, Documents)]
            if len(stored) < len(documents):
                documents = _written_down(documents, stack.enter_context(Spool.beside(output)))
            kept, duplicates = _once(documents, options)
            _check_sources(kept, duplicates)
            silos = partition_documents(kept, parse_partition(partition), seed)
            bar = stack.enter_context(progress_bar(show=progress))
            split = _asked(silos) if kind == "questions" else _split(silos, options, bar)
            loaded = _make_tokenizer(split, options, bar)
            lost = check_lost(loaded, silos, tokenizer_loss)
            sources = _sources(kept, duplicates, skipped)
            folder = stack.enter_context(atomic_directory(output.resolve()))
            return _write(folder, split, loaded, lost, sources, options, bar)
    except OSError as error:
        raise disk_fault(output, error) from None


def _written_down(documents: Mapping[str, Sequence[Document]], spool: Spool) -> dict[str, Documents]:
    stored = {name: spool.documents() for name in documents}
    for name, into in stored.items():
        for document in documents[name]:
            into.append(document)
    return stored


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would replace something.

    Raises
    ------
    PhotonError
        If ``output`` is a file or a folder that is not empty, except for prepared data with ``overwrite``, or
        a link that leads to itself.
    """
    try:
        output.resolve()
    except RuntimeError:
        raise PhotonError(f"{printable(output)} is a link to itself: give another --output") from None
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


def _check_sources(documents: Mapping[str, Sequence[Document]], duplicates: dict[str, int]) -> None:
    if not documents:
        raise PhotonError("no silo was given: name one with --silo NAME=PATH")
    for name, kept in documents.items():
        check_silo_name(name)
        if not kept:
            reason = "repeats text of another silo" if duplicates[name] else "holds no documents"
            raise PhotonError(f"silo {name!r} {reason}: leave it out or give it text of its own")


def _sources(
    documents: Mapping[str, Sequence[Document]], duplicates: dict[str, int], skipped: Sequence[SourceSkipped]
) -> Sources:
    return Sources(
        read=[
            SourceRead(
                name=name, documents=len(kept), bytes=int(sizes_of(kept).sum()), duplicates=duplicates[name]
            )
            for name, kept in documents.items()
        ],
        skipped=list(skipped),
    )


def _once(
    documents: Mapping[str, Sequence[Document]], options: Options
) -> tuple[Mapping[str, Sequence[Document]], dict[str, int]]:
    """Return the documents without exact duplicates, and how many there were, by source."""
    if options.kind != "questions":
        return drop_exact_duplicates(documents)
    # Silos may well ask the same: what is summed is over the questions of each.
    check_apart(documents)
    each = {name: drop_exact_duplicates({name: of}) for name, of in documents.items()}
    kept = {name: found[name] for name, (found, _) in each.items()}
    return kept, {name: dropped[name] for name, (_, dropped) in each.items()}


def _asked(
    silos: dict[str, Sequence[Document]],
) -> dict[str, tuple[Sequence[Document], Sequence[Document]]]:
    """Return all questions of each silo, and beside them those whose answers are kept, which are measured."""
    split = {}
    for name, documents in silos.items():
        retained = [i for i, one in enumerate(documents) if isinstance(one, Question) and one.set == "retain"]
        if not retained:
            raise PhotonError(
                f"silo {name!r} has no question of the set retain: give it some whose answers are to stay, "
                "so that it can tell what becomes of them"
            )
        split[name] = documents, taken(documents, retained)
    return split


def _split(
    silos: dict[str, Sequence[Document]], options: Options, bar: Progress
) -> dict[str, tuple[Sequence[Document], Sequence[Document]]]:
    task = bar.add_task("comparing documents", total=sum(map(len, silos.values())))

    def look(documents: Sequence[Document], comparison: Comparison, seed: int) -> Sequence[Looks]:
        assert isinstance(documents, Documents)
        return look_at(
            documents,
            comparison,
            seed,
            workers=options.workers or usable_cores(),
            advance=lambda count: bar.advance(task, count),
        )

    # Eight bytes a token are more than any tokenizer here packs into one.
    smallest = 8 * options.sequence_length
    return split_documents(
        silos,
        options.validation_fraction,
        smallest,
        options.seed,
        comparison=options.near_duplicates,
        look=look,
    )


def _make_tokenizer(
    split: dict[str, tuple[Sequence[Document], Sequence[Document]]],
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


def _tokenizer_sample(
    split: dict[str, tuple[Sequence[Document], Sequence[Document]]], seed: int
) -> Iterator[str]:
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
    split: dict[str, tuple[Sequence[Document], Sequence[Document]]],
    tokenizer: EosTokenizer,
    lost: dict[str, float],
    sources: Sources,
    options: Options,
    bar: Progress,
) -> Manifest:
    tokenizer.save(folder / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    places = {
        (name, side): Place(folder, name, side, options.sequence_length, dtype, tokenizer.vocab_size)
        for name in split
        for side in SPLITS
    }
    documents = {
        (name, side): taken(sides[number], _order(len(sides[number]), options.seed, name, number))
        for name, sides in split.items()
        for number, side in enumerate(SPLITS)
    }
    task = bar.add_task("tokenizing documents", total=sum(map(len, documents.values())))

    def advance(count: int) -> None:
        bar.advance(task, count)

    classes: list[str] = []
    if options.kind == "labelled":
        classes = classes_of(documents.values())
        written = {
            side: write_labelled(place, documents[side], tokenizer, classes, advance)
            for side, place in places.items()
        }
    elif options.kind != "text":
        encoder = chat_encoder(folder, tokenizer, options.tokenizer, options.sequence_length)
        skipped = list(sources.skipped)
        written = {
            side: write_chats(place, documents[side], encoder, advance, skipped)
            for side, place in places.items()
        }
        sources = sources.model_copy(update={"skipped": skipped})
    else:
        written = _write_text(places, documents, tokenizer, dtype, options, advance)
    for name in split:
        np.save(silo_file(folder, name, "unigram"), written[name, "train"].counts, allow_pickle=False)
    manifest = _manifest(folder, written, tokenizer, lost, sources, options, dtype)
    if options.kind == "labelled" and not classes:
        manifest.notes.append("no text has a label: is --labelled the name of the field?")
    manifest = manifest.model_copy(update={"classes": classes})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_text(
    places: dict[_Side, Place],
    documents: dict[_Side, Sequence[Document]],
    tokenizer: EosTokenizer,
    dtype: np.dtype,
    options: Options,
    advance: Callable[[int], None],
) -> dict[_Side, Written]:
    # All at once, so that the processes are started once.
    together = joined(documents.values())
    assert isinstance(together, Documents)
    encoded = encode(together, tokenizer, dtype, workers=options.workers or usable_cores(), advance=advance)
    written: dict[_Side, Written] = {}
    first = 0
    for key, place in places.items():
        last = first + len(documents[key])
        written[key] = write_text(place, documents[key], encoded.tokens(first, last))
        first = last
    return written


def _manifest(
    folder: Path,
    written: dict[_Side, Written],
    tokenizer: EosTokenizer,
    lost: dict[str, float],
    sources: Sources,
    options: Options,
    dtype: np.dtype,
) -> Manifest:
    sides = {name: (written[name, "train"], written[name, "validation"]) for name, _ in written}
    union = np.sum([train.scored for train, _ in sides.values()], axis=0)
    silos = {
        name: SiloEntry(
            train=train.entry,
            validation=validation.entry,
            unigram_loss=unigram_loss(union, validation.scored),
            own_unigram_loss=unigram_loss(train.scored, validation.scored),
            text_lost=lost[name],
        )
        for name, (train, validation) in sides.items()
    }
    loss = unigram_loss(union, np.sum([validation.scored for _, validation in sides.values()], axis=0))
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
