"""Records through a local stream, from one process of a silo to another.

A frame is::

    8 bytes     b"photon01"
    8 bytes     length of the header, little-endian
    header      JSON: the sender's fields, and for each record its type and its values; an array record lists
                name, dtype, shape, stype and bytes of its arrays
    payload     the bytes of all arrays, in the order of the header

Arrays go from the sender's memory to the stream and from the stream to the receiver's, without a copy in
between. What a header claims is checked before anything of that size is allocated, and nothing is pickled.
"""

import base64
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BufferedIOBase
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from photon.errors import PhotonError

MAGIC = b"photon01"
#: A header holds the run's configuration and a line per tensor; this is far more than any run has.
MAX_HEADER = 64 * 2**20
MAX_PAYLOAD = 2**40
_START = struct.Struct("<8sQ")
_VALUES = {"config": ConfigRecord, "metric": MetricRecord}


@dataclass(frozen=True)
class Frame:
    """What one process tells another.

    Attributes
    ----------
    fields
        Small facts, as JSON values.
    records
        Content of a message.
    """

    fields: Mapping[str, Any]
    records: RecordDict = field(default_factory=RecordDict)


def write_frame(stream: BufferedIOBase, frame: Frame) -> None:
    """Write a frame to ``stream`` and flush it.

    Parameters
    ----------
    stream
        Buffered; blocks larger than its buffer go through it uncopied.
    """
    records: dict[str, Any] = {}
    arrays: list[bytes] = []
    for name, record in frame.records.items():
        if isinstance(record, ArrayRecord):
            listed = [[key, a.dtype, list(a.shape), a.stype, len(a.data)] for key, a in record.items()]
            records[name] = {"type": "arrays", "arrays": listed}
            arrays.extend(array.data for array in record.values())
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metric"
            records[name] = {"type": kind, "values": {key: _to_json(value) for key, value in record.items()}}
    header = json.dumps({"fields": dict(frame.fields), "records": records}).encode()
    if len(header) > MAX_HEADER:
        raise PhotonError(f"frame: the header has {len(header)} bytes; at most {MAX_HEADER} are accepted")
    stream.write(_START.pack(MAGIC, len(header)))
    stream.write(header)
    for data in arrays:
        stream.write(data)
    stream.flush()


def read_frame(stream: BufferedIOBase, max_payload: int = MAX_PAYLOAD) -> Frame:
    """Read a frame from ``stream``.

    Parameters
    ----------
    max_payload
        Bytes of arrays that are accepted.

    Raises
    ------
    EOFError
        If the stream ends before the frame does.
    PhotonError
        If it is not a frame, or one larger than is accepted.
    """
    magic, length = _START.unpack(_read(stream, _START.size))
    if magic != MAGIC:
        raise PhotonError("frame: the stream does not speak photon's frames")
    if length > MAX_HEADER:
        raise PhotonError(f"frame: the header claims {length} bytes; at most {MAX_HEADER} are accepted")
    try:
        header = json.loads(_read(stream, length))
        fields, listed = header["fields"], header["records"]
        if not isinstance(fields, dict):
            raise TypeError("fields are not an object")
        _check_sizes(listed, max_payload)
        records = RecordDict({name: _record(stream, entry) for name, entry in listed.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PhotonError(f"frame: the header is malformed ({type(error).__name__}: {error})") from error
    return Frame(fields, records)


def _check_sizes(listed: Mapping[str, Any], max_payload: int) -> None:
    total = 0
    for entry in listed.values():
        for name, dtype, shape, stype, size in entry["arrays"] if entry["type"] == "arrays" else ():
            if not all(isinstance(text, str) for text in (name, dtype, stype)):
                raise TypeError("an array's name, dtype and stype are not strings")
            if not isinstance(shape, list) or not all(_is_count(one) for one in [*shape, size]):
                raise TypeError(f"the shape or size of array {name!r} is not made of counts")
            total += size
    if total > max_payload:
        raise PhotonError(f"frame: the arrays claim {total} bytes; at most {max_payload} are accepted")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _record(stream: BufferedIOBase, entry: Mapping[str, Any]) -> ArrayRecord | ConfigRecord | MetricRecord:
    if entry["type"] == "arrays":
        arrays = {
            name: Array(dtype, tuple(shape), stype, _read(stream, size))
            for name, dtype, shape, stype, size in entry["arrays"]
        }
        if len(arrays) != len(entry["arrays"]):
            raise ValueError("an array is listed twice")
        return ArrayRecord(arrays)
    return _VALUES[entry["type"]]({key: _from_json(value) for key, value in entry["values"].items()})


def _read(stream: BufferedIOBase, size: int) -> bytes:
    # A buffered reader reads a large block straight into the bytes that it returns.
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"the stream ended {size - len(data)} bytes early")
    return data


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["base64"], validate=True)
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
