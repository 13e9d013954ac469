"""The configuration of a run: its typed schema, its composition by Hydra, and errors that help.

``conf/`` holds every default; the classes below say what each key means and which values it may take.
A run is composed once, in the ServerApp or in ``photon train``, and travels on as resolved YAML.
"""

import inspect
import itertools
import math
import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from photon.components import check_arguments, import_target, nearest
from photon.errors import PhotonError
from photon.tree import TreeNode, plain_tree, read_tree

#: Of products of float32 matrices, in the words of `torch.set_float32_matmul_precision`.
MatmulPrecision = Literal["highest", "high", "medium"]


class _Loader(yaml.CSafeLoader):
    """Reads plain values; ``1e-3`` is a number, as in an override."""


class _Dumper(yaml.CSafeDumper):
    """Writes what :class:`_Loader` reads back as the same value."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


class Section(BaseModel):
    """A group of keys; an unknown key or a value of the wrong type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Component(BaseModel):
    """A section that names a class or function by ``_target_``; the other keys are its arguments."""

    model_config = ConfigDict(extra="allow", frozen=True)
    target: str = Field(alias="_target_", description="Dotted path of the class or function to call.")

    def as_mapping(self) -> dict[str, Any]:
        """Return the section as the mapping that :func:`photon.components.build` takes."""
        return self.model_dump(by_alias=True)


class RecipeSection(Section):
    """The centralised recipe that the peak learning rate was tuned for."""

    learning_rate: float = Field(gt=0, description="Peak learning rate, tuned at `batch_size`.")
    batch_size: int = Field(ge=1, description="Sequences per optimizer step that the rate was tuned at.")
    local_batch_size: int = Field(ge=1, description="Sequences per local step of a federated client.")
    steps: int | None = Field(
        ge=1, description="Length of the schedule in steps of `batch_size`; null: the whole run, unstretched."
    )
    warmup_steps: int = Field(ge=0, description="Warm-up in steps of `batch_size`.")


class ModelSection(Section):
    """The decoder-only language model."""

    name: str = Field(description="Name of the preset.")
    architecture: dict[str, Any] | None = Field(
        description="A transformers configuration: `model_type` and its fields."
    )
    config_file: str | None = Field(
        description="JSON file with a transformers configuration, instead of `architecture`."
    )
    vocab_size: int | None = Field(
        gt=0, description="Rows of the embedding; null: the tokenizer's size rounded up to a multiple of 64."
    )
    sequence_length: int = Field(ge=2, description="Longest sequence that the model takes, in tokens.")
    warm_start: str | None = Field(
        description="Hugging Face folder (safetensors) whose weights the run starts from; null: random."
    )
    recipe: RecipeSection


class HubSection(Section):
    """A corpus that `datasets` streams."""

    corpus: str = Field(description="Name of a known corpus: c4, the-pile, mc4 or fineweb-edu.")
    documents_per_silo: int = Field(ge=2, description="Documents to take for each silo.")


class DataSection(Section):
    """The text."""

    source: Literal["embedded", "prepared", "hub"] = Field(
        description="`embedded`: the corpus that the installation brings; `prepared`: a folder made by "
        "`photon data prepare`; `hub`: a streamed corpus, prepared on first use."
    )
    path: str | None = Field(description="Folder of the prepared data (source=prepared).")
    vocab_size: int = Field(ge=257, description="Size of the tokenizer trained for embedded or hub text.")
    tokenizer: str | None = Field(description="tokenizer.json or Hugging Face folder to use for hub text.")
    partition: str = Field(description="by-source, iid:N or dirichlet:N:ALPHA, for hub text.")
    hub: HubSection | None = None


