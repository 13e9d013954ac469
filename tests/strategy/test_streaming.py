"""How parameters are split into fragments."""

import pytest
import torch

from photon.config.compose import compose
from photon.errors import PhotonError
from photon.preflight import preflight
from photon.strategy.streaming import split_parameters

BLOCK = {"attn.weight": (8, 24), "mlp.weight": (8, 32), "norm.bias": (8,)}
SHAPES = {f"h.{block}.{name}": torch.Size(size) for block in range(12) for name, size in BLOCK.items()}
SHAPES |= {
    "wte.weight": torch.Size((100, 8)),
    "wpe.weight": torch.Size((16, 8)),
    "norm.bias": torch.Size((8,)),
}


def blocks_of(names: list[str]) -> list[int]:
    return sorted({int(name.split(".")[1]) for name in names if name.startswith("h.")})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("strided", [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
        ("sequential", [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
    ],
)
def test_blocks_stay_whole(pattern, expected):
    parts = split_parameters(SHAPES, 4, pattern)
    assert [blocks_of(part) for part in parts] == expected
    assert all(len([name for name in part if name.startswith("h.")]) == 9 for part in parts)


@pytest.mark.parametrize("fragments", [1, 2, 3, 5, 12])
def test_every_parameter_is_in_one_fragment_and_none_is_empty(fragments):
    parts = split_parameters(SHAPES, fragments, "strided")
    assert sorted(name for part in parts for name in part) == sorted(SHAPES)
    assert all(part == sorted(part) and part for part in parts)


def test_embeddings_go_where_there_is_least():
    # Blocks 0, 3, 6, 9 and 1, 4, 7, 10 are in fragments 0 and 1 of 5: one block more than the others have.
    parts = split_parameters(SHAPES, 5, "strided")
    assert [("wte.weight" in part, "wpe.weight" in part, "norm.bias" in part) for part in parts[2:]] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_the_order_of_the_parameters_does_not_matter():
    turned = dict(reversed(SHAPES.items()))
    assert split_parameters(turned, 4, "strided") == split_parameters(SHAPES, 4, "strided")


def test_more_fragments_than_parts_are_refused():
    with pytest.raises(PhotonError, match=r"strategy\.fragments=16: the model has too few blocks"):
        split_parameters(SHAPES, 16, "strided")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["strategy.fragments=0"], "fragments=0: expected at least 1"),
        (["strategy.mixing=0.0"], "mixing=0.0: expected above 0"),
        (["strategy.fragments=1", "strategy.mixing=0.5"], "receives all parameters starts from them"),
        (["strategy.pattern=random"], r"strategy\.pattern='random'"),
        (["optimizer=lordo"], "needs all parameters synced at once"),
    ],
)
def test_impossible_settings_are_refused(overrides, problem):
    with pytest.raises(PhotonError, match=problem):
        preflight(compose(["strategy=streaming-diloco", *overrides]))
