"""FLASH: a dense first round chooses the mask, which is fixed from then on."""

from collections.abc import Iterator

from photon.models.sparse import density, largest
from photon.state.checkpoint import Checkpoint
from photon.strategy.base import Aggregate, Reply
from photon.strategy.outer import Tensors
from photon.strategy.photon import OuterResult
from photon.strategy.sparse import Sparse, prunable


class Flash(Sparse):
    """Silos train the first round densely and prune; the server prunes each layer of the mean once more.

    A layer keeps as large a share as the silos kept of it on average, and its zeros get no gradient later.
    """

    method = "fixed-support"

    def aggregate_train(
        self, server_round: int, checkpoint: Checkpoint, replies: Iterator[Reply]
    ) -> Aggregate:
        """Aggregate, and note the silos' densities."""
        self._kept = dict.fromkeys(prunable(self.config, checkpoint.state.vocab_size), 0.0)
        return super().aggregate_train(server_round, checkpoint, self._measured(replies))

    def _measured(self, replies: Iterator[Reply]) -> Iterator[Reply]:
        total = 0.0
        for reply in replies:
            weight = self.weight(reply)
            total += weight
            for name, before in self._kept.items():
                own = density(reply.groups["params"], [name])
                self._kept[name] = before + weight / total * (own - before)
            yield reply
            del reply

    def step_outer(self, server_round: int, checkpoint: Checkpoint, mean: Tensors) -> OuterResult:
        """Fix the support in the first round, and step within it."""
        if server_round == 1:
            for name, share in self._kept.items():
                mean[name] = mean[name] * largest(mean[name], round(share * mean[name].numel()))
        return super().step_outer(server_round, checkpoint, mean)
