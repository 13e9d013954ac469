"""The schema of a run's configuration: what each key means and which values it may take.

``conf/`` holds every default. The schema knows its own keys, and nothing of the code that they configure:
whether a configuration can run is asked by `photon.preflight`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from photon.config.abbie import AbbieSection
from photon.config.adapter import AdapterSection
from photon.config.admission import AdmissionSection, GuardSection, StandingLease
from photon.config.evaluation import FurtherEvaluation
from photon.config.floats import tagged
from photon.config.privacy import PrivacySection
from photon.config.section import Section, Sources
from photon.config.trackers import WandbSection
from photon.config.training import TrainingSection, TransitionSection
from photon.config.tree import TreeNode, plain_tree, read_tree
from photon.errors import PhotonError

#: Largest seed that fits in 64 bits with a sign.
LARGEST_SEED = 2**63 - 1
#: Codecs of one list, and entries of `link.uplink_by_name`.
MAX_CODECS, MAX_NAMED = 16, 100


class Loader(yaml.CSafeLoader):
    """Reads plain values; ``1e-3`` is a number, as in an override."""


class Dumper(yaml.CSafeDumper):
    """Writes what :class:`Loader` reads back as the same value, all of it written out."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value in full wherever it stands."""
        return True


for _one in (Loader, Dumper):
    _one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


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
    local_batch_size: int = Field(ge=1, description="Sequences per local step of a federated silo.")
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
    abbie: AbbieSection | None = Field(
        None, description="Apply the middle blocks several times (gpt2 and llama); null: each once."
    )
    recipe: RecipeSection

    @field_validator("architecture")
    @classmethod
    def _as_json(cls, architecture: dict[str, Any] | None) -> dict[str, Any] | None:
        """Write an infinity as transformers does: a section may travel as JSON."""
        return None if architecture is None else {key: tagged(value) for key, value in architecture.items()}


class HubSection(Section):
    """A corpus that `datasets` streams."""

    corpus: str = Field(
        description="Name of a known corpus (c4, the-pile, mc4 or fineweb-edu), or OWNER/NAME of a data set "
        "on the hub, each perhaps with :CONFIG."
    )
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
    filter: list[str] = Field(
        [],
        description="Labels of `photon data label` whose training windows are left out; []: none is, and no "
        "silo needs labels.",
    )
    mixture: dict[str, float] | None = Field(
        None,
        description="Label to its weight, others have 1: of a label's training windows a silo reads the "
        "share that its weight is of the largest, the same ones in every epoch; null: all.",
    )

    @model_validator(mode="after")
    def _possible(self) -> "DataSection":
        for name, weight in (self.mixture or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"data.mixture.{name}={weight}: expected a number above 0; leave a label out with "
                    "data.filter"
                )
        if both := sorted(set(self.filter) & set(self.mixture or {})):
            raise ValueError(f"data.filter: {both[0]} has a weight in data.mixture, too; remove one of them")
        return self


class EvaluationSection(FurtherEvaluation):
    """Validation of the global model on the silos, and what is evaluated beside it."""

    every: int = Field(ge=1, description="Rounds between evaluations; the last round is always evaluated.")
    cohort: int | Literal["auto"] | None = Field(
        "auto",
        description="How many silos measure a model beside those that train from it next, which measure what "
        "they receive; drawn by the seed. null: all silos; auto: all in a federation of up to 32, and 4 "
        "beside them in a larger one.",
    )
    full_every: int | None = Field(
        50,
        ge=1,
        description="Rounds from one evaluation by all silos to the next, at which others are drawn; the "
        "first and the last evaluation are by all; null: no others are.",
    )
    sequences: int | None = Field(
        ge=1, description="Validation windows per silo, evenly spaced; null: all of them."
    )
    batch_size: int = Field(ge=1, description="Sequences per forward pass.")

    @model_validator(mode="after")
    def _possible(self) -> "EvaluationSection":
        if isinstance(self.cohort, int) and self.cohort < 1:
            raise ValueError(
                f"evaluation.cohort={self.cohort}: at least one silo must measure each model, so that it can "
                "be compared with the one before"
            )
        return self


class CheckpointSection(Section):
    """What is kept to go on from: after a crash, or back to an earlier round."""

    keep: int = Field(ge=1, le=10_000, description="Newest checkpoints kept; every round makes one.")
    permanent_every: int | None = Field(
        None,
        ge=1,
        description="Rounds from one checkpoint that is kept for ever to the next; null: none is.",
    )
    keep_best: bool = Field(
        False,
        description="Keep the checkpoint with the lowest validation loss, however old it is.",
    )


