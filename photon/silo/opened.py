"""What a silo remembers of sums that it has helped to unmask: which update was in one, and over which silos.

The difference of two sums with the same update in them may be somebody else's. So a silo lets an update into
sums over the same silos only. Two things tell that an update is the same, whatever a request calls it: its
bits, and, where no fresh noise is added, that it is of the same round of the same run, since what is trained
again comes out as before or nearly so.

The file has a record of 64 bytes for each of the two: the hash of what tells, and the hash of the silos'
names.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from photon.errors import PhotonError
from photon.files.atomic import write_bytes
from photon.files.hashing import new_hasher

#: Bytes of a hash, and of a record.
_HASH, _RECORD = 32, 64
#: Records of a file, which are some 65,000 sums; of more the older half is forgotten.
MOST = 2**17


def round_key(run_id: str, server_round: int) -> bytes:
    """Return what tells a round of a run, whatever model it starts from."""
    return hashlib.sha256(json.dumps([run_id, server_round]).encode()).digest()


def update_key(update: Mapping[str, torch.Tensor]) -> bytes:
    """Return what tells an update: a hash of its names and bits."""
    hasher = new_hasher()
    for name in sorted(update):
        tensor = update[name].detach().cpu().contiguous()
        hasher.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return bytes(hasher.digest())


class Opened:
    """The sums that a participant has helped to unmask.

    Parameters
    ----------
    folder
        The participant's own folder, which is the same for all runs.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "opened.bin"

    def last(self, key: bytes) -> bytes | None:
        """Return over which silos the last sum was, as `silos_key`; None: there was none.

        Raises
        ------
        PhotonError
            If the file cannot be read.
        """
        data = self._read()
        # From the end, where what is asked for most likely is.
        for begin in range(len(data) - _RECORD, -1, -_RECORD):
            if data[begin : begin + _HASH] == key:
                return data[begin + _HASH : begin + _RECORD]
        return None

    def add(self, keys: Collection[bytes], silos: Collection[str]) -> None:
        """Remember a sum; it is on the disk when this returns.

        Raises
        ------
        PhotonError
            If the file cannot be read.
        """
        data = self._read()
        if len(data) + len(keys) * _RECORD > MOST * _RECORD:
            data = data[-(MOST // 2) * _RECORD :]
        write_bytes(self._path, data + b"".join(key + silos_key(silos) for key in keys), mode=0o600)

    def _read(self) -> bytes:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise PhotonError(f"{self._path}: cannot be read ({type(error).__name__})") from error
        if len(data) % _RECORD:
            raise PhotonError(f"{self._path}: is damaged; put it back from a copy")
        return data


def silos_key(silos: Collection[str]) -> bytes:
    """Return what tells a set of silos."""
    return hashlib.sha256(json.dumps(sorted(silos)).encode()).digest()
