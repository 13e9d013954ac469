"""State groups to Flower records and back.

A message holds one ``ArrayRecord`` per state group (its name is the group's) and a ``ConfigRecord`` named
``link`` that says for every encoded tensor how it becomes a tensor again. Array bytes are the tensor's own
memory or its payload, and nothing is pickled.
"""

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

import photon.link.codecs  # noqa: F401  it fills the registry that names are looked up in
from photon.errors import PhotonError
from photon.link.encoding import (
    DTYPES,
    MAX_DIMENSIONS,
    Encoding,
    Packed,
    PackedGroups,
    Pipelines,
    SparseTensor,
    dtype_name,
    is_possible,
    pack_groups,
    unpack,
)

#: Flower's label for how an array's bytes are to be read: a tensor's memory, row-major.
RAW = "photon.raw"
HEADER = "link"
FORMAT = 3
#: Key of the header where the tensors lie in a store: how many bytes that are.
STORED_BYTES = "stored-bytes"
#: Bytes that a message may be said to have in a store.
MAX_STORED = 2**50

Groups = Mapping[str, Mapping[str, torch.Tensor]]
#: Group name to tensor name to the shape that a tensor must have.
Shapes = Mapping[str, Mapping[str, torch.Size]]
#: State groups as they are decoded.
Decoded = dict[str, dict[str, torch.Tensor | SparseTensor]]


def encode_groups(groups: Groups, pipelines: Pipelines | None = None) -> RecordDict:
    """Turn state groups into records.

    Parameters
    ----------
    groups
        Group name to tensor name to tensor.
    pipelines
        Codecs to apply; by default none.
    """
    return records_of(pack_groups(groups, pipelines or Pipelines()))


def records_of(groups: PackedGroups) -> RecordDict:
    """Return one ``ArrayRecord`` per group and the header."""
    records = RecordDict()
    header: dict[str, dict[str, Any]] = {}
    for group, tensors in groups.items():
        records[group] = ArrayRecord({name: _to_array(packed.data) for name, packed in tensors.items()})
        header[group] = {
            name: packed.encoding.model_dump(exclude_none=True)
            for name, packed in tensors.items()
            if packed.encoding
        }
    records[HEADER] = ConfigRecord({"header": json.dumps({"format": FORMAT, "groups": header})})
    return records


def decode_groups(records: RecordDict, expected: Shapes | None = None) -> Decoded:
    """Turn records back into state groups.

    The tensors to which no codec was applied share the records' memory and must not be written to.

    Parameters
    ----------
    expected
        Shapes that the tensors must have, before anything of their size is allocated; None if the sender is
        trusted. A group that it lacks is refused.

    Raises
    ------
    PhotonError
        If the header is missing or malformed, or an array's bytes do not add up to its shape.
    """
    header = _read_header(records)
    groups: Decoded = {}
    for group, entries in header.items():
        # Not records.array_records: that view is a reference cycle, which keeps the whole message in memory
        # until the garbage collector happens to run.
        arrays = records.get(group)
        if not isinstance(arrays, ArrayRecord):
            raise PhotonError(f"link: the message lacks the group '{group}' that its header lists")
        groups[group] = {}
        for name, array in arrays.items():
            where = f"{group}/{name}"
            shape = expected_shape(expected, group, name)
            packed = Packed(_to_tensor(array, where), entries.get(name))
            groups[group][name] = unpack(packed, where, shape)
    return groups


def dense_groups(groups: Decoded) -> dict[str, dict[str, torch.Tensor]]:
    """Return state groups with every sparse tensor made dense; groups that are dense already as they are."""
    return {group: _dense(tensors) for group, tensors in groups.items()}


def _dense(tensors: dict[str, torch.Tensor | SparseTensor]) -> dict[str, torch.Tensor]:
    if not any(isinstance(tensor, SparseTensor) for tensor in tensors.values()):
        return cast(dict[str, torch.Tensor], tensors)
    return {name: t.dense() if isinstance(t, SparseTensor) else t for name, t in tensors.items()}


def expected_shape(expected: Shapes | None, group: str, name: str) -> torch.Size | None:
    """Return the shape that a tensor must have.

    Raises
    ------
    PhotonError
        If no such tensor is expected.
    """
    if expected is None:
        return None
    if name not in expected.get(group, {}):
        raise PhotonError(f"link: {group}/{name} was not expected")
    return expected[group][name]


def count_bytes(records: RecordDict) -> int:
    """Return the bytes of ``records`` on the wire: tensor bytes, array headers and all other records.

    What the records refer to in a store counts as if it were inside. Flower's own framing around the message
    comes on top.
    """
    total = _bytes_in_store(records)
    for name, record in records.items():
        total += len(name)
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                total += (
                    len(array.data) + len(key) + len(array.dtype) + len(array.stype) + 8 * len(array.shape)
                )
        else:
            total += sum(len(key) + _value_bytes(value) for key, value in record.items())
    return total


def _bytes_in_store(records: RecordDict) -> int:
    header = records.get(HEADER)
    count = header.get(STORED_BYTES) if isinstance(header, ConfigRecord) else None
    # The sender's word, and what is rejected is counted, too.
    return count if isinstance(count, int) and 0 <= count <= MAX_STORED else 0


def _value_bytes(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, list):
        return sum(_value_bytes(item) for item in value)
    return 8


def _to_array(tensor: torch.Tensor) -> Array:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return Array(dtype_name(tensor.dtype), tuple(tensor.shape), RAW, flat.cpu().numpy().tobytes())


def _to_tensor(array: Array, where: str) -> torch.Tensor:
    if array.stype != RAW or array.dtype not in DTYPES:
        raise PhotonError(f"link: {where} has an unknown encoding ({array.stype}, {array.dtype})")
    dtype = DTYPES[array.dtype]
    if len(array.shape) > MAX_DIMENSIONS or not is_possible(array.shape):
        raise PhotonError(f"link: {where} has an impossible shape")
    expected = math.prod(array.shape) * dtype.itemsize
    if len(array.data) != expected:
        raise PhotonError(
            f"link: {where} holds {len(array.data)} bytes, but its shape {tuple(array.shape)} of "
            f"{array.dtype} needs {expected}"
        )
    if expected == 0:
        return torch.empty(tuple(array.shape), dtype=dtype)
    with warnings.catch_warnings():
        # The bytes are read-only; so is what is made from them, by contract.
        warnings.simplefilter("ignore", UserWarning)
        flat = torch.from_numpy(np.frombuffer(array.data, dtype=np.uint8))
    return flat.view(dtype).reshape(tuple(array.shape))


def _read_header(records: RecordDict) -> dict[str, dict[str, Encoding]]:
    record = records.get(HEADER)
    text = record.get("header") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise PhotonError("link: the message has no header; it does not come from photon")
    try:
        header = json.loads(text)
        version, groups = header["format"], header["groups"]
        if version != FORMAT:
            raise PhotonError(
                f"link: the header has format {version}, this photon reads {FORMAT}; update photon"
            )
        return {
            group: {name: Encoding.model_validate(entry) for name, entry in entries.items()}
            for group, entries in groups.items()
        }
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise PhotonError(f"link: the message's header is malformed ({where}: {problem['msg']})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PhotonError(f"link: the message's header cannot be read ({error!r})") from error