class TrainingSection(Section):
    """Local training, the same on every silo."""

    batch_size: int = Field(ge=1, description="Sequences per local step.")
    micro_batch_size: int | Literal["auto"] | None = Field(
        description="Sequences per forward pass, gradients accumulated; null: the whole batch; auto: probe."
    )
    clip_norm: float | None = Field(gt=0, description="Bound on the global gradient norm; null: none.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        description="Precision of forward and backward; auto: a timed probe on CPU, the capability on GPU."
    )
    matmul_precision: MatmulPrecision = Field(
        "highest",
        description="Of products of float32 matrices, as torch.set_float32_matmul_precision has it: highest "
        "is float32; high (TF32) and medium (bfloat16) round the factors where the hardware gains by it.",
    )
    compile: bool = Field(description="Use torch.compile.")
    activation_checkpointing: bool = Field(description="Recompute activations to save memory.")
    threads: int | None = Field(ge=1, le=1024, description="CPU threads; null: a fair share of the cores.")
    device: str = Field(description="auto, cpu, cuda or cuda:N.")
    processes: int = Field(ge=1, description="Devices of one silo that train together.")
    parallel: Literal["ddp", "fsdp"] = Field(description="How the devices of one silo share the work.")


class SwitchSection(Section):
    """Warm up with other settings of the local optimizer, and switch to the real ones at a global step."""

    step: int = Field(ge=1, description="Global step from which the settings below hold.")
    local_steps: int | None = Field(
        None,
        ge=1,
        description="Local steps of a round before the switch, in which each averages all groups of the "
        "sync plan (1: a synchronous warm-up); null: as after it.",
    )
    optimizer: dict[str, Any] = Field(
        {}, description="Arguments that the local optimizer has from then on, such as `betas`."
    )
    lr_scale: float = Field(1.0, gt=0, description="Factor of the learning rate from then on.")
    zero: list[str] = Field([], description="State groups of the local optimizer that are zeroed then.")
    reset_step: bool = Field(
        False, description="Also count the local optimizer's steps, which correct its bias, from 0 again."
    )


class EvaluationSection(Section):
    """Validation of the global model on every silo."""

    every: int = Field(ge=1, description="Rounds between evaluations; the last round is always evaluated.")
    sequences: int | None = Field(
        ge=1, description="Validation windows per silo, evenly spaced; null: all of them."
    )
    batch_size: int = Field(ge=1, description="Sequences per forward pass.")


class CheckpointSection(Section):
    """What is kept to go on after a crash."""

    keep: int = Field(ge=1, description="Newest checkpoints kept; every round makes one.")


class FederationSection(Section):
    """Where the silos run, and how long the server waits for them."""

    engine: Literal["inprocess", "simulation", "deployment"] = Field(
        description="inprocess: no Flower processes; simulation: Flower's simulation engine; deployment: "
        "SuperNodes that the operators started."
    )
    clients_in_parallel: int = Field(ge=1, description="Silos that train at the same time (simulation).")
    gpus_per_client: float = Field(ge=0, description="Share of a GPU per silo (simulation).")
    deadline: float | None = Field(gt=0, description="Seconds a round may take; null: no limit.")
    patience: float | None = Field(
        ge=1,
        description="Wait no longer than so many times what the slowest silo of the cohort last took, as "
        "long as the round can do without those that are missing; null: until the deadline.",
    )
    match_speed: bool = Field(
        description="Give a slower silo fewer local steps, by the speed of its last accepted round, so that "
        "the cohort is done at about the same time."
    )
    quorum: int = Field(ge=1, description="Silos that must answer for a round to count.")
    accepted_failures: int | None = Field(
        ge=0, description="Failed silos a round may have before the run stops; null: any, given a quorum."
    )
    wait_for_silos: float = Field(ge=0, description="Seconds to wait at the start for silos.")
    silos: int | None = Field(ge=1, description="Silos expected at the start; null: those online.")
    tree: dict[str, Any] | str | None = Field(
        None,
        description="Federations within this one, as in `{north: [silo_a, silo_b], south: [silo_c]}`, to any "
        "depth, or a YAML file that says so; null: silos alone.",
    )
    inner_rounds: int = Field(
        1,
        ge=1,
        description="Rounds of a federation within this one in each round of the one above it, unless the "
        "tree says otherwise (HierFAVG's second period).",
    )
    own_silo: str | None = Field(
        None,
        description="Silo on whose text the federation itself trains, before or beside the others as "
        "`strategy.schedule` says; it is never drawn. Within a tree it is a node's `data`.",
    )
    parent: str | None = Field(
        None, description="Set by Photon for a federation within another: its name and the run above it."
    )
    connection: str | None = Field(
        description="Connection of $FLWR_HOME/config.toml that `photon train` gives a deployed run to; "
        "null: Flower's default one."
    )

    @field_validator("tree", mode="before")
    @classmethod
    def _read_tree(cls, tree: object) -> dict[str, Any] | None:
        if isinstance(tree, str):
            tree = _tree_file(Path(tree))
        return None if tree is None else plain_tree(read_tree(tree))

    @property
    def root(self) -> TreeNode | None:
        """The tree, from this federation downwards; None: it has silos alone."""
        return None if self.tree is None else read_tree(self.tree, self.inner_rounds)


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = Field(description="off, offline (files only) or online.")
    project: str = Field(description="Project to log to.")


