"""Photon: federated pre-training of large language models on Flower."""

import os

__version__ = "0.1.0"

#: What indexes of packages call this one; `photon` is another project there.
DISTRIBUTION = "photon-fl"

# OpenMP's threads spin while they wait for each other, unless told otherwise before torch loads it. On a
# machine that does anything else besides, spinning takes the cores from the thread that is waited for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
