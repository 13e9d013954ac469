"""A silo that is a federation of islands: groups of its machine's devices, each with a share of its windows.

Every island trains in a silo worker of its own, so that all train at the same time, and keeps a local
optimizer of its own from round to round. The silo averages them, in as many rounds as it is set to, and
answers with the result. What is done to an update before it leaves is done to that alone::

    STATE_DIR/NAME/              run folder of the silo's rounds, as of any federation
    STATE_DIR/NAME/counts.json   as of any silo
    STATE_DIR/NAME/islands/I/    state folder of island I: its worker, and what it keeps between rounds
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from photon.config.schema import Component, RunConfig
from photon.config.tree import TreeNode
from photon.engine.inprocess import ParallelGrid
from photon.errors import PhotonError
from photon.federation.run import run_federation
from photon.link.answer import Answer, NodeConfig
from photon.link.messages import TrainRequest
from photon.silo.policy import Cost
from photon.silo.site import NodeSettings, SiloSite
from photon.subfederation.member import Drive, Member
from photon.subfederation.service import FederationNode
from photon.training.schedule import resolve_schedule


def silo_of(site: SiloSite) -> str:
    """Return the name of the silo that consists of islands.

    Raises
    ------
    PhotonError
        If there are several in its data folder.
    """
    names = site.prepared().silo_names
    if len(names) > 1:
        raise PhotonError(
            f"node config: islands are of one silo, and {site.data} has {', '.join(names)}; cut it with "
            "`photon data separate`"
        )
    return names[0]


def node_of(settings: NodeSettings, site: SiloSite) -> TreeNode:
    """Return what the silo decides for its islands: they send parameters as they are."""
    privacy = None if site.privacy.clip_norm is None else site.privacy.model_dump()
    rounds = settings.island_rounds or 1
    return TreeNode(name=silo_of(site), rounds=rounds, link="dense", privacy=privacy)


def below(settings: NodeSettings) -> dict[str, Any]:
    """Return the keys of the configuration's ``federation`` for the islands' rounds."""
    islands = settings.islands or 1
    return {
        "engine": "deployment",
        "tree": None,
        "silos": islands,
        "wait_for_silos": 0.0,
        "silos_in_parallel": islands,
    }


def config_of(settings: NodeSettings, config: RunConfig, steps: int) -> RunConfig:
    """Return the configuration that the islands' one is made from.

    Their rounds share the local steps of the request, so that the silo is where the learning-rate schedule
    is. Nothing is done to what they send, which stays in the silo.

    Parameters
    ----------
    steps
        Local steps of the request.

    Raises
    ------
    PhotonError
        If an island is to be a group of processes, or its rounds cannot share the steps.
    """
    if config.training.processes > 1:
        raise PhotonError(
            f"islands={settings.islands}: an island trains in one process, and training.processes="
            f"{config.training.processes}; set processes=1 in the node config"
        )
    rounds = settings.island_rounds or 1
    if rounds > 1 and (config.transition is not None or config.local_steps % rounds):
        what = "a run with a transition" if config.transition else f"local_steps={config.local_steps}"
        raise PhotonError(f"island-rounds={rounds} does not divide {what}; set another in the node config")
    off = {"clip_norm": None, "noise_multiplier": 0.0, "secure_aggregation": False}
    schedule = resolve_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    return config.model_copy(
        update={
            "local_steps": max(1, steps // rounds),
            "schedule": Component.model_validate(schedule),
            "privacy": config.privacy.model_copy(update=off),
        }
    )


class IslandsNode(FederationNode):
    """A silo of islands.

    Parameters
    ----------
    settings
        What its operator has set.
    site
        Where its things lie.
    config
        The configuration of the federation above, as it is carried out here.
    steps
        Local steps of the request; of any other request, those of a round.
    carry_out
        Runs its rounds.
    """

    def __init__(
        self, settings: NodeSettings, site: SiloSite, config: RunConfig, steps: int, carry_out: Drive
    ) -> None:
        super().__init__(silo_of(site), site, config)
        self._settings = settings
        self._steps = steps
        self._drive = carry_out

    @cached_property
    def member(self) -> Member:
        """The islands at work."""
        inside = config_of(self._settings, self.config, self._steps)
        node = node_of(self._settings, self.site)
        return Member(node, self.site, self.config, self._drive, below(self._settings), inside)

    @property
    def vocab_size(self) -> int:
        """Tokens that the text knows."""
        return self.site.vocab_size

    def cost(self, request: TrainRequest) -> dict[str, Cost]:
        """Return what all islands together do with the silo's text."""
        rounds, islands = self._settings.island_rounds or 1, self._settings.islands or 1
        # A round of the islands has at least one step.
        steps = max(request.steps, rounds)
        windows = steps * request.batch_size * islands
        manifest = self.site.prepared().manifest
        available = manifest.silos[self.name].train.sequences
        return {self.name: self._cost(request, steps, windows, manifest.sequence_length, available=available)}


def drive(node_config: NodeConfig, settings: NodeSettings, answer: Answer) -> Drive:
    """Return what carries out assignments on the islands, each of which ``answer`` answers for."""

    def carry_out(config: RunConfig, resume: bool) -> None:
        nodes = {
            island: _island(node_config, island, Path(str(config.run_dir)), config.training.device)
            for island in range(1, (settings.islands or 1) + 1)
        }
        run_federation(config, ParallelGrid(answer, nodes), resume=resume, live=False)

    return carry_out


def _island(node_config: NodeConfig, island: int, run_dir: Path, device: str) -> NodeConfig:
    """Return the node config of an island: the silo's, without what the silo sees to itself."""
    own = {key: value for key, value in node_config.items() if key not in ("policy", "store-url")}
    folder = run_dir / "islands" / str(island)
    return {**own, "island": island, "state-dir": str(folder), "device": _device(device, island)}


def _device(device: str, island: int) -> str:
    """Give islands the machine's GPUs in turn, unless one device is named for all."""
    import torch

    if device in ("auto", "cuda") and (count := torch.cuda.device_count()):
        return f"cuda:{(island - 1) % count}"
    return device