class TelemetrySection(Section):
    """What a run tells."""

    display: Literal["auto", "plain", "none"] = Field(
        description="auto: live on a terminal, else lines; plain: lines; none: nothing."
    )
    report: bool = Field(description="Write report.html at the end.")
    export: bool = Field(description="Write the Hugging Face folder export/ at the end.")
    diagnostics: bool = Field(
        description="Let clients also report norms of activations and of their local optimizer's state, what "
        "a round changed of that, its cosine with the pseudo-gradient, and LoRDO's basis similarity."
    )
    sample_tokens: int = Field(ge=0, description="Tokens of sample text at the end; 0: none.")
    sample_prompt: str = Field(description="Prompt of the sample text.")
    wandb: WandbSection


class CodecSection(Component):
    """A codec of the link."""


class StoreSection(Section):
    """The shared folder or object store of `transport` store and auto."""

    url: str | None = Field(
        description="Absolute folder or fsspec URL, such as s3://bucket/prefix, as the server reaches it. "
        "Credentials and endpoint come from the environment. A deployed silo names it by `store-url` in its "
        "node config."
    )
    presigned: bool = Field(
        description="The server signs the silos' requests, so that they need no credentials (S3)."
    )


class NamedCodecs(Section):
    """Codecs of the parameters of some names."""

    names: str = Field(description="Regular expression that is found somewhere in the parameter's name.")
    codecs: list[CodecSection] = Field(description="Applied in order; []: they are sent as they are.")


class LinkSection(Section):
    """How state groups travel."""

    up: list[CodecSection] = Field(
        description="Codecs of the parameters, or their update, from silo to server; applied in order."
    )
    up_by_name: list[NamedCodecs] = Field(
        description="Parameters with codecs of their own in place of `up`: `{names: …, codecs: […]}`; the "
        "first expression that is found in a parameter's name counts."
    )
    up_of: Literal["parameters", "update"] = Field(
        description="What `up` is applied to: the trained parameters, or the received minus the trained ones."
    )
    error_feedback: bool = Field(
        description="A silo adds what `up` lost in a round to its next update (`up_of: update`)."
    )
    down: list[CodecSection] = Field(
        description="Codecs of the parameters, or their change, from server to silo; applied in order."
    )
    down_of: Literal["parameters", "update"] = Field(
        description="What `down` is applied to: the parameters, or their change since the round before, for "
        "silos that were in it (others get all of them as they are)."
    )
    states: list[CodecSection] = Field(
        description="Codecs of all other state groups, in both directions; applied to their values. Second "
        "moments need a wide range: Cast, or Float8 with float8_e5m2."
    )
    transport: Literal["inline", "store", "auto"] = Field(
        description="inline: inside messages; store: by reference through `link.store`; auto: through the "
        "store, if there is one, from `inline_limit_mb` on."
    )
    inline_limit_mb: float = Field(
        gt=0, description="Largest payload that travels inside messages with transport=auto, in MiB."
    )
    store: StoreSection

    @model_validator(mode="after")
    def _possible(self) -> "LinkSection":
        if self.error_feedback and self.up_of != "update":
            raise ValueError("link.error_feedback=true needs link.up_of=update")
        if self.down_of == "update" and self.up_of != "update":
            raise ValueError("link.down_of=update needs link.up_of=update")
        url = self.store.url
        if self.transport == "store" and url is None:
            raise ValueError(
                "link.transport=store needs link.store.url: a shared folder or s3://bucket/prefix"
            )
        if self.store.presigned and (url is None or not url.startswith("s3://")):
            raise ValueError(f"link.store.presigned=true works with link.store.url=s3://…, not with {url}")
        if url is not None and "://" not in url and not url.startswith("/"):
            raise ValueError(f"link.store.url={url}: give an absolute folder or a URL")
        return self


