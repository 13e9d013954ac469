"""What prepared data holds: sizes, tokens, splits, sample windows, and how different the silos are."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from photon.data.prepared import PreparedData
from photon.errors import printable

# A matrix wider than this is unreadable on a terminal.
_MOST_COLUMNS = 12


def inspect(path: Path, *, samples: int = 1, verify: bool = False) -> Group:
    """Describe a folder of prepared data for a terminal.

    Parameters
    ----------
    path
        The folder.
    samples
        Train windows to show of each silo, spread evenly over it.
    verify
        Also read everything and check it, as ``PreparedData.verify`` does.

    Returns
    -------
    rich.console.Group
        Tables and panels to print.

    Raises
    ------
    PhotonError
        If the folder is not whole.
    """
    data = PreparedData.open(path)
    if verify:
        data.verify()
    parts: list[RenderableType] = [_summary(data, verify), _silo_table(data)]
    if len(data.silo_names) > 1:
        parts.extend(_divergence(data))
    parts.extend(_notes(data))
    if samples:
        parts.extend(_samples(data, samples))
    return Group(*parts)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jensen-Shannon divergence of two unigram distributions, in bits: 0 equal, 1 disjoint.

    Parameters
    ----------
    first, second
        Counts of each token, (vocab_size,), neither all zero.
    """
    p, q = first / first.sum(), second / second.sum()
    return _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2


def divergences(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the matrix of Jensen-Shannon divergences between counts, in bits, (n, n)."""
    matrix = np.zeros((len(counts), len(counts)))
    for row, first in enumerate(counts):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = jensen_shannon(first, counts[column])
    return matrix


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def _summary(data: PreparedData, verified: bool) -> Table:
    manifest = data.manifest
    silos = manifest.silos.values()
    train = sum(silo.train.tokens for silo in silos)
    validation = sum(silo.validation.tokens for silo in silos)
    table = Table.grid(padding=(0, 2))
    table.add_row("folder", Text(printable(data.path)))
    partition = printable(manifest.partition)
    table.add_row("silos", Text(f"{len(manifest.silos)} (partition {partition}, seed {manifest.seed})"))
    table.add_row("tokens", f"{train:,} train, {validation:,} validation")
    table.add_row("windows", f"{manifest.window} tokens each, {manifest.dtype}")
    table.add_row("vocabulary", f"{manifest.vocab_size:,} (end of sequence {manifest.eos_token_id})")
    table.add_row(
        "unigram model",
        f"{manifest.unigram_loss:.3f} nats per token, perplexity {manifest.unigram_perplexity:,.1f}",
    )
    if verified:
        table.add_row("verified", "hashes, token ids and counts agree with the manifest")
    return table


def _silo_table(data: PreparedData) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("silo")
    for heading in (
        "documents\ntrain+val.",
        "MB",
        "bytes per\ntoken",
        "train\ntokens",
        "validation\ntokens",
        "perplexity of\nunigrams,\nall / own",
    ):
        table.add_column(heading, justify="right")
    for name in data.silo_names:
        silo = data.manifest.silos[name]
        train, validation = silo.train, silo.validation
        size = train.bytes + validation.bytes
        table.add_row(
            name,
            f"{train.documents:,} + {validation.documents:,}",
            f"{size / 1e6:,.2f}",
            f"{size / (train.tokens + validation.tokens):.2f}",
            f"{train.tokens:,}",
            f"{validation.tokens:,}",
            f"{math.exp(silo.unigram_loss):,.0f} / {math.exp(silo.own_unigram_loss):,.0f}",
        )
    return table


def _divergence(data: PreparedData) -> list[RenderableType]:
    names = data.silo_names
    matrix = divergences([data.unigram(name) for name in names])
    title = "Jensen-Shannon divergence between the silos' unigrams, in bits (0 the same, 1 disjoint)"
    if len(names) > _MOST_COLUMNS:
        least, median, most = np.quantile(matrix[np.tril_indices(len(names), -1)], [0, 0.5, 1])
        return [Text(f"{title}: least {least:.3f}, median {median:.3f}, most {most:.3f}")]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    return [Text(title), table]


def _notes(data: PreparedData) -> list[RenderableType]:
    notes: list[RenderableType] = []
    duplicates = sum(source.duplicates for source in data.manifest.sources.read)
    if duplicates:
        notes.append(Text(f"{duplicates:,} exact duplicates were left out"))
    notes.extend(Text(printable(note)) for note in data.manifest.notes)
    for name, silo in data.manifest.silos.items():
        if silo.text_lost:
            notes.append(
                Text(f"{name}: {silo.text_lost:.2%} of a sample of the text is lost by the tokenizer")
            )
    skipped = data.manifest.sources.skipped
    if skipped:
        table = Table(title="Skipped", title_justify="left")
        for heading in ("source", "file", "why"):
            table.add_column(heading)
        for entry in skipped:
            table.add_row(*(Text(printable(said)) for said in (entry.name, entry.file, entry.reason)))
        notes.append(table)
    return notes


def _samples(data: PreparedData, samples: int) -> list[RenderableType]:
    from tokenizers import Tokenizer

    # By its text: the library takes no path that is not UTF-8.
    tokenizer = Tokenizer.from_str((data.tokenizer_path / "tokenizer.json").read_text(encoding="utf-8"))
    panels: list[RenderableType] = []
    for name in data.silo_names:
        windows = data.windows(name, "train")
        chosen = np.linspace(0, len(windows) - 1, min(samples, len(windows)), dtype=int)
        for index in chosen:
            text = tokenizer.decode(windows[index].tolist(), skip_special_tokens=False)
            panels.append(Panel(Text(text), title=f"{name}, train window {index:,}", title_align="left"))
    return panels
