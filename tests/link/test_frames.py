import contextlib
import io
import json
import math
import socket
import struct
import threading
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from photon.errors import PhotonError
from photon.link.frames import MAGIC, Frame, read_frame, write_frame

#: Far above what the frames of these tests hold, far below what a machine could not give.
LIMIT = 10**6


def written(frame):
    stream = io.BytesIO()
    write_frame(stream, frame)
    return stream.getvalue()


def read(data):
    return read_frame(io.BytesIO(data), max_payload=LIMIT)


def content(record):
    """What a record holds, with the types of its values."""
    if isinstance(record, ArrayRecord):
        return {name: (a.dtype, a.shape, a.stype, a.data) for name, a in record.items()}
    return {key: (type(value), repr(value)) for key, value in record.items()}


def assert_equal(one, other):
    assert one.fields == other.fields
    assert list(one.records) == list(other.records)
    for name, record in one.records.items():
        assert type(record) is type(other.records[name])
        assert content(record) == content(other.records[name])


def whole_frame():
    arrays = ArrayRecord(
        {
            "a.weight": Array("bfloat16", (2, 3), "photon.raw", bytes(range(12))),
            "empty": Array("float32", (0, 4), "photon.raw", b""),
            "numpy": Array(np.arange(5.0)),
        }
    )
    config = ConfigRecord(
        {
            "text": "a\nline, ünïcode",
            "raw": b"\x00\xff",
            "flag": True,
            "number": 2**62,
            "real": 0.1,
            "many": [b"", b"1"],
            "flags": [True, False],
            "none": [],
        }
    )
    metrics = MetricRecord({"loss": math.inf, "steps": 3, "all": [1.5, 2.5]})
    return Frame({"kind": "train", "n": 1}, RecordDict({"params": arrays, "photon": config, "m": metrics}))


def test_a_frame_comes_back_as_it_was():
    assert_equal(read(written(whole_frame())), whole_frame())
    assert_equal(read(written(Frame({}))), Frame({}))


def test_frames_follow_each_other_through_a_socket_and_large_arrays_are_not_copied():
    size = 8 * 2**20
    big = Frame(
        {}, RecordDict({"params": ArrayRecord({"w": Array("uint8", (size,), "photon.raw", bytes(size))})})
    )
    here, there = socket.socketpair()
    with here, there, here.makefile("rwb") as sender, there.makefile("rwb") as receiver:
        tracemalloc.start()
        thread = threading.Thread(target=lambda: [write_frame(sender, f) for f in (big, whole_frame())])
        thread.start()
        first = read_frame(receiver)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert_equal(first, big)
        assert_equal(read_frame(receiver), whole_frame())
        thread.join()
        sender.close()
        here.shutdown(socket.SHUT_RDWR)
        with pytest.raises(EOFError):
            read_frame(receiver)
    # The received array itself, and nothing else of its size on either side.
    assert peak < 1.2 * size


def with_header(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + struct.pack("<Q", len(text)) + text + payload


def arrays(*listed):
    return {"fields": {}, "records": {"params": {"type": "arrays", "arrays": list(listed)}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak photon's frames"),
        (MAGIC + struct.pack("<Q", 2**60), "header claims 1152921504606846976 bytes"),
        (with_header(b"{"), "malformed"),
        (with_header(b"[" * 100_000), "malformed"),
        (with_header([]), "malformed"),
        (with_header({"fields": {}, "records": {"m": {"type": "pickle", "values": {}}}}), "malformed"),
        (
            with_header({"fields": {}, "records": {"m": {"type": "metric", "values": {"a": "b"}}}}),
            "malformed",
        ),
        (
            with_header({"fields": {}, "records": {"m": {"type": "config", "values": {"a": None}}}}),
            "malformed",
        ),
        (with_header(arrays(["w", "float32", [1], "raw", 2**50])), "arrays claim 1125899906842624 bytes"),
        (with_header(arrays(["w", "float32", [1], "raw", -4])), "not made of counts"),
        (with_header(arrays(["w", "float32", [-1], "raw", 4])), "not made of counts"),
        (with_header(arrays(["w", "float32", [True], "raw", 4])), "not made of counts"),
        (with_header(arrays(["w", "float32", [], "raw", 1], ["w", "float32", [], "raw", 1]), b"ab"), "twice"),
    ],
)
def test_what_is_no_frame_is_refused(data, message):
    with pytest.raises(PhotonError, match=message):
        read(data)


def test_a_stream_that_ends_is_told_apart():
    data = written(whole_frame())
    for end in (0, 5, 16, 40, len(data) - 1):
        with pytest.raises(EOFError):
            read(data[:end])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_frames_are_read_or_refused_and_nothing_else(data):
    frame = bytearray(written(whole_frame()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        cut = data.draw(st.integers(0, 3))
        frame[place : place + cut] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"]", b"-1", b"9" * 30])
        )
    with contextlib.suppress(PhotonError, EOFError):
        read(bytes(frame))


VALUES = st.one_of(
    st.text(),
    st.binary(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(st.binary()),
    st.lists(st.floats()),
)


@given(st.dictionaries(st.text(), VALUES), st.dictionaries(st.text(), st.floats() | st.lists(st.integers())))
def test_all_values_that_records_take_survive(config, metrics):
    frame = Frame({}, RecordDict({"c": ConfigRecord(config), "m": MetricRecord(metrics)}))
    assert_equal(read(written(frame)), frame)
