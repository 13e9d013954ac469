"""The folders of an aggregator and of a silo."""

from pathlib import Path

from photon.deployment import aggregator, joining
from photon.deployment.aggregator import AggregatorPlace
from photon.deployment.joining import SiloPlace


def make_aggregator(folder: Path, *, proxy: bool | None = None, host: str = "127.0.0.1") -> AggregatorPlace:
    return aggregator.init(folder, [host], None, proxy)[0]


def make_silo(folder: Path, name: str = "hospital") -> SiloPlace:
    return joining.init(folder, name, None, None)[0]
