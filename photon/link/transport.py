"""How state groups get from server to silo and back: inside messages, or by reference through a store.

Flower's message path copies a payload several times and moves some ten megabytes a second; a file moves ten
times that. So a large payload is written to a store as one object, and the message carries a reference: where
the object is, and for every tensor its place in it, its hash and the codecs that were applied. Nothing is
taken from a store that does not agree with its reference.
"""

import math
import mmap
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from photon.config.schema import LinkSection
from photon.errors import PhotonError, RunError
from photon.files.hashing import new_hasher
from photon.link.encoding import (
    DTYPES,
    Packed,
    PackedGroups,
    SparseTensor,
    check_claim,
    dtype_name,
    is_possible,
    pack_groups,
    payloads_of,
    unpack,
)
from photon.link.messages import Body
from photon.link.pipelines import change_pipeline, downlink_pipelines, uplink_pipelines
from photon.link.records import (
    HEADER,
    STORED_BYTES,
    Decoded,
    Groups,
    Shapes,
    count_bytes,
    decode_groups,
    expected_shape,
    records_of,
)
from photon.link.reference import StoredObject, StoredTensor
from photon.link.store import (
    ObjectStore,
    Store,
    Write,
    open_store,
    read_presigned,
    write_presigned,
)
from photon.state.tensors import Places, places

#: Name of the record that says where a silo may write its reply.
TICKET = "ticket"
#: Every tensor begins at a multiple of this many bytes, so that it can be used where it is mapped.
ALIGNMENT = 64
#: Bytes of an object that are no tensor's, at most: alignment, and the header of a file that a silo has kept.
MAX_GAPS = 2**24
#: Bytes that are hashed and written at a time.
CHUNK = 4 * 2**20
#: A presigned request of S3 is good for a week at most.
LONGEST_SIGNATURE = 7 * 86400


class Ticket(Body):
    """Where a silo may write its reply, and nowhere else.

    Attributes
    ----------
    limit
        Most bytes that the server takes.
    part_urls
        Presigned requests, one for each part; None if the silo has credentials of its own.
    """

    key: str
    limit: int = Field(ge=0)
    part_urls: list[str] | None = None


