"""The small typed parts of a message: what the server asks and what a silo answers.

They travel as one JSON string in a ``ConfigRecord``, beside the records of the state groups.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    StringConstraints,
    ValidationError,
    model_validator,
)

# pydantic refuses typing.TypedDict before Python 3.12.
from typing_extensions import TypedDict

from photon.config.admission import Lease
from photon.config.decided import Decided
from photon.config.tree import MAX_ROUTED, RoutedTag
from photon.errors import LostError, PhotonError, RefusedError
from photon.link import BODY
from photon.link.bounded import (
    MAX_FIGURE,
    Count,
    Figure,
    FigureName,
    Line,
    Norm,
    Positive,
    Seconds,
    Sha256,
    SiloName,
    ValidationLoss,
    one_line,
)

if TYPE_CHECKING:
    from photon.config.schema import RunConfig

#: A number modulo the order of P-384.
Scalar = Annotated[str, StringConstraints(pattern="^[0-9a-f]{96}$")]
#: Silos of a secure sum, at most.
MAX_SECURE = 2**16
#: Characters of a public key, and of a share that was encrypted.
MAX_KEY, MAX_TOKEN = 1000, 4000

#: Groups of a request that are sent once.
MAX_FIXED = 4
#: Figures that a report may bring beside the usual ones.
MAX_DIAGNOSTICS = 1000
#: Characters of a packed vocabulary: some six million rows.
MAX_VOCABULARY = 2**20
#: Tokens that a tokenizer may know, and tokens of a window.
MAX_SIZE = 2**24
#: Silos below a federation that acts as one, and rounds of theirs in one of ours.
MAX_MEMBERS = 10_000


class Body(BaseModel):
    """A typed message body."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Describe(Body):
    """Ask a node which silos it hosts."""

    kind: Literal["describe"] = "describe"


class Stand(Body):
    """Ask a node to answer further requests that come through the run's store, until it is told to end.

    Each of them is judged and counted as a message of its own. ``channel`` is the folder in the store,
    ``key`` what its files are sealed with, and ``lease`` the seconds after which a side that gives no sign of
    life is taken for dead.
    """

    kind: Literal["stand"] = "stand"
    channel: str = Field(pattern=r"^[0-9A-Za-z_-]{1,64}(/[0-9A-Za-z_-]{1,64}){1,3}$")
    key: Sha256
    lease: Lease


class Stood(Body):
    """Answer to :class:`Stand`, at its end: how many requests were answered, and why it ended."""

    answered: Count
    why: Line


class SiloInfo(Body):
    """What a silo tells about its data; the data itself never leaves.

    A silo that keeps its validation figures tells neither ``validation_tokens`` nor ``unigram_loss``, and is
    not asked to evaluate. A federation that takes part as a silo describes its members together: how many
    silos train for it (``leaves``), and in how many rounds of theirs during one of ours, at most (``pace``).
    ``decided`` is what the silo's machine would train with.
    """

    name: SiloName
    train_tokens: Count
    validation_tokens: Count | None
    unigram_loss: ValidationLoss | None
    vocab_size: int = Field(ge=1, le=MAX_SIZE)
    sequence_length: int = Field(ge=2, le=MAX_SIZE)
    tokenizer_sha256: Sha256
    device: Line
    roofline_flops: float | None = Field(gt=0, le=1e24, allow_inf_nan=False)
    federation: bool = False
    leaves: int = Field(default=1, ge=1, le=MAX_MEMBERS)
    pace: int = Field(default=1, ge=1, le=MAX_MEMBERS)
    decided: Decided | None = None


class Description(Body):
    """Answer to :class:`Describe`."""

    silos: list[SiloInfo]


class Described(Body):
    """A :class:`Description` as it is read: one silo's words cost that silo, and not its neighbours."""

    silos: list[dict[str, Any]] = Field(max_length=100_000)


class AdvertiseKeys(Body):
    """Begin an attempt at a secure sum: ask a silo for new public keys.

    ``attempt`` is new for every one; what was agreed in another does not count.
    """

    kind: Literal["advertise_keys"] = "advertise_keys"
    attempt: str = Field(min_length=16, max_length=64)
    run_id: str
    model_id: str
    round: int = Field(ge=1)
    silo: SiloName


