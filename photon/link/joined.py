"""All arrays of a message as one: how messages cross a SuperLink.

Flower makes an object of every array, and each costs a request, a row in a database and a hash on every hop;
a model of fifty tensors spent most of a round on them. So what crosses a SuperLink has one array, which holds
the bytes of all, and a record that says what they are. Participants that are sent the same arrays still share
it, because their own requests are records beside it.
"""

import json
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link import BODY

#: Names of the record with the array, and of the one that lists what is in it.
JOINED, PARTS = "joined", "parts"
_BYTES = "bytes"
_STYPE = "photon.joined"
#: Characters of the list. A model has a line of some hundred for each tensor.
MAX_PARTS = 2**26


def crosses_superlink(content: RecordDict) -> bool:
    """Tell whether a request belongs to a run whose messages pass a SuperLink and SuperNodes."""
    record = content.get(BODY)
    return isinstance(record, ConfigRecord) and record.get("engine") == "deployment"


class Joiner:
    """Joins the arrays of one message after the other; equal ones in a row share what comes of it."""

    def __init__(self) -> None:
        self._arrays: dict[str, ArrayRecord] = {}
        self._joined: dict[str, ArrayRecord | ConfigRecord] = {}

    def join(self, content: RecordDict) -> RecordDict:
        """Return the content of a message with all of its arrays in one; as it is where there are none."""
        arrays = {name: record for name, record in content.items() if isinstance(record, ArrayRecord)}
        if not arrays:
            return content
        last = self._arrays
        if arrays.keys() != last.keys() or any(arrays[name] is not last[name] for name in arrays):
            self._arrays, self._joined = arrays, _joined(arrays)
        others = {name: record for name, record in content.items() if name not in arrays}
        return RecordDict({**others, **self._joined})


def _joined(arrays: dict[str, ArrayRecord]) -> dict[str, ArrayRecord | ConfigRecord]:
    listed = {
        name: [[key, one.dtype, list(one.shape), one.stype, len(one.data)] for key, one in record.items()]
        for name, record in arrays.items()
    }
    data = b"".join(one.data for record in arrays.values() for one in record.values())
    return {
        JOINED: ArrayRecord({_BYTES: Array("uint8", (len(data),), _STYPE, data)}),
        PARTS: ConfigRecord({"parts": json.dumps(listed)}),
    }


def part(content: RecordDict) -> RecordDict:
    """Return the content of a message as it was before it was joined.

    Raises
    ------
    PhotonError
        If the list is malformed, or does not add up to the array.
    """
    if JOINED not in content:
        return content
    try:
        return _parted(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PhotonError(f"message: its arrays cannot be told apart ({type(error).__name__})") from error


def _parted(content: RecordDict) -> RecordDict:
    joined, parts = content[JOINED], content[PARTS]
    if not isinstance(joined, ArrayRecord) or not isinstance(parts, ConfigRecord) or len(joined) != 1:
        raise TypeError
    data = memoryview(joined[_BYTES].data)
    text = parts["parts"]
    if not isinstance(text, str) or len(text) > MAX_PARTS:
        raise TypeError
    listed: dict[str, list[list[Any]]] = json.loads(text)
    for entry in (entry for entries in listed.values() for entry in entries):
        _check_entry(*entry)
    if sum(entry[4] for entries in listed.values() for entry in entries) != len(data):
        raise ValueError
    parted = RecordDict({name: record for name, record in content.items() if name not in (JOINED, PARTS)})
    begin = 0
    for name, entries in listed.items():
        arrays = {}
        for key, dtype, shape, stype, size in entries:
            arrays[key] = Array(dtype, tuple(shape), stype, bytes(data[begin : begin + size]))
            begin += size
        if name in parted or len(arrays) != len(entries):
            raise ValueError
        parted[name] = ArrayRecord(arrays)
    return parted


def _check_entry(key: object, dtype: object, shape: object, stype: object, size: object) -> None:
    if not all(isinstance(text, str) for text in (key, dtype, stype)) or not isinstance(shape, list):
        raise TypeError
    for one in [*shape, size]:
        if not isinstance(one, int) or isinstance(one, bool) or one < 0:
            raise TypeError
