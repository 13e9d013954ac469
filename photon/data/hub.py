"""Documents streamed from the Hugging Face hub, or from local copies of its files, through ``datasets``."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from photon.data.documents import Document
from photon.data.partition import folder_name
from photon.data.text_files import field_value
from photon.errors import PhotonError

if TYPE_CHECKING:
    from photon.config.schema import DataSection

# With silos by a field, a rare value may hardly ever come: the stream is given up after this many documents
# for each one that a silo may hold.
SCAN_FACTOR = 50


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


CORPORA = {
    "c4": HubCorpus("allenai/c4", ("en",)),
    "the-pile": HubCorpus("monology/pile-uncopyrighted", silo_field="meta.pile_set_name"),
    "mc4": HubCorpus("allenai/c4", ("en-multi", "de", "fr", "es", "it", "ru", "ja", "zh")),
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", ("sample-10BT",)),
    "json": HubCorpus("json"),
    "parquet": HubCorpus("parquet"),
}


def hub_documents(
    name: str,
    *,
    configs: Sequence[str] = (),
    data_files: Sequence[str] = (),
    text_field: str = "text",
    silo_field: str | None = None,
    limit: int = 10_000,
    limit_bytes: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Document]]:
    """Stream the first documents of a corpus, silo by silo.

    Parameters
    ----------
    name
        A key of ``CORPORA``.
    configs
        Configurations to read instead of the corpus's own choice, for instance languages of mC4.
    data_files
        Local files or globs with the corpus's columns, read instead of the hub; ``{config}`` in them stands
        for each configuration. Needed for ``json`` and ``parquet``.
    text_field
        Column that holds the text.
    silo_field
        Column whose value names the silo, instead of the corpus's own.
    limit, limit_bytes
        Most documents and (if given) UTF-8 bytes of one silo; at least one document is taken.
    advance
        Called with the number of documents taken since the last call, for a progress bar.

    Returns
    -------
    dict
        Documents by silo.

    Raises
    ------
    PhotonError
        If the corpus is not known, cannot be reached or read, or gave no text.
    """
    corpus = CORPORA.get(name)
    if corpus is None:
        raise PhotonError(f"corpus {name!r} is not known: use one of {', '.join(CORPORA)}")
    if corpus.path in ("json", "parquet") and not data_files:
        raise PhotonError(f"corpus {name!r} needs files: name them with --hub-files 'FOLDER/*.{name}'")
    if limit < 1:
        raise PhotonError(f"a limit of {limit} documents takes none: give 1 or more")
    budget = _Budget(limit, limit_bytes)
    for config in tuple(configs) or corpus.configs or (None,):
        rows = _stream(corpus, config, [file.replace("{config}", config or "") for file in data_files])
        silo = config if config and len(configs or corpus.configs) > 1 else name
        for scanned, row in enumerate(rows, 1):
            text = field_value(row, text_field)
            if not isinstance(text, str):
                raise PhotonError(
                    f"corpus {name!r} has no text column {text_field!r} (it has {', '.join(sorted(row))}): "
                    "name it with --text-field"
                )
            field = silo_field or corpus.silo_field
            owner = silo if field is None else folder_name(str(field_value(row, field)))
            if text.strip() and budget.take(owner, Document(f"{name}:{config or 'default'}:{scanned}", text)):
                advance(1)
            if (field is None and budget.full(silo)) or scanned >= SCAN_FACTOR * limit:
                break
    if not budget.silos:
        raise PhotonError(f"corpus {name!r} gave no text: check its configuration and files")
    return budget.silos


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
    from photon.data.prepared import is_prepared
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
    identity = json.dumps([options, data.hub.documents_per_silo, str(tokenizer)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    path = home / "data" / f"hub-{data.hub.corpus}-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not is_prepared(path):
            # Before anything is downloaded.
            parse_partition(data.partition)
            if tokenizer is not None:
                load_tokenizer(tokenizer)
            documents = hub_documents(data.hub.corpus, limit=data.hub.documents_per_silo)
            prepare_documents(documents, path, tokenizer=tokenizer, progress=progress, **options)
    return path


class _Budget:
    """Takes documents up to each silo's limits."""

    def __init__(self, limit: int, limit_bytes: int | None) -> None:
        self.silos: dict[str, list[Document]] = {}
        self._sizes: dict[str, int] = {}
        self._limit = limit
        self._limit_bytes = limit_bytes

    def full(self, silo: str) -> bool:
        if self._limit_bytes is not None and self._sizes.get(silo, 0) >= self._limit_bytes:
            return True
        return len(self.silos.get(silo, ())) >= self._limit

    def take(self, silo: str, document: Document) -> bool:
        if self.full(silo):
            return False
        self.silos.setdefault(silo, []).append(document)
        self._sizes[silo] = self._sizes.get(silo, 0) + len(document.text.encode())
        return True


def _stream(corpus: HubCorpus, config: str | None, files: list[str]) -> Iterator[dict[str, Any]]:
    import datasets

    where = ", ".join(files) or corpus.path
    try:
        if files:
            builder = "parquet" if files[0].endswith(".parquet") else "json"
            yield from datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
        else:
            yield from datasets.load_dataset(corpus.path, name=config, split="train", streaming=True)
    # The network, the hub's client, the decompressors and pyarrow each bring their own exceptions.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "nothing found"
        mend = "check the files" if files else "check the network, or give local copies with --hub-files"
        raise PhotonError(f"{where} cannot be streamed ({reason}): {mend}") from error
