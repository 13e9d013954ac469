"""Which part of a model all federations share, and which layers are a federation's own."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from photon.config.expression import expression
from photon.errors import PhotonError

#: Number of a transformer block in a parameter's name.
_BLOCK = re.compile(r"\.(\d+)\.")
#: Name of the key block that holds key parameters outside of the numbered blocks.
OUTSIDE = "outside"


@dataclass(frozen=True)
class Partition:
    """A disjoint and complete division of the parameters.

    Attributes
    ----------
    backbone
        Names of the shared parameters, sorted.
    keys
        Names of the parameters of each key block, by the block's number as text (`OUTSIDE` for what is in
        no numbered block).
    """

    backbone: tuple[str, ...]
    keys: Mapping[str, tuple[str, ...]]

    @property
    def key_names(self) -> tuple[str, ...]:
        """Names of all key parameters."""
        return tuple(name for names in self.keys.values() for name in names)


def partition(
    params: Collection[str],
    *,
    key_fraction: float,
    key_blocks: str | Sequence[str],
    embeddings: str = "backbone",
) -> Partition:
    """Divide parameters into the shared backbone and key blocks.

    Parameters
    ----------
    params
        Names of all parameters; ``h.3.mlp.weight`` is of block 3.
    key_fraction
        Share of the blocks that are key blocks: ⌈share · blocks⌉ of them. 0: none; 1: the whole model,
        embeddings and final norm included.
    key_blocks
        ``"last"``: the blocks nearest to the output; ``"spread"``: evenly over the depth; or regular
        expressions for names of key parameters, in the place of a share.
    embeddings
        ``"key"`` makes what is in no block (embeddings, final norm) a key block, too; ``"restricted"``: it
        must not be in one.

    Raises
    ------
    PhotonError
        If an expression is none, fits no parameter, or one that is to be restricted, or the model has no
        numbered blocks.
    """
    if isinstance(key_blocks, str):
        keys = _key_blocks(params, key_fraction, key_blocks)
    else:
        keys = set()
        for pattern in key_blocks:
            wanted = expression(pattern, "strategy.key_blocks")
            found = {name for name in params if wanted.search(name)}
            if not found:
                raise PhotonError(
                    f"strategy.key_blocks: {pattern!r} fits no parameter; there are such as {min(params)}"
                )
            keys |= found
    if embeddings == "key" or key_fraction == 1:
        keys |= {name for name in params if not _BLOCK.search(name)}
    outside = sorted(name for name in keys if not _BLOCK.search(name))
    if embeddings == "restricted" and outside:
        raise PhotonError(
            f"strategy.embeddings=restricted: {outside[0]} would be a key layer, and what is in no block is "
            "shared; change strategy.key_blocks, or set strategy.embeddings=key"
        )
    blocks: dict[str, list[str]] = {}
    for name in sorted(keys):
        found_block = _BLOCK.search(name)
        blocks.setdefault(found_block[1] if found_block else OUTSIDE, []).append(name)
    ordered = sorted(blocks, key=lambda block: (block == OUTSIDE, block.zfill(6)))
    return Partition(tuple(sorted(set(params) - keys)), {block: tuple(blocks[block]) for block in ordered})


def _key_blocks(params: Collection[str], key_fraction: float, which: str) -> set[str]:
    numbers = {name: int(found[1]) for name in params if (found := _BLOCK.search(name))}
    count = len(set(numbers.values()))
    if count == 0:
        raise PhotonError(
            "strategy.key_blocks: the model has no numbered blocks; name its key parameters by expressions"
        )
    # 0.3 · 10 is a little more than 3.
    chosen = math.ceil(round(key_fraction * count, 9))
    if which == "last":
        blocks = set(range(count - chosen, count))
    else:
        blocks = {math.floor((index + 0.5) * count / chosen) for index in range(chosen)}
    return {name for name, block in numbers.items() if block in blocks}


def flatten(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> torch.Tensor:
    """Return vec(k): the values of some parameters one after another, in float32."""
    return torch.cat([tensors[name].detach().reshape(-1).to(torch.float32) for name in names])
