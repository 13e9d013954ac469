"""What a silo accepts: rules of its own, in a file of its own.

A new rule is a field of :class:`SiloPolicy` and a line in one of its checks. `photon.node` calls each of them
at its place in the gate, whatever kind of node answers and whatever kind of message it is.

A rule is judged by what the silo sees for itself wherever that is possible: the parameters of the model that
it would build, the steps and the batch of the request, the sequence length of its own data, and the tokens
that it has counted on its own disk. Names and the size of the cohort are what the aggregator says.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from photon.config.explain import explain_validation
from photon.config.reader import read_file
from photon.config.schema import PrivacySection, RunConfig
from photon.config.section import Section
from photon.errors import PhotonError, RefusedError
from photon.link.messages import TrainRequest
from photon.objective.base import Behind
from photon.silo.names import check_components
from photon.silo.size import check_architecture, sizes_of
from photon.strategy.base import sparse_training, strategy_of
from photon.strategy.contract import Contract

#: The objective of a configuration that names none.
_CAUSAL_LM = "photon.objective.causal_lm.CausalLM"


@dataclass(frozen=True)
class Cost:
    """What a request does with the text of one silo, at most.

    Attributes
    ----------
    steps
        Local steps.
    windows, tokens
        What they are taken on.
    releases
        Updates that are trained on it.
    start
        Window of the text that it begins with.
    available
        Windows of the text that there are; None: nobody here knows.
    idle
        Steps in which the learning rate is next to nothing: what they are taken on is not in the update.
    """

    steps: int
    windows: int
    tokens: int
    releases: int
    start: int = 0
    available: int | None = None
    idle: int = 0

    @property
    def behind(self) -> int:
        """Different windows behind the update, at least."""
        taken = self.windows * (self.steps - self.idle) // self.steps if self.steps else self.windows
        return taken if self.available is None else min(taken, self.available)


class PrivacyRule(Section):
    """What a silo does to its updates, whatever the run asks for."""

    clip_norm: float = Field(gt=0, description="Bound on the L2 norm of an update.")
    noise_multiplier: float = Field(
        0.0, ge=0, description="Standard deviation of the noise on each coordinate, in units of `clip_norm`."
    )

    def applied_to(self, privacy: PrivacySection) -> PrivacySection:
        """Return what keeps the promises of both: the smaller bound, and the larger multiplier of it.

        The privacy loss depends on the multiplier alone. The run's seed would let the aggregator draw the
        same noise, so the silo's own comes from its operating system.
        """
        bounds = [self.clip_norm, *([] if privacy.clip_norm is None else [privacy.clip_norm])]
        noise = max(self.noise_multiplier, privacy.noise_multiplier)
        return privacy.model_copy(update={"clip_norm": min(bounds), "noise_multiplier": noise, "seed": None})


class SiloPolicy(Section):
    """The rules of a silo; one that is null allows everything.

    With a policy there is a least number of windows behind an update, and runs read on where they were. What
    bounds the size of things has a value even without one.
    """

    strategies: list[str] | None = Field(
        None, description="Strategies to take part in, by class (Photon) or by dotted path."
    )
    models: list[str] | None = Field(
        None, description="Models to train, by preset (photon-125m) or by transformers type (gpt2)."
    )
    objectives: list[str] | None = Field(
        None, description="Objectives to take part in, by class (CausalLM) or by dotted path."
    )
    optimizers: list[str] | None = Field(
        None, description="Local optimizers to run, by class (AdamW) or by dotted path."
    )
    modules: list[str] = Field(
        [],
        description="Modules of which components are taken, beside Photon's, torch's and those that "
        "installed packages have registered: optimizers, schedules, strategies, objectives and codecs.",
    )
    max_parameters: int | None = Field(None, ge=1, description="Largest model to train, in parameters.")
    max_layers: int = Field(256, ge=1, description="Most layers of a model, and of blocks like them.")
    max_width: int = Field(2**17, ge=1, description="Largest width in a model.")
    max_experts: int = Field(1024, ge=1, description="Most experts, and most heads, of a layer.")
    max_vocabulary: int = Field(2**20, ge=1, description="Most rows of an embedding.")
    max_sequence_length: int = Field(2**20, ge=2, description="Longest sequences and most positions.")
    max_batch_size: int = Field(2**14, ge=1, description="Most sequences of a local step.")
    max_processes: int = Field(16, ge=1, description="Most processes that train together.")
    min_local_steps: int | None = Field(None, ge=1, description="Fewest local steps of an update.")
    min_round_windows: int | None = Field(
        8,
        ge=1,
        description="Fewest different windows (sequences of text) behind an update, a sum or a validation "
        "loss, and rows of each set that is summed by itself; null: one is enough.",
    )
    min_round_tokens: int | None = Field(None, ge=1, description="Fewest tokens behind an update or a sum.")
    min_repeat_rounds: int | None = Field(
        None,
        ge=1,
        description="Fewest updates between two on the same place of the text. A round that is asked for "
        "again as it was is no second one.",
    )
    chosen_positions: bool = Field(
        False,
        description="Whether the aggregator may choose the place in the text where a run goes on. Otherwise "
        "it begins at the first window, and goes on where one of its rounds began or ended.",
    )
    max_local_steps: int | None = Field(None, ge=1, description="Most local steps in a round.")
    max_round_tokens: int | None = Field(None, ge=1, description="Most tokens to train in a round.")
    max_run_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens to train, accepted or not, in all runs that the silo has counted: the "
        "aggregator may call a run what it likes.",
    )
    min_cohort: int | None = Field(
        None, ge=1, description="Fewest participants of a round; a mean over few says more of each."
    )
    share_validation: bool = Field(
        True, description="Whether figures of the validation text may leave: its size and losses on it."
    )
    secure_aggregation: bool = Field(
        False,
        description="Whether an update leaves only under masks that vanish in the cohort's sum: all of it.",
    )
    alone: list[str] | None = Field(
        [],
        description="Sets of rows, such as `forget` and `reference`, of which a masked sum may be this "
        "silo's alone; null: any.",
    )
    standing: bool = Field(
        True,
        description="Whether one message may stand for many rounds, each of which is judged by itself; until "
        "the run lets go of it, the node answers nobody else.",
    )
    privacy: PrivacyRule | None = Field(
        None, description="Bound on updates and noise on them, beside what the run asks for."
    )

    def check_names(self, silo: str, config: RunConfig) -> None:
        """Check what a run names, before any of it is imported.

        Raises
        ------
        RefusedError
            If a rule forbids a strategy, the model, the objective or the optimizer.
        """
        objective = _CAUSAL_LM if config.objective is None else config.objective.target
        for rule, found in (
            *(("strategies", _names(target)) for target in _strategies(config)),
            ("models", _model_names(config)),
            ("objectives", _names(objective)),
            ("optimizers", _names(config.optimizer.target)),
        ):
            allowed = getattr(self, rule)
            if allowed is not None and not set(found) & set(allowed):
                raise _refused(silo, rule, "[" + ", ".join(allowed) + "]", found[0])

    def check_components(self, silo: str, config: RunConfig) -> None:
        """Check what a run that came from elsewhere would have imported, and how large what it asks for is.

        Raises
        ------
        RefusedError
            If a component is not registered here, or a number is beyond a limit.
        """
        named = [*(self.strategies or ()), *(self.objectives or ()), *(self.optimizers or ())]
        check_components(silo, config, self.modules, [name for name in named if "." in name])
        for rule, where, size in sizes_of(config):
            if size > (limit := getattr(self, rule)):
                raise _refused(silo, rule, f"{limit:,}", f"{where:.200}={size:,}")

    def check_model(self, config: RunConfig) -> None:
        """Check that a model that came from elsewhere is described in full.

        Raises
        ------
        PhotonError
            If it is to be read or fetched.
        """
        check_architecture(config)

    def check_standing(self) -> None:
        """Check that the node may answer a standing request.

        Raises
        ------
        RefusedError
            If its operator wants a message for every request.
        """
        if not self.standing:
            raise _refused("the node", "standing", "false", "a standing request")

    def check_stand_in(self, silo: str, what: str) -> None:
        """Check that the silo may answer as another participant than itself: pooled, or as a branch.

        Parameters
        ----------
        what
            As what.

        Raises
        ------
        RefusedError
            If a rule is a promise of each silo, which its secure sums under one name keep.
        """
        if self.secure_aggregation:
            raise _refused(silo, "secure_aggregation", "true", what)

    def check_run(self, silo: str, config: RunConfig, vocab_size: int) -> None:
        """Check what every order of a run asks for.

        Raises
        ------
        RefusedError
            If a rule forbids the size of the model, a sparse model, or what leaves without noise or mask.
        """
        noisy = self.privacy is not None and self.privacy.noise_multiplier > 0
        if noisy and sparse_training(config):
            raise _refused(silo, "privacy", "noise on every coordinate", "a sparse model")
        if noisy and strategy_of(config).local.restricts_rows:
            raise _refused(silo, "privacy", "noise on what leaves", "the vocabulary, which has none")
        # Here, because scripts/federation.sh reads policies and needs no models otherwise.
        from photon.silo.shapes import param_shapes

        parameters = sum(shape.numel() for shape in param_shapes(config, vocab_size).values())
        self._at_most(silo, "max_parameters", parameters, "a model of {:,} parameters")

    def check_train_request(self, request: TrainRequest) -> None:
        """Check with whom, and under what, an update would leave.

        Raises
        ------
        RefusedError
            If the cohort is too small, or masks are missing.
        """
        if self.min_cohort is not None and request.cohort < self.min_cohort:
            raise _refused(
                request.silo, "min_cohort", f"{self.min_cohort:,}", f"a cohort of {request.cohort}"
            )
        self.check_masks(request.silo, masked=request.masking is not None)

    def check_masks(self, silo: str, *, masked: bool) -> None:
        """Check that updates leave under masks where the silo asks for that.

        Raises
        ------
        RefusedError
            If they do not.
        """
        if self.secure_aggregation and not masked:
            raise _refused(silo, "secure_aggregation", "true", "an update without masks")

    @property
    def judges_contracts(self) -> bool:
        """Whether a rule is of the model, or of what leaves: judged once for a whole run."""
        return self.privacy is not None or self.secure_aggregation or self.max_parameters is not None

    def check_contract(self, silo: str, contract: Contract) -> None:
        """Check what may leave in a round.

        Raises
        ------
        RefusedError
            If something would leave without the noise or the mask that the silo asks for.
        """
        if self.secure_aggregation and (tensors := contract.open_tensors()):
            raise _refused(silo, "secure_aggregation", "true", f"{tensors[0]} without a mask")
        if self.privacy is not None and (groups := contract.unbounded_groups()):
            raise _refused(silo, "privacy", "parameters alone", f"the state groups {', '.join(groups)}")

    def check_cost(self, silo: str, cost: Cost, used: int) -> None:
        """Check how much a request would do with the text of a silo, and how little.

        Parameters
        ----------
        silo
            The silo whose text it is, whatever the request calls the participant.
        cost
            What it would do, at most.
        used
            Tokens of it that were trained so far, under whatever name of a run.

        Raises
        ------
        RefusedError
            If it goes beyond a limit.
        """
        if cost.steps:
            self._at_least(silo, "min_local_steps", cost.steps - cost.idle, "{:,} local steps")
        self._at_least(silo, "min_round_windows", cost.behind, "an update on {:,} window(s)")
        tokens = cost.tokens * cost.behind // max(1, cost.windows)
        self._at_least(silo, "min_round_tokens", tokens, "an update on {:,} tokens")
        self._at_most(silo, "max_local_steps", cost.steps, "{:,} local steps")
        self._at_most(silo, "max_round_tokens", cost.tokens, "{:,} tokens in a round")
        self._at_most(silo, "max_run_tokens", used + cost.tokens, "{:,} tokens so far, in all runs counted")

    def check_place(self, silo: str, problem: str | None) -> None:
        """Check where in the text a request begins.

        Parameters
        ----------
        problem
            Why its place is the aggregator's choice; None: it is not.

        Raises
        ------
        RefusedError
            If it is, and may not be.
        """
        if problem is not None and not self.chosen_positions:
            raise _refused(silo, "chosen_positions", "false", problem)

    def check_repeat(self, silo: str, updates: int | None) -> None:
        """Check how long ago the same text was trained on.

        Parameters
        ----------
        updates
            Updates since then; None: it was not, or the same round is asked for again.

        Raises
        ------
        RefusedError
            If it was too short a while ago.
        """
        if updates is not None:
            self._at_least(silo, "min_repeat_rounds", updates, "the same text after {:,} updates")

    def check_chosen(self, silo: str, windows: int) -> None:
        """Check what an objective has chosen to train on in a round.

        Parameters
        ----------
        windows
            Different windows.

        Raises
        ------
        RefusedError
            If they are too few.
        """
        self._at_least(silo, "min_round_windows", windows, "an update on {:,} chosen window(s)")

    def check_sums(self, silo: str, behind: Behind, *, masked: bool) -> None:
        """Check what is behind the sums that are about to leave.

        Parameters
        ----------
        masked
            Whether they leave under masks, which hide nothing of a silo that is alone in a sum.

        Raises
        ------
        RefusedError
            If it is too little, or the silo would be alone.
        """
        for what, rows in behind.rows.items():
            if rows:
                self._at_least(silo, "min_round_windows", rows, "a sum over {:,} row(s) of the set " + what)
        if not masked or self.alone is None:
            return
        for what, silos in behind.silos.items():
            if silos < 2 and behind.rows[what] and what not in self.alone:
                raise _refused(
                    silo,
                    "alone",
                    f"[{', '.join(self.alone)}]",
                    f"a masked sum over the set {what}, in which it would be alone: masks hide nothing",
                )

    def check_evaluation(self, silo: str, windows: int | None = None) -> None:
        """Check an evaluate request.

        Parameters
        ----------
        windows
            Validation windows that it asks for; None: all.

        Raises
        ------
        RefusedError
            If validation figures may not leave, or would be of too little text.
        """
        if not self.share_validation:
            raise _refused(silo, "share_validation", "false", "a loss on validation text")
        if windows is not None:
            self._at_least(silo, "min_round_windows", windows, "a loss on {:,} window(s)")

    def _at_least(self, silo: str, rule: str, value: int, what: str) -> None:
        limit = getattr(self, rule)
        if limit is not None and value < limit:
            raise _refused(silo, rule, f"{limit:,}", what.format(value))

    def _at_most(self, silo: str, rule: str, value: int, what: str) -> None:
        limit = getattr(self, rule)
        if limit is not None and value > limit:
            raise _refused(silo, rule, f"{limit:,}", what.format(value))


#: Of a silo without one: there are bounds on the size of things alone.
NO_POLICY = SiloPolicy(min_round_windows=None, chosen_positions=True, alone=None)


def read_policy(path: Path | None) -> SiloPolicy:
    """Read a silo's policy; without a file there are bounds on size alone.

    Raises
    ------
    PhotonError
        If the file cannot be read, is not YAML, or has an unknown key (the nearest valid one is named) or a
        wrong value.
    """
    if path is None:
        return NO_POLICY
    try:
        values = read_file(path)
    except PhotonError as error:
        raise PhotonError(f"policy {path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise PhotonError(f"policy {path}: expected a mapping of rules; remove `policy` to allow everything")
    try:
        return SiloPolicy.model_validate(values)
    except ValidationError as error:
        problem = explain_validation(error, SiloPolicy.model_fields)
        raise PhotonError(f"policy {path}: {problem}") from error


def _refused(silo: str, rule: str, limit: str, asked: str) -> RefusedError:
    return RefusedError(f"refused by {silo}'s policy: {rule}={limit}, and the request asks for {asked}")


def _names(target: str) -> tuple[str, str]:
    return target, target.rpartition(".")[2]


def _strategies(config: RunConfig) -> list[str]:
    """Return the strategies that a run names: its own, and those of the nodes of its tree."""
    root = config.federation.root
    rules = [node.strategy or {} for node in root.walk()] if root is not None else []
    return [config.strategy.target, *(str(rule["_target_"]) for rule in rules if "_target_" in rule)]


def _model_names(config: RunConfig) -> list[str]:
    """Return the names that a model goes by: the aggregator's, and the type that is really built."""
    blocks = str((config.model.architecture or {}).get("model_type"))
    return [config.model.name, blocks if config.model.abbie is None else f"abbie_{blocks}"]
