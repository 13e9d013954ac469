"""``photon data``: prepare text for training, and look at what was prepared."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from photon.errors import PhotonError

if TYPE_CHECKING:
    from collections.abc import Callable

    from photon.data.documents import Document, TextKind
    from photon.data.hub import HubText
    from photon.data.row_kinds import RowReader
    from photon.data.spool import Store

app = typer.Typer(
    name="data",
    help="Prepare text for training, and look at what was prepared.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_TEXT = "What is read"
_SHAPE = "What is written"
_HUB = "Corpora of the Hugging Face hub"

# What `prepare` can be told.
_Output = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; must not exist or be empty.")]
_Silo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="A silo and a file or folder of its text (.txt .md .jsonl .ndjson .json .csv .tsv .tar, also "
        ".gz or .zst; .parquet .arrow; folders of save_to_disk and of MDS). Repeat it for more silos; "
        "a repeated NAME adds to the same one.",
        rich_help_panel=_TEXT,
    ),
]
_Embedded = Annotated[
    bool,
    typer.Option(
        "--embedded",
        help="Use text that the installed packages bring: four silos, nothing is downloaded.",
        rich_help_panel=_TEXT,
    ),
]
_Kind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="`text`; `chat`: conversations, each a list of objects with `role` and `content` in a field of "
        "a row; `pairs`: fields `prompt`, `chosen` and `rejected`, each a text or such a "
        "list; `questions`: fields `question`, `answer` and `set` (forget, retain or reference).",
        rich_help_panel=_TEXT,
    ),
]
_Labelled = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD",
        help="Texts with labels, in this field of each row: a window for each text. Rows and files without "
        "it are texts that nobody has labelled.",
        rich_help_panel=_TEXT,
    ),
]
_TextField = Annotated[
    str | None,
    typer.Option(
        help="Field or column of a row that holds the text, or the conversation; `a.b` reaches inside. "
        "[default: text, or messages]",
        rich_help_panel=_TEXT,
    ),
]
_Partition = Annotated[
    str,
    typer.Option(
        metavar="PARTITION",
        help="`by-source`: a silo per NAME. `iid:N`: all documents shuffled over N silos. "
        "`dirichlet:N:ALPHA`: N silos, each with its own mixture of the NAMEs; the smaller ALPHA, the "
        "more they differ. `field:FIELD`: a silo per value of a field.",
        rich_help_panel=_SHAPE,
    ),
]
_VocabSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Entries of the byte-level BPE tokenizer to train. [default: 8192]",
        rich_help_panel=_SHAPE,
    ),
]
_Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE_OR_DIR",
        help="Take this tokenizer instead: a tokenizer.json or a Hugging Face folder (also GPT-2's "
        "vocab.json with merges.txt).",
        rich_help_panel=_SHAPE,
    ),
]
_SequenceLength = Annotated[
    int, typer.Option(metavar="N", help="Tokens that a model is given at once.", rich_help_panel=_SHAPE)
]
_ValidationFraction = Annotated[
    float,
    typer.Option(
        metavar="F",
        help="Share of every silo's text to hold out for validation, by whole documents.",
        rich_help_panel=_SHAPE,
    ),
]
_NearDuplicates = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="Which documents are too alike to lie on both sides of the split: alike in `words`, in words "
        "and `digits` (sums, logs), or `none`.",
        rich_help_panel=_SHAPE,
    ),
]
_TokenizerLoss = Annotated[
    float,
    typer.Option(
        metavar="F",
        help="Share of a silo's text that --tokenizer may lose: characters that do not come back.",
        rich_help_panel=_SHAPE,
    ),
]
_Seed = Annotated[
    int,
    typer.Option(metavar="N", help="Decides partition, split and order.", rich_help_panel=_SHAPE),
]
_Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes that compare and encode text; what is written is the same for any number. "
        "[default: as many as there are cores]",
        rich_help_panel=_SHAPE,
    ),
]
_Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace prepared data that is in DIR already.", rich_help_panel=_SHAPE),
]
_Hub = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:CONFIG,...]",
        help="Stream a data set of the hub, OWNER/NAME, or one of `c4`, `the-pile` (a silo per component), "
        "`mc4:de,fr,ja` (a silo per language), `fineweb-edu`; `json` and `parquet` take files of your own.",
        rich_help_panel=_HUB,
    ),
]
_HubLimit = Annotated[
    int | None,
    typer.Option(metavar="N", help="Most documents of a silo. [default: 10000]", rich_help_panel=_HUB),
]
_HubLimitMb = Annotated[
    float | None, typer.Option(metavar="MB", help="Most megabytes of a silo.", rich_help_panel=_HUB)
]
_HubFiles = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Local copies of the corpus's files; `{config}` stands for each configuration.",
        rich_help_panel=_HUB,
    ),
]


@app.command()
def prepare(
    output: _Output,
    silo: _Silo = None,
    embedded: _Embedded = False,
    kind: _Kind = "text",
    labelled: _Labelled = None,
    text_field: _TextField = None,
    partition: _Partition = "by-source",
    vocab_size: _VocabSize = None,
    tokenizer: _Tokenizer = None,
    sequence_length: _SequenceLength = 128,
    validation_fraction: _ValidationFraction = 0.05,
    seed: _Seed = 0,
    near_duplicates: _NearDuplicates = "words",
    tokenizer_loss: _TokenizerLoss = 0.01,
    workers: _Workers = None,
    overwrite: _Overwrite = False,
    hub: _Hub = None,
    hub_limit: _HubLimit = None,
    hub_limit_mb: _HubLimitMb = None,
    hub_files: _HubFiles = None,
) -> None:
    """Turn text into packed windows of tokens, split into train and validation by document.

    Two silos from files:

        photon data prepare --output data/two --silo news=news.jsonl.gz --silo books=books/

    Eight silos that mix the same text differently, with GPT-2's tokenizer:

        photon data prepare --output data/mix --silo news=news.jsonl.gz --silo books=books/
        --partition dirichlet:8:0.3 --tokenizer gpt2/

    Texts with labels, for objective=anchor:

        photon data prepare --output data/topics --labelled topic --silo few=few.jsonl --silo news=news.jsonl

    Conversations, for objective=sft, with the tokenizer of the model that is tuned:

        photon data prepare --output data/chats --kind chat --silo help=help.jsonl --tokenizer runs/b/export
    """
    from photon.data.partition import parse_partition
    from photon.data.prepare import check_output, prepare_documents
    from photon.data.prepare import prepare as prepare_files
    from photon.data.spool import Spool
    from photon.data.text_files import row_reader

    kind = _kind_of(kind, labelled)
    _check_ways(silo, embedded, hub, kind, text_field)
    _check_hub(hub, hub_files, hub_limit, hub_limit_mb)
    _check_sizes(vocab_size, tokenizer)
    check_output(output, overwrite=overwrite)
    field = parse_partition(partition).field
    options: dict[str, Any] = {
        "vocab_size": 8192 if vocab_size is None else vocab_size,
        "tokenizer": tokenizer,
        "sequence_length": sequence_length,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "near_duplicates": near_duplicates,
        "tokenizer_loss": tokenizer_loss,
        "kind": kind,
        "workers": workers,
        "overwrite": overwrite,
        "progress": True,
    }
    if silo:
        options |= {"text_field": text_field, "label_field": labelled}
        prepare_files(_parse_silos(silo), output, partition=partition, **options)
    elif hub is not None:
        reader = row_reader(cast("TextKind", kind), text_field, field or None, labelled)
        with Spool.beside(output) as spool:
            text = _read_hub(hub, hub_files or [], hub_limit, hub_limit_mb, reader, spool.documents)
            # The stream has sorted the documents by the field already.
            by = "by-source" if field else partition
            prepare_documents(text.silos, output, partition=by, skipped=text.skipped, **options)
    else:
        prepare_documents(_embedded(field), output, partition=partition, **options)
    inspect_data(output, verify=False, samples=0)


@app.command("inspect")
def inspect_data(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of prepared data.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and check it against the manifest.")
    ] = False,
    samples: Annotated[int, typer.Option(metavar="N", min=0, help="Windows to show of each silo.")] = 1,
) -> None:
    """Show sizes, tokens, splits and sample windows, and how different the silos are.

    photon data inspect data/two --samples 2
    """
    from rich.console import Console

    from photon.data.inspect import inspect

    Console().print(inspect(folder, samples=samples, verify=verify))


@app.command()
def label(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of prepared running text.")],
    run: Annotated[
        Path,
        typer.Option("--with", metavar="RUN", help="Run of objective=anchor, or one of its checkpoints."),
    ],
) -> None:
    """Label each silo's training windows with the classifier of a run, and write the labels beside them.

    A run leaves out what has some label with `data.filter`, and weighs labels with `data.mixture`.

        photon data label data/mine --with runs/topics
    """
    from photon.data.prepare import progress_bar
    from photon.evaluation.labelling import label_data

    with progress_bar(show=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(silo: str, done: int, total: int) -> None:
            if silo not in tasks:
                tasks[silo] = bar.add_task(f"labelling {silo}", total=total)
            bar.update(tasks[silo], completed=done)

        found = label_data(folder, run, advance)
    for one in found:
        total = sum(one.counts.values())
        shares = ", ".join(f"{name} {count / total:.1%}" for name, count in one.counts.items() if count)
        typer.echo(f"{one.silo}: {total:,} windows; {shares}")


@app.command()
def separate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of prepared data.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the parts, one per silo.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace parts that are there already.")
    ] = False,
) -> None:
    """Cut prepared data into one folder per silo, for silos that do not share a disk.

    photon data separate data/two --output data/parts
    """
    from photon.data.prepared import PreparedData
    from photon.data.separate import separate as separate_data

    for part in separate_data(PreparedData.open(folder), output, overwrite=overwrite):
        typer.echo(str(part))


def _parse_silos(values: list[str]) -> dict[str, list[Path]]:
    sources: dict[str, list[Path]] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise PhotonError(f"--silo {value!r} is not NAME=PATH, for instance --silo books=texts/books")
        try:
            sources.setdefault(name, []).append(Path(path).expanduser())
        except RuntimeError as error:  # there is no such user
            raise PhotonError(f"--silo {value!r} names no path ({error})") from None
    return sources


def _check_ways(
    silo: list[str] | None, embedded: bool, hub: str | None, kind: str, text_field: str | None
) -> None:
    if bool(silo) + embedded + (hub is not None) != 1:
        raise PhotonError("give the text in one way: --silo NAME=PATH (repeated), --embedded or --hub NAME")
    if embedded and kind not in ("text",):
        raise PhotonError(f"--kind {kind} reads rows: give them with --silo NAME=PATH or --hub NAME")
    if embedded and text_field is not None:
        raise PhotonError("--text-field: the embedded corpus has no fields; leave it out")
    if text_field == "":
        raise PhotonError("--text-field names nothing: give the field that holds the text")


def _embedded(field: str) -> "dict[str, list[Document]]":
    from photon.data.embedded import embedded_documents

    if field:
        raise PhotonError("the embedded corpus has no fields: use another --partition than field:NAME")
    return embedded_documents()


def _kind_of(kind: str, labelled: str | None) -> str:
    if labelled is None:
        return kind
    if not labelled:
        raise PhotonError("--labelled names nothing: give the field with the labels")
    if kind not in ("text", "labelled"):
        raise PhotonError(f"--labelled and --kind {kind} exclude each other: leave one out")
    return "labelled"


def _check_sizes(vocab_size: int | None, tokenizer: Path | None) -> None:
    if vocab_size is not None and tokenizer is not None:
        raise PhotonError("--vocab-size and --tokenizer exclude each other: the tokenizer has its own size")


def _check_hub(
    hub: str | None, hub_files: list[str] | None, hub_limit: int | None, hub_limit_mb: float | None
) -> None:
    if (hub_files or hub_limit is not None or hub_limit_mb is not None) and hub is None:
        raise PhotonError(
            "--hub-files, --hub-limit and --hub-limit-mb belong to --hub: name a corpus with --hub"
        )
    if hub_limit is not None and hub_limit < 1:
        raise PhotonError(f"--hub-limit {hub_limit} takes nothing: give 1 or more")
    if hub_limit_mb is not None and not 0 < hub_limit_mb < 1e12:
        raise PhotonError(f"--hub-limit-mb {hub_limit_mb} is out of range: a number above 0, below 1e12")


def _read_hub(
    value: str,
    files: list[str],
    limit: int | None,
    limit_mb: float | None,
    reader: "RowReader",
    into: "Callable[[], Store]",
) -> "HubText":
    from photon.data.hub import MOST_DOCUMENTS, hub_documents, named_corpus
    from photon.data.prepare import progress_bar

    name, configs = named_corpus(value)
    with progress_bar(show=True) as bar:
        task = bar.add_task(f"streaming {name}", total=None)
        text = hub_documents(
            name,
            configs=configs,
            data_files=files,
            reader=reader,
            limit=limit or MOST_DOCUMENTS,
            limit_bytes=None if limit_mb is None else int(limit_mb * 1e6),
            advance=lambda count: bar.advance(task, count),
            into=into,
        )
    if text.skipped and reader.kind == "questions":
        raise PhotonError(f"--hub: {text.skipped[0].reason}; mend it, no question is left out")
    return text