class PrivacySection(Section):
    """What is done to a participant's update before it leaves."""

    clip_norm: float | None = Field(
        gt=0,
        description="Bound on the L2 norm of a participant's update in a round, over all parameters that it "
        "sends (C); null: none.",
    )
    noise_multiplier: float = Field(
        ge=0,
        description="Standard deviation of the Gaussian noise on each coordinate of the update, in units of "
        "`clip_norm` (z); 0: no noise.",
    )
    delta: float = Field(gt=0, lt=1, description="The δ for which the summary gives ε.")
    seed: int | None = Field(
        ge=0,
        description="Seed of the noise, for experiments that must be repeatable; null: the operating "
        "system's randomness, without which there is no privacy.",
    )
    secure_aggregation: bool = Field(
        description="Silos mask their updates, so that the server learns the sum of the cohort's alone."
    )
    threshold: int | None = Field(
        ge=2,
        description="Silos of a cohort that must answer so that the sum can be unmasked, a majority; null: "
        "two thirds.",
    )
    range: float = Field(
        gt=0,
        le=1e6,
        description="Largest magnitude of a coordinate of an update that is masked; a larger one fails.",
    )

    @property
    def on(self) -> bool:
        """Whether updates are bounded before they leave."""
        return self.clip_norm is not None

    @model_validator(mode="after")
    def _possible(self) -> "PrivacySection":
        if self.secure_aggregation and self.clip_norm is not None:
            # Eight standard deviations: a coordinate beyond that comes about once in 10^15.
            needed = self.clip_norm * (1 + 8 * self.noise_multiplier)
            if self.range < needed:
                raise ValueError(
                    f"privacy.range={self.range:g}: clipped and noised coordinates reach {needed:g}; raise it"
                )
        if self.noise_multiplier > 0 and self.clip_norm is None:
            raise ValueError(
                f"privacy.noise_multiplier={self.noise_multiplier:g} is in units of privacy.clip_norm; set it"
            )
        return self


