"""Streaming, order-independent folding of client replies."""

from collections.abc import Mapping

import torch

Groups = Mapping[str, Mapping[str, torch.Tensor]]


class WeightedMean:
    """Running weighted mean of state groups, in place and without a list of replies.

    After replies x_1 … x_k with weights w_1 … w_k the accumulator holds Σ w_i x_i / Σ w_i:

        a_k = a_{k-1} + (w_k / W_k) (x_k - a_{k-1}),   W_k = w_1 + … + w_k

    The first reply is copied, so the mean of one reply, or of equal replies, is exact. The caller adds
    replies in cohort order, which makes the result independent of the order of arrival. Memory: one
    accumulator, whatever the number of replies.
    """

    def __init__(self) -> None:
        self._mean: dict[str, dict[str, torch.Tensor]] = {}
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
            self._mean = {
                group: {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
                for group, tensors in groups.items()
            }
            return
        share = weight / self.total_weight
        for group, tensors in groups.items():
            accumulator = self._mean[group]
            for name, tensor in tensors.items():
                accumulator[name].lerp_(tensor.to(torch.float32), share)

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulator."""
        return sum(tensor.nbytes for tensors in self._mean.values() for tensor in tensors.values())

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the mean; the accumulator itself, not a copy."""
        return self._mean
