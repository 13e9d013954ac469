"""Streaming, order-independent folding of client replies."""

from collections.abc import Mapping

import torch

from photon.link.coding import SparseTensor

Groups = Mapping[str, Mapping[str, torch.Tensor | SparseTensor]]


class WeightedMean:
    """Running weighted mean of state groups, in place and without a list of replies.

    After replies x_1 … x_k with weights w_1 … w_k the accumulator holds Σ w_i x_i / Σ w_i:

        a_k = a_{k-1} + (w_k / W_k) (x_k - a_{k-1}),   W_k = w_1 + … + w_k

    The first reply is copied, so the mean of one reply, or of equal replies, is exact. A tensor that comes
    sparse is summed instead, Σ w_i x_i, and divided at the end, so that adding it costs what it holds and not
    what it stands for. The caller adds replies in cohort order, which makes the result independent of the
    order of arrival. Memory: one accumulator, whatever the number of replies.
    """

    def __init__(self) -> None:
        self._mean: dict[str, dict[str, torch.Tensor]] = {}
        self._sums: set[tuple[str, str]] = set()
        self.total_weight = 0.0
        self.count = 0

    def add(self, groups: Groups, weight: float) -> None:
        """Fold one reply in.

        Parameters
        ----------
        groups
            Group name to tensor name to tensor; names and shapes as in the first reply. Only read.
        weight
            Positive weight of the reply.

        Raises
        ------
        ValueError
            If ``weight`` is not positive.
        """
        if not weight > 0:
            raise ValueError(f"weight={weight}: expected a positive number")
        self.total_weight += weight
        self.count += 1
        if self.count == 1:
            self._mean = {group: {} for group in groups}
        share = weight / self.total_weight
        for group, tensors in groups.items():
            accumulator = self._mean[group]
            for name, tensor in tensors.items():
                if name not in accumulator and not isinstance(tensor, SparseTensor):
                    accumulator[name] = tensor.to(torch.float32, copy=True)
                elif isinstance(tensor, SparseTensor) or (group, name) in self._sums:
                    self._add_to_sum(group, name, tensor, weight)
                else:
                    accumulator[name].lerp_(tensor.to(torch.float32), share)

    def _add_to_sum(self, group: str, name: str, tensor: torch.Tensor | SparseTensor, weight: float) -> None:
        sums = self._mean[group]
        if name not in sums:
            sums[name] = torch.zeros(tensor.shape)
            self._sums.add((group, name))
        elif (group, name) not in self._sums:
            sums[name] *= self.total_weight - weight
            self._sums.add((group, name))
        if isinstance(tensor, SparseTensor):
            sums[name].view(-1).index_add_(0, tensor.indices, tensor.values.to(torch.float32), alpha=weight)
        else:
            sums[name].add_(tensor.to(torch.float32), alpha=weight)

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulator."""
        return sum(tensor.nbytes for tensors in self._mean.values() for tensor in tensors.values())

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the mean; the accumulator itself, not a copy. Nothing can be added after that."""
        for group, name in self._sums:
            self._mean[group][name] /= self.total_weight
        self._sums.clear()
        return self._mean