class RunConfig(Section):
    """Everything that defines a run."""

    run_dir: str | None = Field(
        description="Folder of the run; null: a new one in runs/, or for `flwr run` in runs/ of $PHOTON_HOME."
    )
    seed: int = Field(ge=0, lt=2**63, description="Seed of initial weights, cohorts and data order.")
    rounds: int = Field(ge=1, description="Rounds to train.")
    local_steps: int = Field(ge=1, description="Local steps of each client in a round (H).")
    cohort: int | None = Field(ge=1, description="Silos sampled per round (K); null: all of them.")
    model: ModelSection
    data: DataSection
    optimizer: Component = Field(description="Local optimizer: any torch.optim.Optimizer by `_target_`.")
    schedule: Component = Field(description="Learning-rate schedule: a function of the global step.")
    outer: Component = Field(description="Outer optimizer: any torch.optim.Optimizer by `_target_`.")
    strategy: Component = Field(description="Who gets which state groups, and how replies are folded.")
    switch: SwitchSection | None = None
    training: TrainingSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    link: LinkSection
    privacy: PrivacySection
    federation: FederationSection
    telemetry: TelemetrySection

    @model_validator(mode="after")
    def _possible(self) -> "RunConfig":
        micro = self.training.micro_batch_size
        if isinstance(micro, int) and (micro < 1 or self.training.batch_size % micro):
            raise ValueError(
                f"training.micro_batch_size={micro} does not divide "
                f"training.batch_size={self.training.batch_size}; choose a divisor"
            )
        if self.training.batch_size % self.training.processes:
            raise ValueError(
                f"training.processes={self.training.processes} does not divide "
                f"training.batch_size={self.training.batch_size}; choose a divisor"
            )
        if micro == "auto" and self.training.processes > 1:
            raise ValueError(
                "training.micro_batch_size=auto works with training.processes=1; give a number or null"
            )
        if self.privacy.secure_aggregation:
            for key, value, needed in (
                ("link.up_of", self.link.up_of, "update"),
                ("link.up", [codec.target for codec in self.link.up], []),
                ("link.up_by_name", [entry.names for entry in self.link.up_by_name], []),
            ):
                if value != needed:
                    raise ValueError(f"privacy.secure_aggregation: {key} must be {needed}, and is {value}")
        if self.data.source == "prepared" and not self.data.path:
            raise ValueError("data.path is not set; name a folder made by `photon data prepare`")
        if self.cohort is not None and self.federation.quorum > self.cohort:
            raise ValueError(
                f"federation.quorum={self.federation.quorum} is larger than cohort={self.cohort}; "
                "a round could never count"
            )
        if self.switch is not None:
            if self.federation.tree is not None:
                raise ValueError("switch: a tree of federations trains without one; leave it out")
            before = self.switch.local_steps or self.local_steps
            if self.switch.step % before:
                raise ValueError(
                    f"switch.step={self.switch.step} lies within a round of {before} local steps; choose a "
                    "multiple"
                )
            if self.switch.step >= self.total_steps:
                raise ValueError(
                    f"switch.step={self.switch.step} is never reached: the run has {self.total_steps} local "
                    "steps; raise rounds"
                )
        return self

    @property
    def pace(self) -> int:
        """Most rounds that a silo takes part in during one round: more than 1 in a tree of federations."""
        return 1 if self.federation.root is None else self.federation.root.pace

    @property
    def total_steps(self) -> int:
        """Local steps of the whole run."""
        return self.steps_after(self.rounds)

    def steps_after(self, rounds: int) -> int:
        """Return the global step after ``rounds`` rounds: the local steps of a client that was in all."""
        if self.switch is None:
            return rounds * self.local_steps * self.pace
        before = self.switch.local_steps or self.local_steps
        warmup = min(rounds, self.switch.step // before)
        return warmup * before + (rounds - warmup) * self.local_steps

    def steps_of(self, server_round: int) -> int:
        """Return the local steps of a round (counted from 1)."""
        return self.steps_after(server_round) - self.steps_after(server_round - 1)

    @property
    def link_in_use(self) -> LinkSection:
        """The link; simulated silos share this machine's disk, so they have a store at any rate."""
        if self.federation.engine != "simulation" or self.run_dir is None or self.link.store.url is not None:
            return self.link
        store = self.link.store.model_copy(update={"url": str(Path(self.run_dir) / "store")})
        return self.link.model_copy(update={"store": store})

    @cached_property
    def text(self) -> str:
        """The configuration as YAML: what is stored with the run and sent to the silos."""
        values = self.model_dump(by_alias=True)
        return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "RunConfig":
        """Return a copy with some fields changed; its text is its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("text", None)
        return copy


def _tree_file(path: Path) -> dict[str, Any]:
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise PhotonError(f"federation.tree={path}: cannot be read ({reason})") from error
    if not isinstance(tree, dict):
        raise PhotonError(f"federation.tree={path}: expected a mapping of federations and silos")
    return tree


def photon_home() -> Path:
    """Return the folder of what runs share: ``$PHOTON_HOME``, or ``~/.photon``."""
    return Path(os.environ.get("PHOTON_HOME") or Path.home() / ".photon").absolute()


def conf_dir() -> Path:
    """Return ``conf/``: beside the package in a checkout or app bundle, inside it in a wheel."""
    package = Path(__file__).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise PhotonError(f"conf/config.yaml is missing beside {package}; reinstall photon")


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Compose ``conf/`` with Hydra overrides and check the result.

    Parameters
    ----------
    overrides
        Hydra overrides, such as ``["strategy=diloco", "rounds=20"]``.

    Raises
    ------
    PhotonError
        For an unknown key or group option (the nearest valid one is named), a value of the wrong type,
        or a combination that cannot work.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        _check_override(override)
    GlobalHydra.instance().clear()
    _register_resolvers()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise PhotonError(explain_hydra_error(error)) from error
    return validate(resolved(composed))


def _check_override(override: str) -> None:
    """Check that an override can be read and is one; Hydra's own words for it help nobody."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if override.startswith("-"):
        raise PhotonError(
            f"{override}: no such option; overrides look like key=value, see `photon train --help`"
        )
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise PhotonError(
            f"{override!r}: cannot be read; overrides look like KEY=VALUE, and a value with = or other signs "
            "needs quotes of its own, as in run_dir='\"a=b\"'"
        ) from error
    if parsed.is_sweep_override():
        raise PhotonError(f"{override}: several values make a sweep; add -m, or write a list as [a,b]")
    group, value = parsed.key_or_group, parsed.value()
    if not group or (_options(group) and not parsed.is_delete() and not isinstance(value, str | list)):
        raise PhotonError(_no_option(group, "null" if value is None else value))


def _register_resolvers() -> None:
    """Let ``conf/`` write ``${times:3,${local_steps}}``: interpolation has no arithmetic of its own."""
    from omegaconf import OmegaConf

    def times(factor: int, value: Any) -> Any:
        # What is no number is told of where it comes from.
        return factor * value if type(value) is int else value

    OmegaConf.register_new_resolver("times", times, replace=True)


def split_overrides(text: str) -> list[str]:
    """Split the run-config string ``overrides`` as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PhotonError(f"overrides: cannot split {text!r} ({error}); check its quotes") from error


@lru_cache(maxsize=8)
def parse(text: str) -> RunConfig:
    """Read a resolved configuration back from its YAML text.

    The result is kept: every message brings the same text, and reading it costs more than a small round.

    Raises
    ------
    PhotonError
        If the text is not YAML or does not fit the schema.
    """
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise PhotonError(f"config: not a valid configuration ({_first_line(error)})") from error
    return validate(values)


def with_overrides(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read ``config.yaml`` of an earlier run and change single keys of it, as in ``seed=1``.

    Raises
    ------
    PhotonError
        If the file or an override is wrong. Group choices such as ``strategy=diloco`` need ``conf/``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = load(path)
    base = OmegaConf.create(config.text)
    OmegaConf.set_struct(base, True)
    try:
        for override in overrides:
            key, equals, _ = override.partition("=")
            if not equals:
                raise PhotonError(f"{override}: expected KEY=VALUE")
            if OmegaConf.is_config(OmegaConf.select(base, key)):
                raise PhotonError(f"{override}: with --config only single keys can be changed, not groups")
            OmegaConf.update(base, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key))
    except OmegaConfBaseException as error:
        raise PhotonError(f"{key}: unknown key{nearest(key, set(known_keys()))}") from error
    return validate(resolved(base))


def load(path: Path) -> RunConfig:
    """Read ``config.yaml`` of a run."""
    if not path.is_file():
        raise PhotonError(f"{path}: no such file; is {path.parent} the folder of a run?")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (PhotonError, UnicodeDecodeError) as error:
        raise PhotonError(f"{path}: {error}") from error


def resolved(composed: Any) -> Any:
    """Return the plain values of a composed OmegaConf configuration."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise PhotonError(f"config: {_first_line(error)}") from error


def validate(values: Any) -> RunConfig:
    """Turn the plain values of a configuration into a :class:`RunConfig`."""
    if not isinstance(values, dict):
        raise PhotonError("config: expected a mapping of keys")
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise PhotonError(explain_validation(error, set(known_keys()))) from error
    for where in ("optimizer", "outer", "schedule", "strategy"):
        _check_component(getattr(config, where), where)
    for where in ("up", "down", "states"):
        for codec in getattr(config.link, where):
            _check_component(codec, f"link.{where}")
    for codec in itertools.chain.from_iterable(entry.codecs for entry in config.link.up_by_name):
        _check_component(codec, "link.up_by_name")
    _try_components(config)
    return config


def _try_components(config: RunConfig) -> None:
    """Build what can be built without silos, so that a refused value ends the run before it starts."""
    import torch

    from photon.components import build
    from photon.link.chains import change_chain, down_chains, up_chains
    from photon.training.schedule import build_schedule
    from photon.training.switch import check_switch

    for where in ("optimizer", "outer"):
        # A matrix, because some optimizers take nothing else.
        build(getattr(config, where).as_mapping(), where, [torch.nn.Parameter(torch.zeros(2, 2))])
    build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    for chains in (up_chains, down_chains, *([change_chain] if config.link.down_of == "update" else [])):
        chains(config.link)
    strategy = build(config.strategy.as_mapping(), "strategy", config)
    if config.privacy.on and strategy.local_state == "sync":
        raise PhotonError(
            "strategy.local_state=sync: states of the local optimizer would leave without noise; with "
            "privacy.clip_norm use keep or reset"
        )
    if config.privacy.secure_aggregation and not strategy.folds_mean:
        raise PhotonError(
            "privacy.secure_aggregation: the strategy folds more than the plain mean of the updates; use "
            "strategy=photon or diloco with strategy.weighting=uniform and without local_state=sync, or "
            "worldlm with strategy.backbone_weights=uniform and without strategy.embeddings=trimmed"
        )
    if config.privacy.noise_multiplier > 0 and strategy.sparse is not None:
        raise PhotonError("privacy.noise_multiplier: noise would fill a sparse model; use a dense strategy")
    if config.privacy.noise_multiplier > 0 and strategy.trims:
        raise PhotonError(
            "privacy.noise_multiplier: with strategy.embeddings=trimmed silos tell their vocabularies, which "
            "no noise hides; use strategy.embeddings=backbone"
        )
    if config.switch is not None:
        check_switch(config.switch, config.optimizer.as_mapping())
    if config.federation.tree is not None and config.federation.parent is None:
        from photon.federation.member import check_nodes

        check_nodes(config)


def _check_component(component: Component, where: str) -> None:
    factory = import_target(component.target, where)
    _check_kind(factory, component.target, where)
    arguments = dict(component.model_extra or {})
    if where == "schedule":
        # These two are resolved by build_schedule, which knows the run.
        arguments.pop("tuned_batch_size", None)
        if arguments.get("steps") is None:
            arguments.pop("steps", None)
    check_arguments(factory, arguments, where)
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PhotonError(f"{where}.{name}={value}: not a finite number")


def _check_kind(factory: Any, target: str, where: str) -> None:
    """Let a section call nothing but what it is for: a configuration may come from another organisation."""
    if where in ("optimizer", "outer"):
        from torch.optim import Optimizer

        fits, kind = inspect.isclass(factory) and issubclass(factory, Optimizer), "a torch.optim.Optimizer"
    elif where == "strategy":
        from photon.strategy.base import Strategy

        fits, kind = inspect.isclass(factory) and issubclass(factory, Strategy), "a photon Strategy"
    elif where == "schedule":
        fits, kind = inspect.isclass(factory) and is_dataclass(factory), "a schedule (a frozen dataclass)"
    else:
        needed = ("name", "encode", "decode")
        fits, kind = inspect.isclass(factory) and all(hasattr(factory, one) for one in needed), "a codec"
    if not fits:
        raise PhotonError(f"{where}._target_={target} is not {kind}; see docs/contributing.md for what fits")


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from known_keys(candidate, f"{key}.")


def explain_hydra_error(error: Exception) -> str:
    """Return one line for a Hydra error, with the nearest valid key or option."""
    messages = [str(error)]
    cause = error.__cause__ or error.__context__
    if cause is not None:
        messages.append(str(cause))
    text = "\n".join(messages)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"In '[^']*': Could not find '([^']+)'", text):
        group, _, option = match[1].rpartition("/")
        return _no_option(group, option)
    return f"config: {_first_line(error)}"


