"""Streaming, order-independent folding of silo replies."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from photon.link.encoding import SparseTensor

Groups = Mapping[str, Mapping[str, torch.Tensor | SparseTensor]]


@dataclass(frozen=True)
class Folded:
    """What the replies of a round came to.

    Attributes
    ----------
    groups
        The folded state groups.
    replies
        How many were folded.
    weights
        As in `photon.strategy.base.Aggregate`, and so are ``figures``.
    seconds
        That it took.
    """

    groups: dict[str, dict[str, torch.Tensor]]
    replies: int
    weights: dict[str, float]
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)


class WeightedMean:
    """Running weighted mean of state groups, in place and without a list of replies.

    After replies x_1 … x_k with weights w_1 … w_k the accumulator holds Σ w_i x_i / Σ w_i:

        a_k = a_{k-1} + (w_k / W_k) (x_k - a_{k-1}),   W_k = w_1 + … + w_k

    The first reply is copied, so the mean of one reply, or of equal replies, is exact. A tensor that comes
    sparse is summed instead, Σ w_i x_i, and divided at the end, so that adding it costs what it holds and not
    what it stands for. The caller adds replies in cohort order, which makes the result independent of the
    order of arrival. Memory: one accumulator, whatever the number of replies.

    What a sparse update leaves out counts as zero, or not at all: with ``over_senders`` the mean of each
    value of ``params`` is over the replies that hold it, Σ_{i sends} w_i x_i / Σ_{i sends} w_i, and zero
    where none does.

    A reply may count for some rows of a tensor alone. Each row then has a W_k of its own, so its mean is that
    of the replies that count for it; a row for which none does is as in the first reply.

    Parameters
    ----------
    over_senders
        Whether the mean of a value is over those that sent it. Takes a second accumulator.
    """

    def __init__(self, *, over_senders: bool = False) -> None:
        self._mean: dict[str, dict[str, torch.Tensor]] = {}
        self._sums: set[tuple[str, str]] = set()
        self._over_senders = over_senders
        #: Of each parameter of which a sum is taken: the weights of those that sent each value.
        self._senders: dict[str, torch.Tensor] = {}
        self._row_weights: dict[str, torch.Tensor] = {}
        self.total_weight = 0.0
        self.count = 0

    def add(self, groups: Groups, weight: float, rows: Mapping[str, torch.Tensor] | None = None) -> None:
        """Fold one reply in.

        Parameters
        ----------
        groups
            Group name to tensor name to tensor; names and shapes as in the first reply. Only read.
        weight
            Positive weight of the reply.
        rows
            Parameter to the rows for which the reply counts, bool of shape (rows,); the same parameters in
            every reply. Of others it counts for all.

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
        row_shares = {name: self._row_share(name, counts, weight) for name, counts in (rows or {}).items()}
        for group, tensors in groups.items():
            accumulator = self._mean[group]
            for name, tensor in tensors.items():
                if name not in accumulator and not isinstance(tensor, SparseTensor):
                    accumulator[name] = tensor.to(torch.float32, copy=True)
                elif isinstance(tensor, SparseTensor) or (group, name) in self._sums:
                    self._add_to_sum(group, name, tensor, weight)
                else:
                    own = row_shares.get(name, share) if group == "params" else share
                    if isinstance(own, torch.Tensor):
                        own = own.view(-1, *[1] * (tensor.dim() - 1))
                    accumulator[name].lerp_(tensor.to(torch.float32), own)

    def _row_share(self, name: str, rows: torch.Tensor, weight: float) -> float | torch.Tensor:
        """Return w_k / W_k of each row, zero where the reply does not count; a number if all are the same."""
        total = self._row_weights.setdefault(name, torch.zeros(len(rows), dtype=torch.float64))
        total += weight * rows
        shares = torch.where(rows, weight / total, 0.0)
        # One number goes another way through torch's arithmetic, which may round otherwise.
        return shares[0].item() if bool((shares == shares[0]).all()) else shares.to(torch.float32)

    def _add_to_sum(self, group: str, name: str, tensor: torch.Tensor | SparseTensor, weight: float) -> None:
        sums = self._mean[group]
        if name not in sums:
            sums[name] = torch.zeros(tensor.shape)
            self._sums.add((group, name))
        elif (group, name) not in self._sums:
            sums[name] *= self.total_weight - weight
            self._sums.add((group, name))
        if self._over_senders and group == "params":
            self._count_senders(name, tensor, weight)
        if isinstance(tensor, SparseTensor):
            sums[name].view(-1).index_add_(0, tensor.indices, tensor.values.to(torch.float32), alpha=weight)
        else:
            sums[name].add_(tensor.to(torch.float32), alpha=weight)

    def _count_senders(self, name: str, tensor: torch.Tensor | SparseTensor, weight: float) -> None:
        if name not in self._senders:
            # Replies before this one, if there are any, came whole.
            self._senders[name] = torch.full((tensor.shape.numel(),), self.total_weight - weight)
        if isinstance(tensor, SparseTensor):
            # One number for all, not a tensor of as many as were sent.
            one = torch.tensor(weight, dtype=torch.float32).expand(len(tensor.indices))
            self._senders[name].index_add_(0, tensor.indices, one)
        else:
            self._senders[name] += weight

    @property
    def nbytes(self) -> int:
        """Bytes of the accumulators."""
        means = sum(tensor.nbytes for tensors in self._mean.values() for tensor in tensors.values())
        return means + sum(tensor.nbytes for tensor in self._senders.values())

    def result(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the mean; the accumulator itself, not a copy. Nothing can be added after that."""
        for group, name in self._sums:
            if group == "params" and name in self._senders:
                senders = self._senders.pop(name)
                # What nobody sent is a sum of nothing: zero, whatever it is divided by.
                self._mean[group][name].view(-1).div_(senders.masked_fill_(senders == 0, 1.0))
            else:
                self._mean[group][name] /= self.total_weight
        self._sums.clear()
        return self._mean
