"""Backbone and key layers: disjoint, complete, and chosen as asked."""

import pytest
import torch

from photon.errors import PhotonError
from photon.models.partition import OUTSIDE, partition

NAMES = [
    "wte.weight",
    "ln_f.weight",
    *(f"h.{block}.{part}.weight" for block in range(10) for part in ("attn", "mlp")),
]


def blocks(fraction: float, which: str | list[str] = "last") -> list[str]:
    return list(partition(NAMES, key_fraction=fraction, key_blocks=which).keys)


def test_a_partition_is_disjoint_and_complete() -> None:
    for fraction in (0.0, 0.3, 0.55, 1.0):
        parts = partition(NAMES, key_fraction=fraction, key_blocks="spread", embeddings="key")
        assert not set(parts.backbone) & set(parts.key_names)
        assert sorted([*parts.backbone, *parts.key_names]) == sorted(NAMES)


def test_splitting_and_merging_changes_no_bit() -> None:
    tensors = {name: torch.randn(3, 2) for name in NAMES}
    parts = partition(tensors, key_fraction=0.3, key_blocks="last")
    merged = {name: tensors[name] for name in parts.backbone} | {
        name: tensors[name] for name in parts.key_names
    }
    assert set(merged) == set(tensors)
    assert all(torch.equal(merged[name], tensors[name]) for name in tensors)


def test_the_share_is_rounded_up() -> None:
    assert blocks(0.3) == ["7", "8", "9"]
    assert blocks(0.31) == ["6", "7", "8", "9"]
    assert blocks(0.01) == ["9"]
    assert blocks(0.0) == []
    assert blocks(0.3, "spread") == ["1", "5", "8"]


def test_one_is_the_whole_model() -> None:
    parts = partition(NAMES, key_fraction=1.0, key_blocks="last")
    assert parts.backbone == ()
    assert parts.keys[OUTSIDE] == ("ln_f.weight", "wte.weight")


def test_expressions_choose_parameters() -> None:
    parts = partition(NAMES, key_fraction=0.3, key_blocks=[r"h\.[02]\.attn", "wte"])
    assert parts.keys == {
        "0": ("h.0.attn.weight",),
        "2": ("h.2.attn.weight",),
        OUTSIDE: ("wte.weight",),
    }
    with pytest.raises(PhotonError, match=r"embeddings=restricted: wte\.weight would be a key layer"):
        partition(NAMES, key_fraction=0.3, key_blocks=["wte"], embeddings="restricted")
    with pytest.raises(PhotonError, match="'decoder' fits no parameter"):
        partition(NAMES, key_fraction=0.3, key_blocks=["decoder"])
    with pytest.raises(PhotonError, match="no numbered blocks"):
        partition(["weight"], key_fraction=0.3, key_blocks="last")