def _options(group: str) -> list[str]:
    """Return the options of a group of ``conf/``."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml")) if group else []


def _no_option(group: str, option: Any) -> str:
    options = _options(group)
    there_are = f" (there are: {', '.join(options)})" if options else ""
    return f"{group}={option}: no such option{nearest(str(option), options)}{there_are}"


def _unknown_key(key: str) -> str:
    """Return one line for a key that the composed configuration does not have."""
    group = key.partition(".")[0]
    having = sorted(one.stem for one, keys in _option_keys() if one.parent.name == group and key in keys)
    if having:
        return f"{key}: not a key of this {group}; those that have it: {', '.join(having)}"
    others = {one for one in _default_keys() if not f"{key}.".startswith(f"{one}.")}
    return f"{key}: unknown key{nearest(key, others)}"


def _default_keys() -> set[str]:
    """Return every dotted key of the default configuration, of the groups' options, and of the schema."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import DictConfig

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        default = hydra_compose("config")
    keys = set(known_keys()).union(*(keys for _, keys in _option_keys()))

    def walk(node: DictConfig, prefix: str) -> None:
        for key in map(str, node):
            keys.add(f"{prefix}{key}")
            if isinstance(child := node._get_node(key), DictConfig):
                walk(child, f"{prefix}{key}.")

    walk(default, "")
    return {key for key in keys if not key.endswith("_target_")}


