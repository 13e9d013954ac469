"""Records carry state groups exactly, count their bytes, and refuse what does not add up."""

import gc
import json
import weakref
from collections.abc import Callable

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link.codecs import Cast
from photon.link.encoding import Pipelines
from photon.link.records import HEADER, RAW, count_bytes, decode_groups, encode_groups


def groups() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        "params": {
            "a.weight": torch.randn(3, 4, generator=generator),
            "b": torch.randn(5, generator=generator).to(torch.bfloat16),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        },
        "exp_avg": {"a.weight": torch.randn(4, 3, generator=generator).T},
    }


def test_round_trip_is_exact_for_every_dtype_and_layout() -> None:
    sent = groups()
    received = decode_groups(encode_groups(sent))
    assert {g: set(t) for g, t in received.items()} == {g: set(t) for g, t in sent.items()}
    for group, tensors in sent.items():
        for name, tensor in tensors.items():
            assert received[group][name].dtype == tensor.dtype
            assert received[group][name].shape == tensor.shape
            assert torch.equal(received[group][name], tensor)


@pytest.mark.parametrize("values", [[0.0], [1.0, -1.0], [float("inf"), float("nan")], [1e-45, 3e38]])
def test_cast_rounds_as_torch_does(values: list[float]) -> None:
    tensor = torch.tensor(values)
    received = decode_groups(encode_groups({"params": {"w": tensor}}, Pipelines([Cast("bfloat16")])))[
        "params"
    ]["w"]
    assert received.dtype == torch.float32
    assert torch.equal(received.nan_to_num(7.0), tensor.to(torch.bfloat16).float().nan_to_num(7.0))


def test_counted_bytes_are_payload_plus_headers() -> None:
    tensor = torch.randn(1000, 10)
    dense = encode_groups({"params": {"w": tensor}})
    overhead = count_bytes(dense) - tensor.nbytes
    assert 0 < overhead < 200
    assert sum(len(array.data) for array in dense.array_records["params"].values()) == tensor.nbytes
    cast = encode_groups({"params": {"w": tensor}}, Pipelines([Cast("bfloat16")]))
    assert sum(len(array.data) for array in cast.array_records["params"].values()) == tensor.nbytes // 2


def broken(change: Callable[[RecordDict], None]) -> RecordDict:
    records = encode_groups({"params": {"w": torch.ones(4)}})
    change(records)
    return records


def set_array(array: Array) -> Callable[[RecordDict], None]:
    return lambda records: records.update({"params": ArrayRecord({"w": array})})


def set_header(text: str) -> Callable[[RecordDict], None]:
    return lambda records: records.update({HEADER: ConfigRecord({"header": text})})


def header(params: object) -> str:
    return json.dumps({"format": 3, "groups": {"params": params}})


def encoding(codec: str = "cast", version: int = 1, arguments: object = None) -> dict[str, object]:
    arguments = {"dtype": "bfloat16"} if arguments is None else arguments
    entry = {"codec": codec, "version": version, "arguments": arguments}
    return {"shape": [4], "dtype": "float32", "codecs": [entry], "blake3": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop(HEADER), "no header"),
        (lambda r: r.pop("params"), "lacks the group 'params'"),
        (set_array(Array("float32", (4,), RAW, b"123")), "holds 3 bytes.*needs 16"),
        (set_array(Array("float32", (2**40,), RAW, b"1234")), "needs"),
        (set_array(Array("float32", (-4,), RAW, b"")), "impossible shape"),
        (set_array(Array("float32", (0, 2**62, 2**62), RAW, b"")), "impossible shape"),
        (set_array(Array("float32", (1,) * 70, RAW, b"1234")), "impossible shape"),
        (set_array(Array("object", (1,), RAW, b"12345678")), "unknown encoding"),
        (set_array(Array("float32", (1,), "numpy.ndarray", b"1234")), "unknown encoding"),
        (set_header("{"), "cannot be read"),
        (set_header("[]"), "cannot be read"),
        (set_header(json.dumps({"format": 99, "groups": {}})), "format 99"),
        (set_header(header(3)), "cannot be read"),
        (set_header(header({"w": 3})), "malformed"),
        (set_header(header({"w": {"shape": [4]}})), "malformed"),
        (set_header(header({"w": encoding()})), "not made of bytes"),
        (set_header(header({"w": encoding(codec="casst")})), "unknown codec 'casst'; did you mean 'cast'"),
        (set_header(header({"w": encoding(version=9)})), "version 9"),
        (set_header(header({"w": encoding(arguments={})})), "cannot be decoded"),
        (set_header(header({"w": encoding(arguments={"dtype": "int8"})})), "cannot be decoded"),
        (set_header(header({"w": encoding(arguments={"dtype": 1})})), "dtype is of another type"),
        (set_header("[" * 10**5), "cannot be read"),
    ],
)
def test_malformed_records_are_refused(change: Callable[[RecordDict], None], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        decode_groups(broken(change))


def test_a_message_is_freed_with_its_last_reference() -> None:
    """A reply is as large as the model; it must not wait for the garbage collector."""
    records = encode_groups({"params": {"w": torch.ones(8)}})
    record = weakref.ref(records["params"])
    gc.disable()
    try:
        groups = decode_groups(records)
        del records
        assert record() is None
        assert groups["params"]["w"].sum() == 8
    finally:
        gc.enable()