class PublicKeys(Body):
    """A silo's public keys of one attempt, PEM, all of P-384.

    For what is sent to it, for the masks that it shares, and for the mask of its own: the last two are also
    what shares of their private keys are checked against.
    """

    sharing: str = Field(max_length=MAX_KEY)
    masking: str = Field(max_length=MAX_KEY)
    own: str = Field(max_length=MAX_KEY)


class ShareKeys(Body):
    """Hand out everybody's public keys and ask for a share of the silo's secrets for each of the others.

    ``threshold`` shares bring a secret back.
    """

    kind: Literal["share_keys"] = "share_keys"
    attempt: str
    silo: SiloName
    threshold: int = Field(ge=2)
    keys: dict[SiloName, PublicKeys] = Field(max_length=MAX_SECURE)


class Dealing(Body):
    """What all may know of a secret that was split; `photon.privacy.sharing` says what it is.

    Attributes
    ----------
    commitments
        Holder to what its share was bound to.
    blind
        Public key of the polynomial that hides the secret in the proof, PEM.
    proof
        Coefficients, from the constant one on.
    """

    commitments: dict[SiloName, Sha256] = Field(max_length=MAX_SECURE)
    blind: str = Field(max_length=MAX_KEY)
    proof: list[Scalar] = Field(max_length=MAX_SECURE)


class EncryptedShares(Body):
    """Receiver to what only it can read; and what the shares of the two secrets are checked against."""

    shares: dict[SiloName, Annotated[str, StringConstraints(max_length=MAX_TOKEN)]] = Field(
        max_length=MAX_SECURE
    )
    own: Dealing
    masking: Dealing


class Expected(Body):
    """What one share must agree with, made of a `Dealing`."""

    commitment: Sha256
    challenge: Scalar
    response: Scalar


class HandedShare(Body):
    """What one silo has for another, encrypted for it, and what the shares inside must agree with."""

    token: str = Field(max_length=MAX_TOKEN)
    own: Expected
    masking: Expected


class CheckShares(Body):
    """Hand a silo what the others have for it, by sender, and ask which of it cannot be used."""

    kind: Literal["check_shares"] = "check_shares"
    attempt: str
    silo: SiloName
    shares: dict[SiloName, HandedShare] = Field(max_length=MAX_SECURE)


class Complaints(Body):
    """Answer to :class:`CheckShares`: senders whose shares cannot be read, or do not agree."""

    senders: list[SiloName] = Field(max_length=MAX_SECURE)


class Masking(Body):
    """What a train request brings for masks: the attempt, and all silos that mask their updates in it."""

    attempt: str
    silos: list[SiloName] = Field(max_length=MAX_SECURE)


class Unmask(Body):
    """Ask a silo for its shares of what masks the sum.

    Of a survivor, whose masked update has arrived, the share of its own mask; of one that dropped out after
    the shares were handed out, the share of its key. Of nobody both.
    """

    kind: Literal["unmask"] = "unmask"
    attempt: str
    silo: SiloName
    survivors: list[SiloName]
    dropped: list[SiloName]


class Shares(Body):
    """Answer to :class:`Unmask`: shares, of survivors' own masks and of dropped silos' keys."""

    masks: dict[SiloName, Scalar] = Field(max_length=MAX_SECURE)
    keys: dict[SiloName, Scalar] = Field(max_length=MAX_SECURE)


