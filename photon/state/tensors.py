"""State groups in safetensors files: memory-mapped on reading, never pickled."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from photon.errors import PhotonError

StateGroups = dict[str, dict[str, torch.Tensor]]
#: What the names of groups begin with that are not the model's or the local optimizer's, before a slash.
NAMESPACES = ("local", "shared", "fixed")
#: Group to name to the first byte of a tensor in a file, and the one behind its last.
Places = dict[str, dict[str, tuple[int, int]]]


def save_groups(path: Path, groups: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write state groups to one file, under ``group/name`` keys.

    Tensors that are one in memory, as equal ones of a message may be, are written each for itself.

    Raises
    ------
    OSError
        If the disk takes no more.
    """
    flat: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            whole = tensor.detach().cpu().contiguous()
            place = whole.data_ptr()
            flat[f"{group}/{name}"] = whole.clone() if place in places else whole
            places.add(place)
    try:
        save_file(flat, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def places(path: Path) -> Places:
    """Return where each tensor lies in a file that :func:`save_groups` wrote."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found: Places = {}
    for key, entry in header.items():
        if key != "__metadata__":
            group, name = _split(key)
            begin, end = entry["data_offsets"]
            found.setdefault(group, {})[name] = (8 + length + begin, 8 + length + end)
    return found


def load_groups(path: Path) -> StateGroups:
    """Read what :func:`save_groups` wrote.

    The tensors are private memory maps of the file: reading costs nothing until a tensor is touched, and
    writing to one does not change the file.

    Raises
    ------
    PhotonError
        If the file is missing or damaged.
    """
    try:
        flat = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PhotonError(f"{path}: cannot be read ({error}); resume from an older checkpoint") from error
    groups: StateGroups = {}
    for key in sorted(flat):
        group, name = _split(key)
        groups.setdefault(group, {})[name] = flat[key]
    return groups


def _split(key: str) -> tuple[str, str]:
    """Return group and name; a method's own groups have a namespace before a slash of their own."""
    namespace, _, rest = key.partition("/")
    if namespace not in NAMESPACES:
        return namespace, rest
    group, _, name = rest.partition("/")
    return f"{namespace}/{group}", name


def averaged_file(group: str) -> str:
    """Return the name of the file that holds a state group's average."""
    return f"averaged-{group}.safetensors"
