"""Where a silo's things lie on its own machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from photon.config import RunConfig
from photon.errors import PhotonError

#: What an operator may say to a SuperNode with --node-config.
NodeConfig = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class SiloSite:
    """Where a silo's things lie on its own machine.

    Attributes
    ----------
    data
        Prepared data folder with the silo's text.
    state
        Folder for what silos keep between rounds.
    """

    data: Path
    state: Path


def find_site(node_config: NodeConfig, config: RunConfig) -> SiloSite:
    """Find a node's data and state folders.

    A deployed silo names its folders in its own node config, and no word of the server changes them. A
    simulated node has none and lives in the run's folder, on the machine where the run was started.

    Raises
    ------
    PhotonError
        If the folders are not set.
    """
    data = node_config.get("data-dir")
    if data is not None:
        state = node_config.get("state-dir")
        if state is None:
            raise PhotonError("node config: data-dir is set but state-dir is not; set both")
        return SiloSite(Path(str(data)), Path(str(state)))
    if config.data.path is None or config.run_dir is None:
        raise PhotonError("node config: data-dir and state-dir are not set")
    return SiloSite(Path(config.data.path), Path(config.run_dir) / "silos")
