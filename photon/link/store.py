"""Where payloads lie that do not travel inside messages: a shared folder or an object store.

A store knows keys and bytes. What the bytes are, and whether they are the right ones, is the business of
:mod:`photon.link.transport`.
"""

import os
import random
import re
import shutil
import stat
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from photon import DISTRIBUTION
from photon.errors import PhotonError
from photon.files.atomic import atomic_file

#: Bytes of a part of a multipart upload. S3 takes 10,000 parts, so an object may have 312 GiB.
PART_BYTES = 32 * 2**20
#: Bytes of one range of a download, and how many are under way together.
RANGE_BYTES = 16 * 2**20
STREAMS = 4
#: Tries of a request, and the seconds before the second one; each further wait is twice as long.
TRIES = 5
FIRST_WAIT = 0.5
#: Seconds to wait for a connection, and for the next bytes.
TIMEOUT = (20, 120)

#: Signatures that every region and every compatible server takes. The checksums that the client would add are
#: unknown to some servers, and every tensor brings its own. A server may take minutes to put parts together.
S3_SETTINGS = {
    "signature_version": "s3v4",
    "request_checksum_calculation": "when_required",
    "connect_timeout": TIMEOUT[0],
    "read_timeout": 600,
}

#: A key is a relative path of plain names: nothing that a file system or a URL would read otherwise.
KEY = re.compile(r"[0-9A-Za-z_-]+(/[0-9A-Za-z_-]+)*")

Write = Callable[[memoryview], object]
Result = TypeVar("Result")


class Store(ABC):
    """Objects by key. An object is there as a whole or not at all."""

    @abstractmethod
    def writing(self, key: str) -> Any:
        """Return a context that yields a function to write with; the object appears when it ends well."""

    def adopt(self, key: str, file: Path) -> bool:
        """Make an object of a file that stays where it is; return whether the store can do that."""
        return False

    @abstractmethod
    def reading(self, key: str, nbytes: int, spool: Path) -> BinaryIO:
        """Return the object as a local file.

        Parameters
        ----------
        key
            Of the object.
        nbytes
            Its length.
        spool
            Folder for the nameless file that a remote object is downloaded to.

        Raises
        ------
        PhotonError
            If there is no such object or it has another length.
        """

    @abstractmethod
    def small(self, key: str, most: int) -> bytes | None:
        """Return a small object; None if there is none.

        Parameters
        ----------
        most
            Bytes that it may have.

        Raises
        ------
        PhotonError
            If it is larger, or cannot be read.
        """

    @abstractmethod
    def discard(self, key: str) -> None:
        """Remove an object, if it is there."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Return the names of the folders directly below ``prefix``."""

    @abstractmethod
    def remove(self, prefix: str) -> None:
        """Remove all objects below ``prefix``, finished or not."""


def open_store(url: str) -> Store:
    """Open the store that an fsspec URL names.

    Raises
    ------
    PhotonError
        If the URL cannot be used.
    """
    protocol, separator, rest = url.partition("://")
    if not separator:
        return FolderStore(Path(url))
    return FolderStore(Path(rest)) if protocol == "file" else ObjectStore(url)