class TrainRequest(Body):
    """Ask for local steps on one silo, or, with none, for sums over its text.

    What may come with it and what the reply holds it does not say: both sides know it from the configuration
    (`photon.strategy.contract`).

    Attributes
    ----------
    run_id, model_id
        The run, and the global model that the request starts from: a silo that is asked twice for the same
        round of the same model answers with what it has already trained.
    silo, members
        The participant's name, and the silos whose text it trains on (itself, unless silos are pooled).
    last_round, position
        The last round whose reply the server accepted from this participant (0: none), and the windows it
        had taken from its text by then. The silo goes on from there.
    cohort
        Participants of the round.
    fixed
        SHA-256 of each group that is sent once, ``fixed/…``, whether or not it comes with this request.
    held
        BLAKE3 hash of the parameters if they do not come: the silo has kept them when it measured them.
    base_hash
        If the parameters come as a change: SHA-256 of those that the silo has from ``last_round``, to which
        it is to be added.
    averaged_rounds
        State group to the round at whose end it was last averaged.
    scalars
        Scalar states of the local optimizers, such as ``step``, after the last round. They go with averaged
        states: a silo that has no state of its own takes both.
    masking
        Under secure aggregation, what the silo needs to mask its update.
    routed
        What the key blocks of other federations are that the request brings.
    decided
        What the silo's machine has decided in this run; None: nothing yet.
    before_merge
        Whether silos also tell the validation loss of the models of their own that they end with.
    """

    run_id: str
    model_id: str
    round: int = Field(ge=1)
    silo: SiloName
    members: list[SiloName] = Field(min_length=1)
    global_step: int = Field(ge=0)
    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    last_round: int = Field(ge=0)
    position: int = Field(ge=0)
    cohort: int = Field(ge=1)
    fixed: dict[str, Sha256] = Field(default_factory=dict, max_length=MAX_FIXED)
    held: Sha256 | None = None
    base_hash: str | None = None
    averaged_rounds: dict[str, int] = Field(default_factory=dict)
    scalars: dict[str, float] = Field(default_factory=dict)
    masking: Masking | None = None
    routed: list[RoutedTag] = Field(default_factory=list, max_length=MAX_ROUTED)
    decided: Decided | None = None
    before_merge: bool = False


class SiloSeconds(TypedDict):
    """Where a silo's time went, in seconds; ``save`` and ``total`` are known once the state is saved."""

    total: Seconds
    training: Seconds
    load: Figure
    save: Figure


class PrivacyReport(Body):
    """What was done to an update before it left, and how often the silo has let one out.

    Attributes
    ----------
    clip_norm
        Bound on its L2 norm.
    noise_multiplier
        Standard deviation of its noise in units of ``clip_norm``; the smallest in this run so far.
    releases
        Updates of this run that have left the silo, accepted by the server or not.
    """

    clip_norm: float = Field(gt=0, le=MAX_FIGURE, allow_inf_nan=False)
    noise_multiplier: Norm
    releases: Positive


class NodeLoss(TypedDict):
    """Validation loss of a node's own model on its validation text: mean over ``tokens`` predictions."""

    loss: ValidationLoss
    tokens: Positive


class TrainReport(Body):
    """What local training did; the trained state groups travel beside it.

    ``privacy`` tells of clipping and noise, where there are any. ``scalars`` are the scalar states of the
    local optimizer, such as ``step``; ``diagnostics`` holds further figures by name, where the run asks for
    them. A federation reports the steps of one of its silos, the tokens of all, its own rounds as its
    position, how many silos it has (``leaves``), and what the key blocks are that it passes on
    (``routed``). With restricted vocabularies ``vocabulary`` says which rows were trained, as
    `photon.models.vocabulary.pack_vocabulary` writes it. Where no steps were taken, ``tokens`` are those that
    were read, and there is no loss. ``decided`` is what was trained with; of a federation it is what
    all its silos trained with. With ``text_changed`` the text is not the one of the silo's last round.
    ``before_merge`` has the losses of the models that silos ended with on their own validation text, where
    the request asks for that and they may be told: the silo's, or those of a federation's silos.
    """

    round: Count
    silo: SiloName
    steps: Count
    tokens: Count
    position: Count
    loss: Figure | None = None
    loss_last: Figure | None = None
    learning_rate: Figure | None = None
    gradient_norm: Norm | None = None
    update_norm: Norm | None
    seconds: SiloSeconds
    state_lost: bool
    privacy: PrivacyReport | None = None
    scalars: dict[FigureName, Figure] = Field(default_factory=dict, max_length=MAX_DIAGNOSTICS)
    diagnostics: dict[FigureName, Figure] = Field(default_factory=dict, max_length=MAX_DIAGNOSTICS)
    leaves: int = Field(default=1, ge=1, le=MAX_MEMBERS)
    routed: list[RoutedTag] = Field(default_factory=list, max_length=MAX_ROUTED)
    vocabulary: str | None = Field(default=None, max_length=MAX_VOCABULARY)
    decided: Decided | None = None
    text_changed: bool = False
    before_merge: dict[SiloName, NodeLoss] = Field(default_factory=dict, max_length=MAX_DIAGNOSTICS)


