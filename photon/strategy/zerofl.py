"""ZeroFL (2208.02507), as SparsyFed's authors run it: each layer is pruned at every local step."""

from photon.strategy.sparse import Sparse


class ZeroFL(Sparse):
    """Prune each layer and its inputs at every step; gradients of weights are dense, so masks move."""

    method = "layer-topk"
    activations = "constant"
