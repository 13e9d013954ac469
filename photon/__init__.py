"""Photon: federated pre-training of large language models on Flower."""

__version__ = "0.1.0"
