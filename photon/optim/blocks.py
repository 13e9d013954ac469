"""Blocks of tensors that fit into a CPU's cache.

An optimizer step is a dozen passes of little arithmetic over all parameters and states, so on a CPU it takes
as long as their way from memory. Taking all passes over one block before the next one brings each value to
the core once. A GPU gets everything at once instead: there the number of kernels counts.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK_ELEMENTS = 2**18
"""Elements of one tensor in a block: 1 MiB in float32, for each of four or five tensors.

Smaller blocks lose more to the interpreter than they win from the cache; see docs/performance.md.
"""


def in_blocks(rows: Iterable[Sequence[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield tensors of equal shapes in blocks, for elementwise work in place.

    Parameters
    ----------
    rows
        One row a parameter: the parameter, its gradient, its states. The tensors of a row have one shape.

    Yields
    ------
    list[list[Tensor]]
        The columns of some rows: a list of parameters, a list of gradients and so on, as `torch._foreach_*`
        takes them. On a CPU large tensors come in pieces, which are views.
    """
    block: list[Sequence[Tensor]] = []
    size = 0
    for row in rows:
        on_cpu = row[0].device.type == "cpu"
        for piece in _pieces(row) if on_cpu else (row,):
            block.append(piece)
            size += piece[0].numel() if on_cpu else 0
            if size >= BLOCK_ELEMENTS:
                yield _columns(block)
                block, size = [], 0
    if block:
        yield _columns(block)


def _pieces(row: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    first = row[0]
    if first.numel() <= BLOCK_ELEMENTS or isinstance(first, DTensor):
        return (row,)
    if not all(tensor.is_contiguous() for tensor in row):
        return (row,)
    return zip(*(tensor.view(-1).split(BLOCK_ELEMENTS) for tensor in row), strict=True)


def _columns(rows: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]
