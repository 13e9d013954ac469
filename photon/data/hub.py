"""Documents streamed from the Hugging Face hub, or from local copies of its files, through ``datasets``."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from photon.data.documents import Document
from photon.data.file_kinds import FileKind, Form, kind_of
from photon.data.folders import UnreadableError
from photon.data.partition import SiloNames, check_silo_name
from photon.data.prepared import SourceSkipped
from photon.data.row_files import PLACED, STREAMED, rows_of
from photon.data.row_kinds import RowReader
from photon.data.rows import Faults, fields_shown
from photon.data.spool import Spool, Store
from photon.data.streams import unpacked
from photon.data.tables import arrow_rows
from photon.errors import PhotonError, printable

if TYPE_CHECKING:
    from photon.config.schema import DataSection

# With silos by a field, a rare value may hardly ever come: the stream is given up after this many documents
# for each one that a silo may hold.
SCAN_FACTOR = 50
# And after this many rows of which none could be used: more will not be better.
PATIENCE = 10_000
#: Documents of a silo, if nobody says how many.
MOST_DOCUMENTS = 10_000


@dataclass(frozen=True)
class HubCorpus:
    """Where a corpus lies on the hub and what makes a silo in it.

    Attributes
    ----------
    path
        Name of the dataset, or the builder ``json`` or ``parquet`` for files of one's own.
    configs
        Configurations read unless others are named; each becomes a silo of its name.
    silo_field
        Field whose value names the silo instead; a dot reaches into an inner object.
    """

    path: str
    configs: tuple[str, ...] = ()
    silo_field: str | None = None


_TEXTS = RowReader()
CORPORA = {
    "c4": HubCorpus("allenai/c4", ("en",)),
    "the-pile": HubCorpus("monology/pile-uncopyrighted", silo_field="meta.pile_set_name"),
    "mc4": HubCorpus("allenai/c4", ("en-multi", "de", "fr", "es", "it", "ru", "ja", "zh")),
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", ("sample-10BT",)),
    "json": HubCorpus("json"),
    "parquet": HubCorpus("parquet"),
}
#: The name of any data set on the hub, OWNER/NAME.
_ON_THE_HUB = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)


@dataclass
class HubText:
    """What was streamed: documents by silo, and what rows were left out for."""

    silos: dict[str, Store] = field(default_factory=dict)
    skipped: list[SourceSkipped] = field(default_factory=list)


def corpus_of(name: str) -> HubCorpus:
    """Return the corpus of a name: a key of ``CORPORA``, or OWNER/NAME of any data set on the hub.

    Raises
    ------
    PhotonError
        If it is neither.
    """
    if name in CORPORA:
        return CORPORA[name]
    if not _ON_THE_HUB.fullmatch(name):
        raise PhotonError(
            f"corpus {printable(name)!r} is not known: use one of {', '.join(CORPORA)}, or OWNER/NAME of a "
            "data set on the hub"
        )
    return HubCorpus(name)


def named_corpus(value: str) -> tuple[str, list[str]]:
    """Return the corpus and the configurations of ``NAME`` or ``NAME:CONFIG,CONFIG``."""
    name, _, configs = value.partition(":")
    return name, [config for config in configs.split(",") if config]


def hub_documents(
    name: str,
    *,
    configs: Sequence[str] = (),
    data_files: Sequence[str] = (),
    reader: RowReader = _TEXTS,
    limit: int = MOST_DOCUMENTS,
    limit_bytes: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    into: Callable[[], Store] = list,
) -> HubText:
    """Stream the first documents of a corpus, silo by silo.

    Parameters
    ----------
    name
        A key of ``CORPORA``, or OWNER/NAME of any data set on the hub.
    configs
        Configurations to read instead of the corpus's own choice, for instance languages of mC4.
    data_files
        Local files or globs with the corpus's columns, read instead of the hub; ``{config}`` in them stands
        for each configuration. Needed for ``json`` and ``parquet``.
    reader
        What rows become; its ``source_field`` names the silo, instead of the corpus's own.
    limit, limit_bytes
        Most documents and (if given) UTF-8 bytes of one silo; at least one document is taken.
    advance
        Called with the number of documents taken since the last call, for a progress bar.
    into
        Makes what takes the documents of a silo.

    Returns
    -------
    HubText
        Documents by silo. A row without a text, or a silo, that can be used is left out and counted.

    Raises
    ------
    PhotonError
        If the corpus is not known, cannot be reached or read, or gave no text.
    """
    corpus = corpus_of(name)
    if corpus.path in ("json", "parquet") and not data_files:
        raise PhotonError(f"corpus {name!r} needs files: name them with --hub-files 'FOLDER/*.{name}'")
    if limit < 1:
        raise PhotonError(f"a limit of {limit} documents takes none: give 1 or more")
    for named in configs:
        check_silo_name(named)
    if reader.source_field is None and corpus.silo_field is not None:
        reader = replace(reader, source_field=corpus.silo_field)
    intake = _Intake(reader, limit, limit_bytes, into)
    named = SiloNames().of(name.rpartition("/")[2])
    for config in tuple(configs) or corpus.configs or (None,):
        files = [file.replace("{config}", config or "") for file in data_files]
        silo = config if config and len(configs or corpus.configs) > 1 else named
        rows = _stream(corpus, config, files, reader.fields)
        intake.take(rows, f"{name}:{config or 'default'}", silo, advance)
    return intake.text


def ensure_hub(
    home: Path, data: "DataSection", sequence_length: int, seed: int, *, progress: bool = True
) -> Path:
    """Return the folder of a hub corpus as a run's configuration wants it, prepared now if it is not there.

    Processes that ask at the same time wait for the one that prepares. Other options give another folder
    below ``home``.

    Raises
    ------
    PhotonError
        As ``hub_documents`` and ``photon.data.prepare.prepare_documents``.
    """
    from photon.data.partition import parse_partition
    from photon.data.prepare import prepare_documents
    from photon.data.prepared import FORMAT, is_prepared
    from photon.data.tokenizer import load_tokenizer

    if data.hub is None:
        raise PhotonError("data.source is hub but data.hub is not set: name a corpus, for instance data=c4")
    tokenizer = None if data.tokenizer is None else Path(data.tokenizer).absolute()
    options: dict[str, Any] = {
        "partition": data.partition,
        "vocab_size": data.vocab_size,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    identity = json.dumps([FORMAT, options, data.hub.documents_per_silo, str(tokenizer)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    name, configs = named_corpus(data.hub.corpus)
    corpus_of(name)
    called = re.sub(r"[/:,]", "--", data.hub.corpus)
    path = home / "data" / f"hub-{called}-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not is_prepared(path):
            # Before anything is downloaded.
            parse_partition(data.partition)
            if tokenizer is not None:
                load_tokenizer(tokenizer)
            with Spool.beside(path) as spool:
                limit = data.hub.documents_per_silo
                text = hub_documents(name, configs=configs, limit=limit, into=spool.documents)
                prepare_documents(
                    text.silos, path, tokenizer=tokenizer, skipped=text.skipped, progress=progress, **options
                )
    return path


class _Intake:
    """Makes documents of rows, up to each silo's limits."""

    def __init__(
        self,
        reader: RowReader,
        limit: int,
        limit_bytes: int | None,
        into: Callable[[], Store],
    ) -> None:
        self.text = HubText()
        self._reader, self._by_field = reader, reader.source_field is not None
        self._limit, self._limit_bytes = limit, limit_bytes
        self._into = into
        self._sizes: dict[str, int] = {}
        self._names = SiloNames()

    def take(self, rows: Iterable[Any], corpus: str, silo: str, advance: Callable[[int], None]) -> None:
        """Take the documents of one configuration; ``silo`` is whose they are if no field says."""
        faults, used, columns = Faults(), 0, "none"
        for scanned, row in enumerate(rows, 1):
            found = self._reader.read(row, f"{corpus}:{scanned}")
            if isinstance(found, Document):
                used += 1
                advance(self._add(self._names.of(found.source) if self._by_field else silo, found))
            else:
                faults.add(found, f"row {scanned:,}")
                columns = fields_shown(row) if isinstance(row, dict) else columns
            done = self._full(silo) if not self._by_field else scanned >= SCAN_FACTOR * self._limit
            if done or (not used and scanned >= PATIENCE):
                break
        if not used:
            reason = f"{faults.worst()}; its fields: {columns}" if faults.counts else "it has no rows"
            raise PhotonError(
                f"corpus {corpus!r} gave no text ({printable(reason)}): check what is asked of it"
            )
        told = faults.told(used)
        self.text.skipped += [SourceSkipped(name=silo, file=corpus, reason=printable(said)) for said in told]

    def _full(self, silo: str) -> bool:
        if self._limit_bytes is not None and self._sizes.get(silo, 0) >= self._limit_bytes:
            return True
        return len(self.text.silos.get(silo, ())) >= self._limit

    def _add(self, silo: str, document: Document) -> bool:
        if self._full(silo):
            return False
        if silo not in self.text.silos:
            self.text.silos[silo] = self._into()
        self.text.silos[silo].append(document)
        self._sizes[silo] = self._sizes.get(silo, 0) + len(document.text.encode())
        return True