class FolderStore(Store):
    """A folder that server and silos share; its objects are read where they lie.

    Parameters
    ----------
    root
        The folder.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_absolute():
            raise PhotonError(f"link.store.url={root}: not an absolute path")
        self._root = root

    @contextmanager
    def writing(self, key: str) -> Iterator[Write]:
        """Write beside the place and rename."""
        path = self._path(key)
        with _explained(f"cannot write {path}"), atomic_file(path, flush=False) as file:
            yield file.write

    def adopt(self, key: str, file: Path) -> bool:
        """Give the file a second name, if it is on the same disk."""
        path = self._path(key)
        with _explained(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, path)
        except OSError:
            return False
        return True

    def reading(self, key: str, nbytes: int, spool: Path) -> BinaryIO:
        """Open the file itself."""
        path = self._path(key)
        with _explained(f"cannot read {path}"):
            # Whoever shares the folder may have put something else there: no link, no pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            file = os.fdopen(descriptor, "rb")
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
            file.close()
            raise PhotonError(f"link: {path} holds {status.st_size} bytes, its reference says {nbytes}")
        return file

    def small(self, key: str, most: int) -> bytes | None:
        """Read the file, if it is there."""
        path = self._path(key)
        with _explained(f"cannot read {path}"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                    raise PhotonError(f"link: {path} is no file of at most {most} bytes")
                return file.read(most)

    def discard(self, key: str) -> None:
        """Remove the file."""
        path = self._path(key)
        with _explained(f"cannot remove {path}"):
            path.unlink(missing_ok=True)

    def folders(self, prefix: str) -> list[str]:
        """List the folder."""
        path = self._path(prefix)
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []

    def remove(self, prefix: str) -> None:
        """Remove the folder, with what half-finished writes left in it."""
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        if not path.parent.resolve().is_relative_to(self._root.resolve()):
            raise PhotonError(f"link: {path} leads out of the store's folder {self._root}")
        return path


class ObjectStore(Store):
    """An object store that fsspec knows. Credentials and endpoint come from this machine's environment.

    Parameters
    ----------
    url
        Such as ``s3://bucket/prefix``.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._is_s3 = url.startswith("s3://")
        try:
            # What others have written or removed must show at once, so no listing is kept.
            self._files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, **({"config_kwargs": S3_SETTINGS} if self._is_s3 else {})
            )
        except (ImportError, ValueError) as error:
            raise PhotonError(
                f"link.store.url={url}: cannot be opened ({error}); S3 needs pip install '{DISTRIBUTION}[s3]'"
            ) from error
        self._root = root.rstrip("/")

    @contextmanager
    def writing(self, key: str) -> Iterator[Write]:
        """Upload in parts; the object appears when the last one is in."""
        path = self._path(key)
        with _explained(f"cannot write {path}"):
            file = self._files.open(path, "wb", block_size=PART_BYTES, autocommit=False)
            try:
                yield file.write
                file.close()
                with self._finishing(path):
                    file.commit()
            except BaseException:
                # Closing is what would finish the upload.
                file.closed = True
                file.discard()
                raise

    def reading(self, key: str, nbytes: int, spool: Path) -> BinaryIO:
        """Download in ranges."""
        path = self._path(key)
        with _explained(f"cannot read {path}"):
            held = self._files.info(path)["size"]
        if held != nbytes:
            raise PhotonError(f"link: {path} holds {held} bytes, its reference says {nbytes}")
        return download(lambda a, b: self._files.cat_file(path, start=a, end=b), nbytes, spool, path)

    def small(self, key: str, most: int) -> bytes | None:
        """Ask for one byte more than it may have."""
        path = self._path(key)
        with _explained(f"cannot read {path}"):
            try:
                data: bytes = self._files.cat_file(path, start=0, end=most + 1)
            except FileNotFoundError:
                return None
        if len(data) > most:
            raise PhotonError(f"link: {path} has more than {most} bytes")
        return data

    def discard(self, key: str) -> None:
        """Remove the object."""
        path = self._path(key)
        with _explained(f"cannot remove {path}"), suppress(FileNotFoundError):
            self._files.rm_file(path)

    def folders(self, prefix: str) -> list[str]:
        """List the prefix."""
        path = self._path(prefix)
        with _explained(f"cannot list {path}"), suppress(FileNotFoundError):
            entries = self._files.ls(path, detail=True)
            return sorted(
                entry["name"].rstrip("/").rpartition("/")[2]
                for entry in entries
                if entry["type"] == "directory"
            )
        return []

    def remove(self, prefix: str) -> None:
        """Remove the objects, and the parts of uploads that nobody finished."""
        path = self._path(prefix)
        with _explained(f"cannot remove {path}"):
            if self._is_s3:
                self._abort_uploads(path)
            if objects := self._files.find(path):
                self._files.rm(objects)

    # --- presigned requests: what a silo without credentials may do -------------------------------

    def read_url(self, key: str, seconds: int) -> str:
        """Return a URL by which anybody can read the object for some time."""
        with _explained(f"cannot sign {key}"):
            url: str = self._files.url(self._path(key), expires=seconds)
        return url

    def begin_upload(self, key: str, limit: int, seconds: int) -> tuple[str, list[str]]:
        """Begin an upload that somebody else carries out.

        Parameters
        ----------
        limit
            Most bytes that may come.
        seconds
            How long the URLs can be used.

        Returns
        -------
        tuple
            The upload's id, and one URL for each part of ``PART_BYTES``.
        """
        path = self._path(key)
        with _explained(f"cannot begin an upload to {path}"):
            upload = self._call("create_multipart_upload", path)["UploadId"]
            urls = [
                self._files.url(
                    path, expires=seconds, client_method="upload_part", UploadId=upload, PartNumber=number
                )
                for number in range(1, 2 + limit // PART_BYTES)
            ]
        return upload, urls

    def finish_upload(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Make one object of the parts."""
        path = self._path(key)
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        with _explained(f"cannot finish the upload to {path}"), self._finishing(path):
            self._call("complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": parts})

    @contextmanager
    def _finishing(self, path: str) -> Iterator[None]:
        """Pass over the error of a second request to finish an upload: the first one's answer was lost."""
        try:
            yield
        except FileNotFoundError:
            if not self._files.exists(path):
                raise

    def _abort_uploads(self, path: str) -> None:
        bucket, _, prefix = path.partition("/")
        while uploads := self._files.call_s3(
            "list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/"
        ).get("Uploads", []):
            for upload in uploads:
                with suppress(FileNotFoundError):
                    self._call(
                        "abort_multipart_upload", f"{bucket}/{upload['Key']}", UploadId=upload["UploadId"]
                    )

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        bucket, _, name = path.partition("/")
        answer: dict[str, Any] = self._files.call_s3(method, Bucket=bucket, Key=name, **arguments)
        return answer

    def _path(self, key: str) -> str:
        return f"{self._root}/{checked_key(key)}"


def checked_key(key: str) -> str:
    """Return ``key`` if it is a relative path of plain names.

    Raises
    ------
    PhotonError
        If it could lead out of the store.
    """
    if not KEY.fullmatch(key):
        raise PhotonError(f"link: {key!r} is not a key of the store")
    return key


def read_presigned(url: str, nbytes: int, spool: Path) -> BinaryIO:
    """Download an object by a presigned URL, in ranges.

    Raises
    ------
    PhotonError
        If it cannot be read or has another length.
    """
    import requests

    where = f"the object at {urlsplit(url).hostname}"
    session = requests.Session()

    def read(start: int, end: int) -> bytes:
        with session.get(
            url,
            headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
            timeout=TIMEOUT,
            allow_redirects=False,
            stream=True,
        ) as response:
            _check_status(response, 206)
            held = response.headers.get("Content-Range", "").rpartition("/")[2]
            if held != str(nbytes):
                raise PhotonError(f"link: {where} holds {held} bytes, its reference says {nbytes}")
            # Before any of it is read: what comes is no more than was asked for.
            if response.headers.get("Content-Length") != str(end - start):
                raise PhotonError(f"link: {where} answers with another length than was asked for")
            return response.content

    with session:
        return download(read, nbytes, spool, where)


@contextmanager
def write_presigned(urls: Sequence[str]) -> Iterator[tuple[Write, list[str]]]:
    """Upload parts to presigned URLs.

    Yields the function to write with, and the list that the parts' ETags come into; it is complete when the
    block has ended.
    """
    import requests

    held = bytearray()
    etags: list[str] = []

    with requests.Session() as session:

        def send(part: bytes) -> None:
            if len(etags) == len(urls):
                raise PhotonError(
                    f"link: the reply is larger than the {len(urls)} parts that the server takes"
                )

            def put() -> str:
                response = session.put(urls[len(etags)], data=part, timeout=TIMEOUT, allow_redirects=False)
                _check_status(response, 200)
                return response.headers["ETag"]

            etags.append(retried(put, "cannot write the reply"))

        def write(data: memoryview) -> None:
            held.extend(data)
            while len(held) >= PART_BYTES:
                send(bytes(held[:PART_BYTES]))
                del held[:PART_BYTES]

        yield write, etags
        if held or not etags:
            send(bytes(held))


def download(read: Callable[[int, int], bytes], nbytes: int, spool: Path, where: str) -> BinaryIO:
    """Bring an object to a nameless file, which is gone with the last one who uses it.

    Parameters
    ----------
    read
        Reads the bytes from a first to before a last one.
    nbytes
        The object's length.
    spool
        Folder on whose disk the file is.
    where
        What is read, for errors.
    """
    spool.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(spool).free) < nbytes:
        raise PhotonError(f"link: {where} has {nbytes} bytes, {spool} has {free} free; make room")
    file = tempfile.TemporaryFile(dir=spool)  # noqa: SIM115 (the caller closes it)

    def bring(start: int) -> None:
        end = min(start + RANGE_BYTES, nbytes)
        data = retried(lambda: _exactly(read(start, end), end - start), f"cannot read {where}")
        os.pwrite(file.fileno(), data, start)

    try:
        file.truncate(nbytes)
        with ThreadPoolExecutor(STREAMS) as pool:
            list(pool.map(bring, range(0, nbytes, RANGE_BYTES)))
    except BaseException:
        file.close()
        raise
    return file


def retried(action: Callable[[], Result], what: str) -> Result:
    """Return the result of ``action``, tried again after errors that may pass.

    Raises
    ------
    PhotonError
        If it failed for good.
    """
    with _explained(what):
        for attempt in range(1, TRIES):
            try:
                return action()
            except (FileNotFoundError, PermissionError):
                raise
            except OSError:
                # Several silos that failed together do not come back together.
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
        return action()


def _exactly(data: bytes, count: int) -> bytes:
    if len(data) != count:
        raise OSError(f"{len(data)} bytes came instead of {count}")
    return data


def _check_status(response: Any, expected: int) -> None:
    """Raise an error that may pass for the server's trouble, and one that will not for a refusal."""
    code = response.status_code
    if code == expected:
        return
    if code >= 500 or code in (408, 429):
        raise OSError(f"the store answers {code}")
    raise PhotonError(f"link: the store answers {code} {response.reason} to a presigned request")


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a store's library raises into one line."""
    try:
        yield
    except PhotonError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise PhotonError(f"link: {what} ({text})") from error