class FederationSection(Section):
    """Where the silos run, and how long the server waits for them."""

    engine: Literal["inprocess", "simulation", "deployment"] = Field(
        description="inprocess: no Flower processes; simulation: Flower's simulation engine; deployment: "
        "SuperNodes that the operators started."
    )
    silos_in_parallel: int = Field(ge=1, description="Silos that train at the same time (simulation).")
    gpus_per_silo: float = Field(ge=0, description="Share of a GPU per silo (simulation).")
    deadline: float | None = Field(gt=0, description="Seconds a round may take; null: no limit.")
    straggler_timeout_factor: float | None = Field(
        ge=1,
        description="Wait no longer than so many times what the slowest silo of the cohort last took, as "
        "long as the round can do without those that are missing; null: until the deadline.",
    )
    adaptive_local_steps: bool = Field(
        description="Give a slower silo fewer local steps, by the speed of its last accepted round, so that "
        "the cohort is done at about the same time."
    )
    quorum: int = Field(ge=1, description="Silos that must answer for a round to count.")
    max_failures: int | None = Field(
        ge=0, description="Failed silos a round may have before the run stops; null: any, given a quorum."
    )
    max_weight: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Largest share of a round's mean that a participant may have, by what its cohort was "
        "asked; 1: whatever it counts for.",
    )
    admission: AdmissionSection = AdmissionSection()
    guard: GuardSection = GuardSection()
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
    server_silo: str | None = Field(
        None,
        description="Silo on whose text the federation itself trains, before or beside the others as "
        "`strategy.schedule` says; it is never drawn. Within a tree it is a node's `data`.",
    )
    parent: str | None = Field(
        None, description="Set by Photon for a federation within another: its name and the run above it."
    )
    lease: StandingLease = None
    connection: str | None = Field(
        description="Connection of $FLWR_HOME/config.toml that `photon train` gives a deployed run to; "
        "null: Flower's default one."
    )

    @field_validator("tree", mode="before")
    @classmethod
    def _read_tree(cls, tree: object) -> dict[str, Any] | None:
        if isinstance(tree, str):
            raise PhotonError(
                f"federation.tree={tree}: a file, and a configuration that came from elsewhere names none; "
                "write the tree out"
            )
        return None if tree is None else plain_tree(read_tree(tree))

    @property
    def root(self) -> TreeNode | None:
        """The tree, from this federation downwards; None: it has silos alone."""
        return None if self.tree is None else read_tree(self.tree, self.inner_rounds)


class TelemetrySection(Section):
    """What a run tells."""

    listeners: list[Component] | None = Field(
        None,
        description="Who hears what happens, in order: classes or functions by `_target_`, with their "
        "arguments. The event log comes first. null: log, display, and Weights & Biases.",
    )
    display: Literal["auto", "plain", "none"] = Field(
        description="auto: live on a terminal, else lines; plain: lines; none: nothing."
    )
    report: bool = Field(description="Write report.html at the end.")
    export: bool = Field(description="Write the Hugging Face folder export/ at the end.")
    diagnostics: bool = Field(
        description="Let silos also report norms of activations and of their local optimizer's state, what "
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

    names: str = Field(
        description="Regular expression (RE2) that is found somewhere in the parameter's name."
    )
    codecs: list[CodecSection] = Field(
        max_length=MAX_CODECS, description="Applied in order; []: they are sent as they are."
    )


class LinkSection(Section):
    """How state groups travel."""

    uplink: list[CodecSection] = Field(
        max_length=MAX_CODECS,
        description="Codecs of the parameters, or their update, from silo to server; applied in order.",
    )
    uplink_by_name: list[NamedCodecs] = Field(
        max_length=MAX_NAMED,
        description="Parameters with codecs of their own in place of `uplink`: `{names: …, codecs: […]}`; "
        "the first expression that is found in a parameter's name counts.",
    )
    uplink_payload: Literal["parameters", "update"] = Field(
        description="What `uplink` is applied to: the trained parameters, or the received minus the trained "
        "ones."
    )
    error_feedback: bool = Field(
        description="A silo adds what `uplink` lost in a round to its next update (`uplink_payload: update`)."
    )
    error_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="The share of what was lost that it adds (`error_feedback: true`); 1: all of it.",
    )
    mean_over: Literal["silos", "senders"] = Field(
        "silos",
        description="silos: a value that a silo's update leaves out counts as zero; senders: the mean of "
        "each value is taken over those silos that sent it (`uplink_payload: update`).",
    )
    downlink: list[CodecSection] = Field(
        max_length=MAX_CODECS,
        description="Codecs of the parameters, or their change, from server to silo; applied in order.",
    )
    downlink_payload: Literal["parameters", "update"] = Field(
        description="What `downlink` is applied to: the parameters, or their change since the round before, "
        "for silos that were in it (others get all of them as they are)."
    )
    states: list[CodecSection] = Field(
        max_length=MAX_CODECS,
        description="Codecs of all other state groups, in both directions; applied to their values. Second "
        "moments need a wide range: Cast, or Float8 with float8_e5m2.",
    )
    transport: Literal["inline", "store", "auto"] = Field(
        description="inline: inside messages; store: by reference through `link.store`; auto: through the "
        "store, if there is one, from `inline_limit_mb` on."
    )
    inline_limit_mb: float = Field(
        gt=0, description="Largest payload that travels inside messages with transport=auto, in MiB."
    )
    keep_received: bool = Field(
        True,
        description="A silo keeps the model that it measures before it trains from it, and is not sent it "
        "again; false: it is sent with every request.",
    )
    store: StoreSection

    @model_validator(mode="after")
    def _possible(self) -> "LinkSection":
        if self.error_feedback and self.uplink_payload != "update":
            raise ValueError("link.error_feedback=true needs link.uplink_payload=update")
        if self.error_decay != 1 and not self.error_feedback:
            raise ValueError(
                f"link.error_decay={self.error_decay:g} needs link.error_feedback=true; nothing is added else"
            )
        if self.mean_over == "senders" and self.uplink_payload != "update":
            raise ValueError("link.mean_over=senders needs link.uplink_payload=update")
        if self.downlink_payload == "update" and self.uplink_payload != "update":
            raise ValueError("link.downlink_payload=update needs link.uplink_payload=update")
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


