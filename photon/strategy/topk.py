"""Top-K: plain layers, one global prune a round; SparsyFed's baseline without its re-parameterisation."""

from photon.strategy.sparse import Sparse


class TopK(Sparse):
    """Train the weights themselves and prune them to the target after local training."""
