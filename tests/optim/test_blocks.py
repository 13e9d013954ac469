import pytest
import torch

from photon.optim.blocks import BLOCK_ELEMENTS, in_blocks


@pytest.mark.parametrize(
    "sizes", [[5, 3], [BLOCK_ELEMENTS], [3 * BLOCK_ELEMENTS + 7, 2], [2, BLOCK_ELEMENTS + 1, 9]]
)
def test_every_element_comes_once_beside_its_partner(sizes):
    ones = [torch.zeros(size) for size in sizes]
    twos = [torch.arange(size, dtype=torch.float32) for size in sizes]
    for block in in_blocks(zip(ones, twos, strict=True)):
        assert sum(one.numel() for one in block[0]) < 2 * BLOCK_ELEMENTS
        torch._foreach_add_(block[0], block[1])
        torch._foreach_add_(block[0], 1)
    for one, two in zip(ones, twos, strict=True):
        assert torch.equal(one, two + 1)


def test_what_is_not_contiguous_comes_whole():
    rows = [[torch.zeros(1000, 300).T, torch.zeros(300, 1000)]]
    assert [[one.shape for one in column] for column in next(in_blocks(rows))] == [[(300, 1000)]] * 2


def test_nothing_gives_nothing():
    assert list(in_blocks([])) == []
