"""State groups to Flower records and back.

A message holds one ``ArrayRecord`` per state group (its name is the group's) and a ``ConfigRecord`` named
``link`` that says for every tensor which codecs were applied. Array bytes are the tensor's own memory, so
bfloat16 travels as it is and nothing is pickled.
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from photon.errors import PhotonError
from photon.link.codecs import DTYPES, Codec, decode, dtype_name, encode

#: Flower's label for how an array's bytes are to be read: a tensor's memory, row-major.
RAW = "photon.raw"
HEADER = "link"
FORMAT = 1
#: Key of the header where the tensors lie in a store: how many bytes that are.
STORED_BYTES = "stored-bytes"

Groups = Mapping[str, Mapping[str, torch.Tensor]]


def encode_groups(groups: Groups, codecs: Sequence[Codec] = ()) -> RecordDict:
    """Turn state groups into records.

    Parameters
    ----------
    groups
        Group name to tensor name to tensor.
    codecs
        Applied in order to every floating-point tensor.

    Returns
    -------
    RecordDict
        One ``ArrayRecord`` per group and the header.
    """
    records = RecordDict()
    header: dict[str, Any] = {"format": FORMAT, "groups": {}}
    for group, tensors in groups.items():
        arrays: dict[str, Array] = {}
        entries = header["groups"].setdefault(group, {})
        for name, tensor in tensors.items():
            sent, steps = encode(tensor, codecs if tensor.is_floating_point() else ())
            arrays[name] = _to_array(sent)
            if steps:
                entries[name] = steps
        records[group] = ArrayRecord(arrays)
    records[HEADER] = ConfigRecord({"header": json.dumps(header)})
    return records


def decode_groups(records: RecordDict) -> dict[str, dict[str, torch.Tensor]]:
    """Turn records back into state groups.

    The tensors to which no codec was applied share the records' memory and must not be written to.

    Raises
    ------
    PhotonError
        If the header is missing or malformed, or an array's bytes do not add up to its shape.
    """
    header = _read_header(records)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for group, entries in header.items():
        # Not records.array_records: that view is a reference cycle, which keeps the whole message in memory
        # until the garbage collector happens to run.
        arrays = records.get(group)
        if not isinstance(arrays, ArrayRecord):
            raise PhotonError(f"link: the message lacks the group '{group}' that its header lists")
        groups[group] = {
            name: decode(_to_tensor(array, f"{group}/{name}"), entries.get(name, []))
            for name, array in arrays.items()
        }
    return groups


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
    return count if isinstance(count, int) else 0


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
    if any(size < 0 for size in array.shape):
        raise PhotonError(f"link: {where} has the impossible shape {array.shape}")
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


def _read_header(records: RecordDict) -> dict[str, dict[str, list[dict[str, Any]]]]:
    record = records.get(HEADER)
    text = record.get("header") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise PhotonError("link: the message has no header; it does not come from photon")
    try:
        header = json.loads(text)
        version, groups = header["format"], header["groups"]
        well_formed = isinstance(groups, dict) and all(
            isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
            for entries in groups.values()
            for steps in entries.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PhotonError(f"link: the message's header cannot be read ({error!r})") from error
    if version != FORMAT:
        raise PhotonError(f"link: the header has format {version}, this photon reads {FORMAT}; update photon")
    if not well_formed:
        raise PhotonError("link: the message's header is malformed")
    return groups
