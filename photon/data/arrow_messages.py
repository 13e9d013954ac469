"""What comes out of the compressed messages of an Arrow stream, told before anything is unpacked.

The metadata of a message are a flatbuffer; of it pyarrow shows too little. Its layout is that of Arrow's
``Message.fbs``.
"""

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# Places of fields in their tables.
_HEADER = 2
_BUFFERS, _COMPRESSION = 2, 3
_DATA = 1


def batches_unpacked(source: Any) -> Iterator[int]:
    """Yield, for each batch of a stream, the bytes that come out of it and the dictionaries before it.

    What is not compressed counts nothing: it stays in the file.

    Raises
    ------
    pyarrow.ArrowException, struct.error
        If the stream is damaged.
    """
    import pyarrow as pa

    size = 0
    for message in pa.ipc.MessageReader.open_stream(source):
        if message.type in ("dictionary", "record batch"):
            size += _unpacked(message)
        if message.type == "record batch":
            yield size
            size = 0


def _unpacked(message: "pa.Message") -> int:
    metadata, body = memoryview(message.metadata), memoryview(message.body)
    batch = _table(metadata, _place(metadata, _int(metadata, "<I", 0), _HEADER))
    if message.type == "dictionary":
        batch = _table(metadata, _place(metadata, batch, _DATA))
    compression, buffers = (_place(metadata, batch, field) for field in (_COMPRESSION, _BUFFERS))
    if not compression or not buffers:
        return 0
    vector = _table(metadata, buffers)
    size = 0
    for number in range(_int(metadata, "<I", vector)):
        offset, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * number)
        if length >= 8 and offset >= 0:
            # -1: this buffer is not compressed.
            size += max(0, _int(body, "<q", offset))
    return size


def _int(data: memoryview, layout: str, place: int) -> int:
    return int(struct.unpack_from(layout, data, place)[0])


def _table(data: memoryview, place: int) -> int:
    return place + _int(data, "<I", place)


def _place(data: memoryview, table: int, field: int) -> int:
    """Return where a field of a table lies; 0: it has none."""
    about = table - _int(data, "<i", table)
    if 4 + 2 * field >= _int(data, "<H", about):
        return 0
    offset = _int(data, "<H", about + 4 + 2 * field)
    return table + offset if offset else 0