class ServerLink:
    """The server's end of the link.

    Parameters
    ----------
    link
        Codecs and transport of the run.
    spool
        Folder for downloads.
    seconds
        How long a silo may take to answer.

    Raises
    ------
    PhotonError
        If the store cannot be opened.
    """

    def __init__(self, link: LinkSection, spool: Path, seconds: float) -> None:
        self._down = downlink_pipelines(link)
        # What silos, or a later round, could not build ends here.
        uplink_pipelines(link)
        if link.downlink_payload == "update":
            change_pipeline(link)
        self._spool = spool
        self._seconds = min(int(seconds), LONGEST_SIGNATURE)
        self._limit = link.inline_limit_mb * 2**20 if link.transport == "auto" else 0.0
        self._store: Store | None = None
        if link.transport != "inline" and link.store.url is not None:
            self._store = open_store(link.store.url)
        self._signing = self._store if link.store.presigned and isinstance(self._store, ObjectStore) else None
        self._sent: dict[str, list[StoredObject]] = {}
        self._uploads: dict[str, str] = {}

    def send(self, groups: Groups, run_id: str, server_round: int) -> RecordDict:
        """Return the records of a message that brings ``groups`` to silos.

        Through a store they are written once for all silos; and once for all messages of a round, so the
        model that silos have evaluated is not written again when they train from it.

        Raises
        ------
        RunError
            If the store cannot be written.
        """
        return self._send(pack_groups(groups, self._down), run_id, server_round)

    def send_change(
        self, change: Mapping[str, Packed], groups: Groups, run_id: str, server_round: int
    ) -> RecordDict:
        """Return the records of a message that brings a change of the parameters, and other ``groups``."""
        return self._send({"params": change, **pack_groups(groups, self._down)}, run_id, server_round)

    def _send(self, packed: PackedGroups, run_id: str, server_round: int) -> RecordDict:
        if self._store is None or _nbytes(payloads_of(packed)) <= self._limit:
            return records_of(packed)
        folder = _folder(run_id, server_round)
        known = self._sent.setdefault(folder, [])
        stored = None
        if known:
            layout, _ = _lay_out(packed, None)
            stored = next((entry for entry in known if entry.groups == layout), None)
        try:
            if stored is None:
                stored = _write(self._store, f"{folder}/down-{uuid.uuid4().hex}", packed)
                known.append(stored)
            if self._signing is None:
                return _refer(stored)
            return _refer(
                stored.model_copy(update={"url": self._signing.read_url(stored.key, self._seconds)})
            )
        except PhotonError as error:
            raise RunError(str(error)) from error

    def as_received(self, params: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return parameters as silos decode them: what codecs lose is gone."""
        if all(codec.on_bytes for codec in self._down.params):
            return params
        packed = pack_groups({"params": params}, self._down)["params"]
        decoded = {name: unpack(one, f"params/{name}") for name, one in packed.items()}
        return {name: t.dense() if isinstance(t, SparseTensor) else t for name, t in decoded.items()}

    def admit(
        self, request: RecordDict, reply_bytes: int, run_id: str, server_round: int, *, held: bool = False
    ) -> Ticket | None:
        """Put a ticket for the reply into a request that brings its tensors by reference.

        Parameters
        ----------
        request
            Content of the message; changed in place.
        reply_bytes
            Bytes of the reply's tensors before codecs.
        held
            Whether the request leaves out what the silo has: then the reply's size decides.

        Returns
        -------
        Ticket or None
            The ticket; None if the reply is to come inside its message.
        """
        by_reference = STORED_BYTES in request[HEADER]
        if held and self._store is not None:
            by_reference |= reply_bytes > self._limit
        if not by_reference:
            return None
        # A new name for every attempt: a late reply to an earlier one is never taken for this one's.
        key = f"{_folder(run_id, server_round)}/up-{uuid.uuid4().hex}"
        # Twice the plain size, because codecs may also add to what is sent.
        limit = 2 * reply_bytes + 2**20
        urls = None
        if self._signing is not None:
            try:
                self._uploads[key], urls = self._signing.begin_upload(key, limit, self._seconds)
            except PhotonError as error:
                raise RunError(str(error)) from error
        ticket = Ticket(key=key, limit=limit, part_urls=urls)
        self.attach(ticket, request)
        return ticket

    def attach(self, ticket: Ticket, request: RecordDict) -> None:
        """Put a ticket into a request."""
        request[TICKET] = ConfigRecord({"ticket": ticket.model_dump_json()})

    def receive(self, records: RecordDict, ticket: Ticket | None, expected: Shapes | None = None) -> Decoded:
        """Return the state groups of a reply.

        Parameters
        ----------
        expected
            Shapes that its tensors must have.

        Raises
        ------
        PhotonError
            If the records are malformed, or refer to anything but an intact object at the ticket's key.
        """
        stored = _reference(records)
        if stored is None:
            return decode_groups(records, expected)
        if ticket is None or self._store is None or stored.key != ticket.key:
            raise PhotonError(f"link: the reply refers to {stored.key!r}, which it was not asked to write")
        if stored.nbytes > ticket.limit:
            raise PhotonError(f"link: the reply has {stored.nbytes} bytes, the server takes {ticket.limit}")
        _check(stored, expected)
        if self._signing is not None:
            self._signing.finish_upload(stored.key, self._uploads[stored.key], stored.etags or [])
        return _read(stored, self._store.reading(stored.key, stored.nbytes, self._spool))

    def collect(self, run_id: str, finished_round: int | None) -> None:
        """Remove what lies in the store for rounds up to ``finished_round``; with None, for all of the run.

        That takes late replies to earlier rounds along.

        Raises
        ------
        PhotonError
            If the store cannot be reached.
        """
        self._uploads.clear()
        if self._store is None:
            return
        if finished_round is None:
            self._sent.clear()
            self._store.remove(run_id)
            return
        last = _folder(run_id, finished_round)
        for name in self._store.folders(run_id):
            if (folder := f"{run_id}/{name}") <= last:
                self._sent.pop(folder, None)
                self._store.remove(folder)


class SiloLink:
    """A silo's end of the link.

    Parameters
    ----------
    store
        Where this silo finds the store: a URL or a folder. None if it has no access of its own; what the
        server signs is still open to it.
    spool
        Folder for downloads.
    """

    def __init__(self, store: str | None, spool: Path) -> None:
        self._url = store
        self._spool = spool

    def receive(self, records: RecordDict, expected: Shapes | None = None) -> Decoded:
        """Return the state groups that a request brings.

        Parameters
        ----------
        expected
            Shapes that its tensors must have.

        Raises
        ------
        PhotonError
            If the records are malformed, or do not agree with the object that they refer to.
        """
        stored = _reference(records)
        if stored is None:
            return decode_groups(records, expected)
        _check(stored, expected)
        if stored.url is None:
            return _read(stored, self._store().reading(stored.key, stored.nbytes, self._spool))
        self._check_url(stored.url)
        return _read(stored, read_presigned(stored.url, stored.nbytes, self._spool))

    def send(self, groups: PackedGroups, request: RecordDict, kept: Path | None = None) -> RecordDict:
        """Return the records of the reply to ``request``, which takes the way that the request came.

        Parameters
        ----------
        kept
            File that ``save_groups`` has written the same tensors to, if the store may have that file itself:
            a shared folder on the same disk then takes no second copy. Whoever can write to the folder can
            change the file, so it must be this user's alone.

        Raises
        ------
        PhotonError
            If the store cannot be written.
        """
        ticket = _ticket(request)
        if ticket is None:
            return records_of(groups)
        if ticket.part_urls is None:
            return _refer(_put(self._store(), ticket.key, groups, kept))
        for url in ticket.part_urls:
            self._check_url(url)
        with write_presigned(ticket.part_urls) as (write, etags):
            layout, nbytes = _lay_out(groups, write)
        return _refer(StoredObject(key=ticket.key, nbytes=nbytes, groups=layout, etags=etags))

    def _store(self) -> Store:
        if self._url is None:
            raise PhotonError(
                "node config: this run's tensors go through a store, but store-url is not set; name the "
                "shared folder or the bucket as this machine reaches it"
            )
        return open_store(self._url)

    def _check_url(self, url: str) -> None:
        """Follow a server's URL only to where the operator lets it, or else over TLS."""
        parts = urlsplit(url)
        if self._url is not None and urlsplit(self._url).scheme in ("http", "https"):
            if not url.startswith(self._url.rstrip("/") + "/"):
                raise PhotonError(
                    f"link: the server names {parts.hostname}, and the node config's store-url another place"
                )
        elif parts.scheme != "https" and parts.hostname not in ("127.0.0.1", "localhost"):
            raise PhotonError(
                f"link: {parts.scheme}://{parts.hostname} is not encrypted; use https, or name the address "
                "as store-url in the node config"
            )


def message_bytes(records: RecordDict) -> tuple[int, dict[str, int]]:
    """Return the bytes of a message, and those of each state group in it."""
    return count_bytes(records), group_bytes(records)


def group_bytes(records: RecordDict) -> dict[str, int]:
    """Return the bytes of each state group's tensors in a message, as they travel: after codecs.

    What `photon.link.records.count_bytes` counts beyond their sum are names, shapes and the message's other
    records, or in a store the gaps between tensors.

    Raises
    ------
    PhotonError
        If the message refers to a store and its reference is malformed.
    """
    stored = _reference(records)
    if stored is not None:
        return {
            group: sum(tensor.nbytes for tensor in tensors.values())
            for group, tensors in stored.groups.items()
        }
    return {
        name: sum(len(array.data) for array in record.values())
        for name, record in records.items()
        if isinstance(record, ArrayRecord)
    }


# --- objects ------------------------------------------------------------------------------------------


def _lay_out(
    groups: PackedGroups, write: Write | None, lying: Places | None = None
) -> tuple[dict[str, dict[str, StoredTensor]], int]:
    """Hash tensor by tensor, and write it if there is a place to write to.

    Parameters
    ----------
    lying
        Where the tensors already lie; None: one after another.

    Returns
    -------
    tuple
        Where each tensor lies, and the end of the last.
    """
    layout: dict[str, dict[str, StoredTensor]] = {}
    end = 0
    for group, tensors in groups.items():
        layout[group] = {}
        for name, packed in tensors.items():
            sent = packed.data
            data = sent.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            offset = _aligned(end) if lying is None else lying[group][name][0]
            if write is not None:
                write(memoryview(bytes(offset - end)))
            hasher = new_hasher()
            for start in range(0, len(data), CHUNK):
                hasher.update(data[start : start + CHUNK])
                if write is not None:
                    write(data[start : start + CHUNK])
            layout[group][name] = StoredTensor(
                dtype=dtype_name(sent.dtype),
                shape=list(sent.shape),
                offset=offset,
                nbytes=len(data),
                blake3=hasher.hexdigest(),
                encoding=packed.encoding,
            )
            end = max(end, offset + len(data))
    return layout, end


def _put(store: Store, key: str, groups: PackedGroups, kept: Path | None) -> StoredObject:
    """Bring tensors to a store: the file that has them already, or else a new object."""
    if kept is not None and store.adopt(key, kept):
        layout, nbytes = _lay_out(groups, None, places(kept))
        return StoredObject(key=key, nbytes=nbytes, groups=layout)
    return _write(store, key, groups)


def _write(store: Store, key: str, groups: PackedGroups) -> StoredObject:
    with store.writing(key) as write:
        layout, nbytes = _lay_out(groups, write)
    return StoredObject(key=key, nbytes=nbytes, groups=layout)


def _check(stored: StoredObject, expected: Shapes | None) -> None:
    """Check that the tensors of a reference are what is expected, and add up to its object.

    Nothing is read or allocated before.
    """
    end = gaps = 0
    for group, name, tensor in sorted(_tensors(stored), key=lambda entry: (entry[2].offset, entry[2].nbytes)):
        where = f"{group}/{name}"
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise PhotonError(f"link: {where} has the unknown type {tensor.dtype!r}")
        if not is_possible(tensor.shape):
            raise PhotonError(f"link: {where} has the impossible shape {tensor.shape}")
        check_claim(tensor.shape, dtype, tensor.encoding, where, expected_shape(expected, group, name))
        needed = math.prod(tensor.shape) * dtype.itemsize
        if tensor.nbytes != needed:
            raise PhotonError(
                f"link: {where} has {tensor.nbytes} bytes, but its shape {tensor.shape} of {tensor.dtype} "
                f"needs {needed}"
            )
        if tensor.offset < end or tensor.offset % dtype.itemsize:
            raise PhotonError(
                f"link: {where} cannot begin at {tensor.offset}; the tensor before it ends at {end}"
            )
        gaps += tensor.offset - end
        end = tensor.offset + tensor.nbytes
    if gaps > MAX_GAPS:
        raise PhotonError(f"link: {gaps} bytes of {stored.key} are no tensor's, beyond {MAX_GAPS}")
    if end != stored.nbytes:
        raise PhotonError(
            f"link: {stored.key} is said to have {stored.nbytes} bytes, its tensors end at {end}"
        )


def _read(stored: StoredObject, file: BinaryIO) -> Decoded:
    """Verify every tensor of an object whose reference was checked, map the file and undo the codecs.

    The tensors to which no codec was applied are private maps of the file: they take no memory that the
    system cannot take back.
    """
    with file:
        for group, name, tensor in _tensors(stored):
            if _hash_of_part(file, tensor) != tensor.blake3:
                raise PhotonError(
                    f"link: {group}/{name} in {stored.key} is not what was sent (its BLAKE3 hash differs); "
                    "it was damaged or changed in the store"
                )
        mapped = mmap.mmap(file.fileno(), stored.nbytes, access=mmap.ACCESS_COPY) if stored.nbytes else None
    return {
        group: MappedTensors(
            {
                name: unpack(Packed(_view(mapped, tensor), tensor.encoding), f"{group}/{name}")
                for name, tensor in tensors.items()
            },
            mapped,
        )
        for group, tensors in stored.groups.items()
    }


class MappedTensors(dict[str, torch.Tensor | SparseTensor]):
    """Tensors that may lie in a mapped file.

    Parameters
    ----------
    tensors
        Name to tensor.
    pages
        The private map of the file, if there is one.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor | SparseTensor], pages: mmap.mmap | None) -> None:
        super().__init__(tensors)
        self._pages = pages

    def release(self) -> None:
        """Give back the memory of what was read; it is read again where it is needed.

        Of what was written to the tensors in the meantime nothing remains.
        """
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


def _hash_of_part(file: BinaryIO, tensor: StoredTensor) -> str:
    # Read, not mapped: pages that were only hashed do not stay in this process.
    hasher = new_hasher()
    file.seek(tensor.offset)
    left = tensor.nbytes
    buffer = memoryview(bytearray(min(left, CHUNK)))
    while left and (count := file.readinto(buffer[: min(left, CHUNK)])):  # type: ignore[attr-defined]
        hasher.update(buffer[:count])
        left -= count
    return hasher.hexdigest()


def _view(mapped: mmap.mmap | None, tensor: StoredTensor) -> torch.Tensor:
    dtype = DTYPES[tensor.dtype]
    if mapped is None or tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    count = tensor.nbytes // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.offset).reshape(tensor.shape)


def _tensors(stored: StoredObject) -> Iterator[tuple[str, str, StoredTensor]]:
    return ((group, name, one) for group, tensors in stored.groups.items() for name, one in tensors.items())


# --- records ------------------------------------------------------------------------------------------


def _refer(stored: StoredObject) -> RecordDict:
    header = ConfigRecord({"object": stored.model_dump_json()})
    header[STORED_BYTES] = stored.nbytes
    return RecordDict({HEADER: header})


def _reference(records: RecordDict) -> StoredObject | None:
    """Read the reference of a message; None if it brings its tensors inside."""
    record = records.get(HEADER)
    if not isinstance(record, ConfigRecord) or STORED_BYTES not in record:
        return None
    stored = _parsed(StoredObject, record.get("object"))
    if record[STORED_BYTES] != stored.nbytes:
        raise PhotonError(
            f"link: the message counts {record[STORED_BYTES]!r} bytes, its reference {stored.nbytes}"
        )
    return stored


def _ticket(request: RecordDict) -> Ticket | None:
    record = request.get(TICKET)
    return _parsed(Ticket, record.get("ticket")) if isinstance(record, ConfigRecord) else None


def _parsed(kind: Callable[..., Any], text: object) -> Any:
    try:
        return kind.model_validate_json(text)  # type: ignore[attr-defined]
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "it"
        raise PhotonError(
            f"link: the message's reference is malformed ({where}: {problem['msg']})"
        ) from error


def _folder(run_id: str, server_round: int) -> str:
    return f"{run_id}/round-{server_round:06d}"


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _nbytes(groups: Groups) -> int:
    return sum(tensor.nbytes for tensors in groups.values() for tensor in tensors.values())