def _stream(corpus: HubCorpus, config: str | None, files: list[str], fields: list[str]) -> Iterator[Any]:
    """Yield rows as `photon.data.rows` has them: by its rules, or else through ``datasets``."""
    if files and not any("://" in file for file in files):
        paths = [Path(name) for pattern in files for name in sorted(glob(pattern, recursive=True))]
        if not paths:
            raise PhotonError(f"{_shown(files)} cannot be streamed (no such file): check the files")
        if (kinds := _kinds(map(str, paths), {*STREAMED, *PLACED})) is not None:
            yield from _local(zip(paths, kinds, strict=True), fields)
            return
    with _streaming(_shown(files) or corpus.path, bool(files)):
        kinds = _kinds(files, set(STREAMED)) if files else None
        yield from _remote(corpus, config, files) if kinds is None else _remote_files(files, kinds)


def _kinds(names: Iterable[str], forms: set[Form]) -> list[FileKind] | None:
    """Return the kinds of files by their names; None: one is of none of these forms."""
    kinds = [kind_of(name) for name in names]
    known = [kind for kind in kinds if isinstance(kind, FileKind) and kind.form in forms]
    return known if len(known) == len(kinds) else None


def _local(files: Iterable[tuple[Path, FileKind]], fields: list[str]) -> Iterator[Any]:
    for path, kind in files:
        try:
            for _, row in rows_of(path, kind, fields):
                yield row
        except UnreadableError as error:
            raise PhotonError(
                f"{printable(path)} cannot be streamed ({printable(error)}): check the files"
            ) from error