class RunConfig(Section):
    """Everything that defines a run."""

    run_dir: str | None = Field(
        description="Folder of the run; null: a new one in runs/, or for `flwr run` in runs/ of $PHOTON_HOME."
    )
    seed: int = Field(
        ge=0, lt=LARGEST_SEED + 1, description="Seed of initial weights, cohorts and data order."
    )
    rounds: int = Field(ge=1, description="Rounds to train.")
    local_steps: int = Field(ge=1, description="Local steps of each silo in a round (H).")
    cohort: int | None = Field(ge=1, description="Silos sampled per round (K); null: all of them.")
    model: ModelSection
    data: DataSection
    adapter: AdapterSection | None = Field(None, description="LoRA; null: the whole model is trained.")
    objective: Component | None = Field(
        None,
        description="What is trained: the loss of a batch, and how it is measured; null: causal language "
        "modelling.",
    )
    optimizer: Component = Field(description="Local optimizer: any torch.optim.Optimizer by `_target_`.")
    schedule: Component = Field(description="Learning-rate schedule: a function of the global step.")
    outer: Component = Field(description="Outer optimizer: any torch.optim.Optimizer by `_target_`.")
    strategy: Component = Field(description="Who gets which state groups, and how replies are folded.")
    transition: TransitionSection | None = None
    training: TrainingSection
    evaluation: EvaluationSection
    checkpoint: CheckpointSection
    link: LinkSection
    privacy: PrivacySection
    federation: FederationSection
    telemetry: TelemetrySection

    _taken: Sources = PrivateAttr(default_factory=Sources)

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
                ("link.uplink_payload", self.link.uplink_payload, "update"),
                ("link.uplink", [codec.target for codec in self.link.uplink], []),
                ("link.uplink_by_name", [entry.names for entry in self.link.uplink_by_name], []),
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
        if self.transition is not None:
            if self.federation.tree is not None:
                raise ValueError("transition: a tree of federations trains without one; leave it out")
            before = self.transition.local_steps or self.local_steps
            if self.transition.step % before:
                raise ValueError(
                    f"transition.step={self.transition.step} lies within a round of {before} local steps; "
                    "choose a multiple"
                )
            if self.transition.step >= self.total_steps:
                raise ValueError(
                    f"transition.step={self.transition.step} is never reached: the run has "
                    f"{self.total_steps} local steps; raise rounds"
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
        """Return the global step after ``rounds`` rounds: the local steps of a silo that was in all."""
        if self.transition is None:
            return rounds * self.local_steps * self.pace
        before = self.transition.local_steps or self.local_steps
        warmup = min(rounds, self.transition.step // before)
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

    def border_privacy(self, node: TreeNode) -> PrivacySection:
        """Return what is done to what a node of the tree sends to the federation above it."""
        return PrivacySection.model_validate({**self.privacy.model_dump(), **(node.privacy or {})})

    @cached_property
    def text(self) -> str:
        """The configuration as YAML: what is stored with the run and sent to the silos."""
        values = self.model_dump(by_alias=True)
        return str(yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> "RunConfig":
        """Return a copy with some fields changed; its text is its own."""
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("text", None)
        return copy


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of the schema."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        yield key
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from known_keys(candidate, f"{key}.")