class EvaluateRequest(Body):
    """Ask for the validation loss of the received model on one silo.

    Attributes
    ----------
    own
        Whether the node also evaluates its own model: the received backbone with the key layers that it has
        kept from ``last_round`` of the run ``run_id``; 0: none.
    fixed, decided
        As of `TrainRequest`.
    model_hash
        BLAKE3 hash of the model if it is to be kept, as the node decodes it. If no model comes, the node has
        it, or
    from_seed
        builds it from the run's seed.
    """

    round: int = Field(ge=0)
    silo: SiloName
    run_id: str = ""
    last_round: int = Field(default=0, ge=0)
    own: bool = False
    fixed: dict[str, Sha256] = Field(default_factory=dict, max_length=MAX_FIXED)
    decided: Decided | None = None
    model_hash: Sha256 | None = None
    from_seed: bool = False


class ForgottenReport(Body):
    """Questions that were ``asked``, the ROUGE-1 recall summed over them, and how many were refused."""

    asked: Positive
    rouge1: float = Field(ge=0, le=MAX_FIGURE, allow_inf_nan=False)
    refused: Count

    @model_validator(mode="after")
    def _possible(self) -> "ForgottenReport":
        if self.rouge1 > self.asked or self.refused > self.asked:
            raise ValueError("more was answered than was asked")
        return self


class EvaluateReport(Body):
    """Validation loss of a silo: mean over ``tokens`` predictions, in nats.

    ``per_node`` has the losses of the models that nodes have of their own: the silo's, or those of a
    federation and of its members. ``kept`` says that the node has kept the model. ``forgotten`` is what the
    model says to questions that the silo keeps because they were forgotten once.
    """

    round: Count
    silo: SiloName
    loss: ValidationLoss
    tokens: Positive
    per_node: dict[SiloName, NodeLoss] = Field(default_factory=dict, max_length=MAX_DIAGNOSTICS)
    kept: bool = False
    forgotten: ForgottenReport | None = None


class Query(
    RootModel[
        Annotated[
            Describe | Stand | AdvertiseKeys | ShareKeys | CheckShares | Unmask, Field(discriminator="kind")
        ]
    ]
):
    """What a message of Flower's category ``query`` may ask for."""


Kind = TypeVar("Kind", bound=BaseModel)


def pack(body: Body, config: "RunConfig | None" = None) -> ConfigRecord:
    """Put ``body``, and the run's configuration if given, in a record."""
    record = ConfigRecord({"body": body.model_dump_json()})
    if config is not None:
        record["config"] = config.text
        # For the ClientApp, which decides by it who does the work and reads no configuration.
        record["engine"] = config.federation.engine
    return record


def pack_refusal(error: RefusedError) -> ConfigRecord:
    """Put a silo's refusal in a record, in the place of a body."""
    return ConfigRecord({"refused": str(error)})


def pack_loss(error: LostError) -> ConfigRecord:
    """Put in a record, in the place of a body, that a silo has lost what it is to have."""
    return ConfigRecord({"lost": str(error)})


def unpack(records: RecordDict, kind: type[Kind]) -> Kind:
    """Read the body of a message.

    Raises
    ------
    PhotonError
        If it is missing or is not a ``kind``.
    RefusedError
        If a silo has refused what it was asked.
    LostError
        If it has lost what it is to have for it.
    """
    record = records.get(BODY)
    if isinstance(record, ConfigRecord) and "refused" in record:
        raise RefusedError(one_line(str(record["refused"])))
    if isinstance(record, ConfigRecord) and "lost" in record:
        raise LostError(one_line(str(record["lost"])))
    text = record.get("body") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise PhotonError("message: it has no photon body; server and silos must run the same photon")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or kind.__name__
        raise PhotonError(one_line(f"message: {where}: {problem['msg']}")) from error


def unpack_config(records: RecordDict) -> str:
    """Read the run's configuration from a message."""
    record = records.get(BODY)
    text = record.get("config") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise PhotonError("message: it brings no configuration")
    return text