def _remote_files(files: Iterable[str], kinds: Iterable[FileKind]) -> Iterator[Any]:
    """Yield rows of files elsewhere; the reader of ``datasets`` loses a file with a line that is no JSON."""
    import fsspec

    for pattern, kind in zip(files, kinds, strict=True):
        for file in fsspec.open_files(pattern, "rb"):
            with file as raw, unpacked(raw, kind) as stream:
                for _, row in STREAMED[kind.form](stream, kind):
                    yield row


def _remote(corpus: HubCorpus, config: str | None, files: list[str]) -> Iterator[Any]:
    import datasets

    if files:
        builder = "parquet" if files[0].endswith(".parquet") else "json"
        rows = datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
    else:
        rows = datasets.load_dataset(corpus.path, name=config, split="train", streaming=True)
    # As tables: a text that is no UTF-8 then costs one row.
    for table in rows.with_format("arrow"):
        yield from arrow_rows(table)


@contextmanager
def _streaming(what: str, by_files: bool) -> Iterator[None]:
    """Say in one line that something cannot be streamed."""
    try:
        yield
    # The network, the hub's client, the decompressors and pyarrow each bring their own exceptions.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "nothing found"
        mend = "check the files" if by_files else "check the network, or give local copies with --hub-files"
        raise PhotonError(f"{what} cannot be streamed ({printable(reason)}): {mend}") from error


def _shown(files: list[str]) -> str:
    return ", ".join(printable(file) for file in files)