def _option_keys() -> Iterator[tuple[Path, set[str]]]:
    """Yield every option of every group, and the dotted keys that its file gives."""
    for option in conf_dir().glob("*/*.yaml"):
        text = option.read_text()
        values = {key: value for key, value in (yaml.safe_load(text) or {}).items() if key != "defaults"}
        yield option, set(_dotted(values, "" if "@package _global_" in text else f"{option.parent.name}."))


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")


#: How pydantic names the alternatives of a union.
_ALTERNATIVE = r"(int|float|str|bool)|(literal|dict|list)\[.*\]"


def explain_validation(error: ValidationError, known: Collection[str]) -> str:
    """Return one line for a value that does not fit its schema, whose keys are ``known``."""
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        # The alternatives of a key, such as a number or `auto`, are no part of its name.
        where = ".".join(part for part in map(str, item["loc"]) if not re.fullmatch(_ALTERNATIVE, part))
        if item["type"] == "extra_forbidden":
            problems[f"{where}: unknown key{nearest(where, known)}"] = []
        elif item["type"] == "missing":
            problems[f"{where}: missing; every key has a default in conf/, so remove the deletion"] = []
        elif item["type"] == "value_error":
            problems[str(item["ctx"]["error"])] = []
        else:
            told = f"{item['msg'][0].lower()}{item['msg'][1:]}"
            problems.setdefault(f"{where}={item['input']!r}: ", []).append(told)
    return "; ".join(
        what + " or ".join([told[0], *(one.removeprefix("input should be ") for one in told[1:])])
        if told
        else what
        for what, told in problems.items()
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
