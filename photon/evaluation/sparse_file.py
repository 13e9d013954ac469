"""A sparse model in one safetensors file: the weights that are not zero, and a bit for each weight."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from photon.errors import PhotonError
from photon.link.bits import pack_bits, packed_bytes, unpack_bits

NAME = "sparse.safetensors"
FORMAT = "photon-sparse/1"
#: A tensor with fewer zeros than this is written as it is.
LEAST_ZEROS = 0.1


def save_sparse(path: Path, params: Mapping[str, torch.Tensor]) -> None:
    """Write parameters; a sparse one as ``NAME.mask`` (bits, the first the lowest) and ``NAME.values``."""
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in params.items():
        mask = tensor != 0
        if int(mask.sum()) > (1 - LEAST_ZEROS) * tensor.numel():
            tensors[name] = tensor.detach().contiguous()
            continue
        shapes[name] = list(tensor.shape)
        tensors[f"{name}.mask"] = pack_bits(mask.flatten(), 1)
        tensors[f"{name}.values"] = tensor.detach()[mask]
    save_file(tensors, path, metadata={"format": FORMAT, "shapes": json.dumps(shapes)})


def load_sparse(path: Path) -> dict[str, torch.Tensor]:
    """Read what :func:`save_sparse` wrote, as dense tensors.

    Raises
    ------
    PhotonError
        If the file is damaged, or masks, values and shapes do not add up.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise PhotonError(f"{path}: format {metadata.get('format')}, this photon reads {FORMAT}")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        for name, shape in shapes.items():
            stored[name] = _dense(stored.pop(f"{name}.mask"), stored.pop(f"{name}.values"), shape)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise PhotonError(f"{path}: damaged ({error!r}); export the run again") from error
    return stored


def _dense(bits: torch.Tensor, values: torch.Tensor, shape: list[int]) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.shape != (packed_bytes(count, 1),):
        raise ValueError(f"a mask of {tuple(bits.shape)} {bits.dtype} for {count} weights")
    mask = unpack_bits(bits, 1, count).to(torch.bool)
    if values.shape != (int(mask.sum()),):
        raise ValueError(f"{tuple(values.shape)} values for a mask of {int(mask.sum())}")
    dense = torch.zeros(count, dtype=values.dtype)
    dense[mask] = values
    return dense.view(shape)
