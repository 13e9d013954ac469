"""Local optimizers that torch lacks: ordinary torch optimizers, which know nothing of rounds."""

from photon.optim.low_rank import LoRDO
from photon.optim.muon import MuonAdamW
from photon.optim.quasi_hyperbolic import ADOPT, QHADOPT, QHAdamW
from photon.optim.refreshed import RefreshedAdamW

__all__ = ["ADOPT", "QHADOPT", "LoRDO", "MuonAdamW", "QHAdamW", "RefreshedAdamW"]
