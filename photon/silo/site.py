"""What a silo's operator sets: where its things lie on its machine, its devices, and what it accepts."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from photon.config.compose import parse
from photon.config.decided import Decided
from photon.config.explain import explain_validation
from photon.config.schema import PrivacySection, RunConfig
from photon.config.training import MatmulPrecision
from photon.data.given import Choice, choice_of
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.link.answer import NodeConfig
from photon.link.transport import SiloLink
from photon.silo.policy import SiloPolicy, read_policy
from photon.state.fixed import FixedGroups

#: What an operator may say to a SuperNode with --node-config; :class:`NodeSettings` says what it means.


class NodeSettings(BaseModel):
    """The node config of a SuperNode; keys are written with hyphens, as in ``data-dir``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-")
    )

    data_dir: Path | None = Field(None, description="Prepared data folder with the silo's text.")
    forgotten_dir: Path | None = Field(
        None,
        description="Prepared questions that were forgotten once: what each evaluated model says to them is "
        "told.",
    )
    state_dir: Path | None = Field(None, description="Folder for what the silo keeps between rounds.")
    federation: Path | None = Field(
        None,
        description="YAML file of the federation that this node is a gateway to, in place of `data-dir`.",
    )
    policy: Path | None = Field(None, description="YAML file with what the silo accepts; none: everything.")
    store_url: str | None = Field(
        None, description="Shared folder or URL of the store for large payloads, as the silo reaches it."
    )
    islands: int | None = Field(
        None, ge=1, description="Islands that the silo is a federation of, each with a share of its windows."
    )
    island_rounds: int | None = Field(
        None,
        ge=1,
        description="Rounds of the islands that the local steps of a request are divided among; none: one.",
    )
    island: int | None = Field(None, ge=1, description="Set by Photon for each of the islands.")
    branches: bool = Field(
        False,
        description="Whether the node may be asked to act as a federation of the tree that a run names, over "
        "the silos in `data-dir`.",
    )
    pooling: bool = Field(
        False,
        description="Whether the node may be asked to train on the text of several silos as one participant, "
        "or of a silo under another name.",
    )
    worker: bool = Field(True, description="Train in a process that stays from round to round.")
    device: str | None = Field(None, description="auto, cpu, cuda or cuda:N.")
    processes: int | None = Field(None, ge=1, description="Devices that train together.")
    parallel: Literal["ddp", "fsdp"] | None = Field(None, description="How they share the work.")
    machines: int | None = Field(None, ge=1, description="Machines that the processes are on.")
    rendezvous: str | None = Field(
        None, description="HOST:PORT of the first of them, which runs the SuperNode, where they meet."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads.")
    micro_batch_size: int | Literal["auto"] | None = Field(
        None, description="Sequences per forward pass; auto: probe."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = Field(
        None, description="Precision of forward and backward pass."
    )
    matmul_precision: MatmulPrecision | None = Field(
        None, description="Precision of products of float32 matrices."
    )
    partition_id: int | None = Field(None, description="Set by Flower on simulated nodes.")
    num_partitions: int | None = Field(None, description="Set by Flower on simulated nodes.")

    @property
    def is_federation(self) -> bool:
        """Whether the node answers for a federation. One island is the silo itself."""
        return self.federation is not None or ((self.islands or 1) > 1 and self.island is None)

    @property
    def simulated(self) -> bool:
        """Whether the node lives in the run's folder, with a server that is the same user."""
        return self.partition_id is not None and self.data_dir is None and self.federation is None

    @property
    def may_branch(self) -> bool:
        """Whether the node may act as a federation of a run's tree."""
        return self.branches or self.simulated

    @property
    def may_pool(self) -> bool:
        """Whether the node may train on the text of several silos as one participant."""
        return self.pooling or self.simulated

    @model_validator(mode="after")
    def _go_together(self) -> "NodeSettings":
        if self.islands is None and self.island_rounds is not None:
            raise ValueError("island-rounds is set but islands is not; set both")
        if self.is_federation and (self.branches or self.pooling):
            raise ValueError(
                "branches and pooling are of a silo with a data-dir, not of a gateway or islands; remove them"
            )
        if (self.islands or 1) > 1:
            if self.federation is not None:
                raise ValueError(
                    "islands are of a silo with a data-dir, not of a gateway; remove one of the two"
                )
            if not self.worker:
                raise ValueError("islands train in workers; remove worker=false")
        return self

    def training(self) -> dict[str, Any]:
        """Return the keys of the run's ``training`` section that the operator has set."""
        own = {
            "device",
            "processes",
            "parallel",
            "machines",
            "rendezvous",
            "threads",
            "micro_batch_size",
            "precision",
            "matmul_precision",
        }
        return self.model_dump(include=own, exclude_none=True)


@dataclass(frozen=True)
class SiloSite:
    """Where a silo's things lie on its own machine.

    Attributes
    ----------
    data
        Prepared data folder with the silo's text.
    state
        Folder for what silos keep between rounds.
    store
        Shared folder or URL of the store for large payloads, as this machine reaches it; None: no access.
    policy
        What the silo accepts.
    privacy
        What is done to updates before they leave: what the run asks for, and what the policy adds to it.
    share
        Which share of the text, of how many; None: all of it.
    simulated
        Whether the run's server is the same user on the same machine.
    forgotten
        Prepared questions that were forgotten once; None: there are none.
    choice
        Which of the training windows the run reads, by their labels; None: all.
    """

    data: Path
    state: Path
    store: str | None
    policy: SiloPolicy
    privacy: PrivacySection
    share: tuple[int, int] | None = None
    simulated: bool = False
    forgotten: Path | None = None
    choice: Choice | None = None

    @property
    def link(self) -> SiloLink:
        """What reads and writes the tensors of messages here."""
        return SiloLink(self.store, self.state)

    def check_store(self, why: str) -> None:
        """Check that this machine reaches a store by itself.

        Parameters
        ----------
        why
            What it is needed for.

        Raises
        ------
        PhotonError
            If its operator has named none.
        """
        if self.store is None:
            raise PhotonError(
                f"node config: {why}, but store-url is not set; name the shared folder or the bucket as this "
                "machine reaches it"
            )

    @property
    def vocab_size(self) -> int:
        """Tokens that the text here knows."""
        return self.prepared().manifest.vocab_size

    def fixed_groups(self, silo: str) -> FixedGroups:
        """Return what a silo has of the state groups that are sent once."""
        return FixedGroups(self.state / silo / "fixed")

    def prepared(self) -> PreparedData:
        """Return the text that is trained on here.

        Raises
        ------
        PhotonError
            If it is damaged, too little for the islands, or has not the labels that the run goes by.
        """
        data = PreparedData.reopen(self.data)
        data = data if self.choice is None else self.choice.of(data)
        return data if self.share is None else data.dealt(*self.share)


def find_site(
    node_config: NodeConfig, config: RunConfig, decided: Decided | None = None
) -> tuple[SiloSite, RunConfig]:
    """Find a node's site, and the run's configuration as it is carried out there.

    A deployed silo names its folders in its own node config, and no word of the server changes them. A
    simulated node, which Flower gives a ``partition-id``, lives in the run's folder on the machine where the
    run was started. Devices and processes belong to the silo, so what the operator sets of them goes
    before the run's ``training`` section.

    Parameters
    ----------
    decided
        What the silo has decided earlier in the run where neither of them says.

    Raises
    ------
    PhotonError
        If the node config has an unknown key (the nearest valid one is named) or a wrong value, lacks the
        folders, or does not go together with the run; or if the policy is wrong.
    """
    settings = read_settings(node_config)
    return _site(settings, config), _carried_out(config.text, settings, decided or Decided())


def read_settings(node_config: NodeConfig) -> NodeSettings:
    """Check a node config.

    Raises
    ------
    PhotonError
        For an unknown key (the nearest valid one is named) or a wrong value.
    """
    try:
        return NodeSettings.model_validate(node_config)
    except ValidationError as error:
        known = {field.alias or name for name, field in NodeSettings.model_fields.items()}
        raise PhotonError(f"node config: {explain_validation(error, known)}") from error


def _site(settings: NodeSettings, config: RunConfig) -> SiloSite:
    data, state = _folders(settings, config)
    # Like its folders, a deployed silo's store is its own to name.
    deployed = settings.data_dir is not None or settings.federation is not None
    store = settings.store_url if deployed else config.link_in_use.store.url
    # The file is read for every message, so that a change of it holds from the next one on.
    policy = read_policy(settings.policy)
    privacy = config.privacy if policy.privacy is None else policy.privacy.applied_to(config.privacy)
    share = None if settings.island is None else (settings.island, settings.islands or 1)
    here = config.evaluation.forgotten
    forgotten = settings.forgotten_dir if deployed else None if here is None else Path(here)
    choice = choice_of(config.data.filter, config.data.mixture, config.seed)
    return SiloSite(data, state, store, policy, privacy, share, settings.simulated, forgotten, choice)


def _folders(settings: NodeSettings, config: RunConfig) -> tuple[Path, Path]:
    if settings.federation is not None:
        if settings.data_dir is not None or settings.state_dir is None:
            raise PhotonError("node config: a gateway has a federation and a state-dir, and no data-dir")
        return settings.state_dir, settings.state_dir
    if settings.data_dir is not None:
        if settings.state_dir is None:
            raise PhotonError("node config: data-dir is set but state-dir is not; set both")
        return settings.data_dir, settings.state_dir
    if settings.partition_id is None or config.data.path is None or config.run_dir is None:
        raise PhotonError("node config: data-dir and state-dir are not set")
    return Path(config.data.path), Path(config.run_dir) / "silos"


@lru_cache(maxsize=8)
def _carried_out(text: str, settings: NodeSettings, decided: Decided) -> RunConfig:
    """Put the operator's settings before the run's. Kept, because every message asks for the same."""
    config = parse(text)
    if not settings.simulated and config.training.machines > 1:
        raise PhotonError(
            f"training.machines={config.training.machines}: a silo's machines are its own; leave it at 1, "
            "and set machines and rendezvous in the node config"
        )
    if own := settings.training():
        values = config.model_dump(by_alias=True)
        try:
            config = RunConfig.model_validate(values | {"training": values["training"] | own})
        except ValidationError as error:
            raise PhotonError(f"node config: {explain_validation(error, own)}") from error
    training = decided.applied_to(config.training)
    return config if training == config.training else config.model_copy(update={"training": training})
