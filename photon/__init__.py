"""Photon: federated pre-training of large language models on Flower."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon.api.run import Run
    from photon.api.train import compare, prepare, train

__all__ = ["DISTRIBUTION", "Run", "__version__", "compare", "prepare", "train"]
__version__ = "0.1.0"

#: What indexes of packages call this one; `photon` is another project there.
DISTRIBUTION = "photon-fl"

# OpenMP's threads spin while they wait for each other, unless told otherwise before torch loads it. On a
# machine that does anything else besides, spinning takes the cores from the thread that is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_API = {"Run": "run", "compare": "train", "prepare": "train", "train": "train"}


def __getattr__(name: str) -> Any:
    """Bring the Python interface when it is asked for: commands and nodes do without."""
    if name in _API:
        return getattr(import_module(f"photon.api.{_API[name]}"), name)
    raise AttributeError(f"module 'photon' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_API})
