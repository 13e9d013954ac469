"""The settings of the method; what the paper leaves open, or what did not learn as it says, is a key."""

import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from photon.config.explain import explain_validation
from photon.config.reader import read_file
from photon.config.section import Section
from photon.errors import PhotonError, printable

REFINE_PROMPT = (
    "{question}\n\nYour answer so far:\n{own}\n\nAnswers of others to the same question:\n{others}\n\n"
    "Any of these may be wrong, yours too. Check each of them, then answer the question again."
)
_PLACES = {"question", "own", "others"}

Scale = Literal["1", "1/sqrt(d)", "4/d"]


class EncoderSection(Section):
    """What makes vectors of answers; it is frozen."""

    kind: Literal["ngrams", "minilm"] = Field(
        "ngrams", description="`ngrams`: hashed n-grams of characters; `minilm`: a sentence encoder's folder."
    )
    size: int = Field(384, ge=8, le=4096, description="Numbers of a vector of `ngrams`.")
    folder: str | None = Field(None, description="Folder of the encoder, in the form of transformers.")
    of: Literal["answer", "text"] = Field(
        "answer", description="What of a response: the answer that is found in it, or all of it."
    )

    @model_validator(mode="after")
    def _possible(self) -> "EncoderSection":
        if (self.kind == "minilm") != (self.folder is not None):
            raise ValueError("encoder.folder: needed with kind=minilm, and with no other kind")
        return self


class PolicySection(Section):
    """The policy: one transformer encoder layer without positions, and a logit for each pair."""

    logits: Literal["gram", "asymmetric"] = Field(
        "gram",
        description="`gram`: the paper's H Hᵀ; `asymmetric`: (H W_q)(H W_k)ᵀ, which is ours and can favour "
        "edges between unlike drafts.",
    )
    logit_scale: Scale | float = Field("4/d", description="Factor κ of the logits; the paper's is 1.")
    learn_scale: bool = Field(
        False, description="Train κ, whose sign may change: ours. The paper's is fixed."
    )
    logit_bias: float | None = Field(
        -5.0, description="Where the learnt bias of the logits begins; null: none, as in the paper."
    )
    dropout: float = Field(0.3, ge=0, lt=1)
    feedforward: int = Field(2, ge=1, le=16, description="Width of the layer's inner part, in units of d.")

    def scale(self, size: int) -> float:
        """Return κ for vectors of ``size`` numbers."""
        named = {"1": 1.0, "1/sqrt(d)": 1 / math.sqrt(size), "4/d": 4 / size}
        return named[self.logit_scale] if isinstance(self.logit_scale, str) else self.logit_scale

    @model_validator(mode="after")
    def _possible(self) -> "PolicySection":
        for name in ("logit_scale", "logit_bias"):
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) and abs(value) <= 1e4):
                raise ValueError(f"policy.{name}={value}: beyond ±10,000")
        return self


class TrainingSection(Section):
    """REINFORCE with the mean of the batch, or of a question's graphs, as baseline."""

    lr: float = Field(1e-3, gt=0, le=10, description="Of Adam; the paper's is 0.1.")
    updates: int = Field(400, ge=1, le=1_000_000, description="The paper's are 50.")
    batch: int = Field(32, ge=1, le=100_000, description="Questions of an update.")
    graphs: int = Field(
        1,
        ge=1,
        le=1000,
        description="Graphs that are drawn for each question of an update. 1: the baseline is the mean of "
        "the batch, as in the paper; more: the mean of the question's graphs, which is ours.",
    )
    lambda_sp: float = Field(0.1, ge=0, le=1e6, description="What an edge, or all of them, cost.")
    sparsity_norm: Literal["pairs", "raw"] = Field(
        "pairs", description="`pairs`: the share of the N(N−1)/2 edges; `raw`: their number, as in the paper."
    )
    seed: int = Field(0, ge=0, lt=2**62)

    @model_validator(mode="after")
    def _possible(self) -> "TrainingSection":
        if self.batch * self.graphs < 2:
            raise ValueError("training.batch=1: one graph is its own baseline; take more questions or graphs")
        return self


class SelfOrgSection(Section):
    """The training-free baseline (2510.00685)."""

    threshold: float = Field(0.5, ge=-1, le=1, description="τ: least cosine of two that are joined.")
    rounds: int = Field(2, ge=1, le=10, description="Most propagations; 1 is SelfOrg*.")


class Method(Section):
    """All settings; `read_method` reads them from a file."""

    encoder: EncoderSection = EncoderSection()
    policy: PolicySection = PolicySection()
    training: TrainingSection = TrainingSection()
    selforg: SelfOrgSection = SelfOrgSection()
    test_decision: Literal["threshold", "sample"] = Field(
        "threshold", description="An edge is there if its probability is above 0.5, or by chance."
    )
    recompute_psi: bool = Field(True, description="Compute contributions anew after propagation.")
    psi_clip: float | None = Field(
        0.0, ge=0, le=0, description="0: negative contributions count nothing; null: they do."
    )
    refine_prompt: str = Field(REFINE_PROMPT, min_length=1, max_length=20_000)
    most_characters: int = Field(
        4000, ge=1, le=1_000_000, description="Of each response that is shown to another agent."
    )

    @model_validator(mode="after")
    def _possible(self) -> "Method":
        try:
            parts = list(string.Formatter().parse(self.refine_prompt))
        except ValueError as error:
            raise ValueError(f"refine_prompt: {error}; write {{{{ and }}}} for braces") from None
        if any(form or conversion for _, _, form, conversion in parts):
            raise ValueError("refine_prompt: write places as {question}, without conversions or formats")
        places = {name for _, name, _, _ in parts if name is not None}
        if places != _PLACES:
            odd = sorted(places ^ _PLACES)
            raise ValueError(
                f"refine_prompt: has to have {{question}}, {{own}} and {{others}} and nothing else; "
                f"look at {{{odd[0]}}}"
            )
        return self


#: Settings as the paper gives them; where digests of it differ or say nothing, ours.
PAPER: Mapping[str, Any] = {
    "policy": {"logits": "gram", "logit_scale": "1", "logit_bias": None, "dropout": 0.3},
    "training": {"lr": 0.1, "updates": 50, "batch": 32, "lambda_sp": 0.1, "sparsity_norm": "raw"},
}


def known_keys() -> list[str]:
    """Return every key of a file, sections and what is in them."""
    keys: list[str] = []
    for name, field in Method.model_fields.items():
        keys.append(name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += [f"{name}.{inner}" for inner in kind.model_fields]
    return keys


def read_method(path: Path | None) -> Method:
    """Read settings from YAML; without a file all have their defaults.

    Raises
    ------
    PhotonError
        If it cannot be read, or has an unknown key (the nearest valid one is named) or a wrong value.
    """
    if path is None:
        return Method()
    try:
        values = read_file(path)
    except PhotonError as error:
        raise PhotonError(f"method {path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise PhotonError(f"method {path}: expected sections, such as `policy:` and `training:`")
    return method_of(values, f"method {printable(path)}")


def method_of(values: Any, where: str) -> Method:
    """Return the settings that plain values give; ``where`` begins the line of an error."""
    try:
        return Method.model_validate(values)
    except ValidationError as error:
        raise PhotonError(f"{where}: {explain_validation(error, known_keys())}") from error
