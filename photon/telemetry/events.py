"""The typed events of a run, and the stream that hands them to listeners.

An event is one line of JSON in ``events.jsonl``: ``event`` (its name), ``time`` (unix seconds), ``clock``
and the fields of its class. JSON knows no NaN and no infinity, so both are written as ``null``; where a
number is required, ``null`` is read back as NaN, and where a figure may be missing as ``None``.
"""

import dataclasses
import functools
import json
import math
import numbers
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter, ValidationError

# pydantic refuses typing.TypedDict before Python 3.12, and brings this package along.
from typing_extensions import TypedDict

from photon.config.renamed import renamed
from photon.errors import PhotonError

#: Nats per token above which a perplexity is no number any more.
LARGEST_LOSS = math.log(sys.float_info.max)
_Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class SiloFacts(TypedDict):
    """What the manifest says of one silo: tokens of both splits, unigram loss in nats per token.

    ``None`` where the silo keeps its validation figures.
    """

    name: str
    train_tokens: int
    validation_tokens: int | None
    unigram_loss: float | None


class SiloSeconds(TypedDict):
    """Where one silo's time in a round went, in seconds; ``total`` is the sum and what is between."""

    total: _Number
    training: _Number
    load: _Number
    save: _Number


class PrivacyReport(TypedDict):
    """What was done to a silo's update before it left: its bound, and its noise in units of that.

    ``noise_multiplier`` is the smallest in this run so far; ``releases`` counts the updates that have left
    the silo in this run.
    """

    clip_norm: _Number
    noise_multiplier: _Number
    releases: int


class PrivacyFacts(TypedDict):
    """What the run asks of updates: noise in units of their bound, and the δ for which ε is given."""

    noise_multiplier: _Number
    delta: _Number


class RoundSeconds(TypedDict):
    """Where a round's time went, in seconds.

    ``round`` is the whole, ``overhead`` what is not training. ``training`` is the slowest silo's where
    silos train side by side, and their sum where one machine trains them in turn.
    """

    round: _Number
    training: _Number
    fold: _Number
    outer: _Number
    evaluate: _Number
    checkpoint: _Number
    overhead: _Number


class SiloEvaluation(TypedDict):
    """Validation of the global model on one silo: loss in nats per token, perplexity, tokens predicted."""

    loss: _Number
    perplexity: _Number
    tokens: int


def perplexity_of(loss: float) -> float:
    """Return e to the loss in nats per token; infinite where that is beyond all numbers."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def perplexity_text(value: float | None, digits: int = 1, *, loss: float | None = None) -> str:
    """Return a perplexity with as many digits as mean something, such as ``38.2``, ``1,062`` or ``1e128``.

    Parameters
    ----------
    value
        The perplexity; None, or no number: it is not known.
    digits
        Decimals of one below 10,000.
    loss
        Nats per token, by which one is told that is beyond all numbers.
    """
    if value is None or math.isnan(value):
        if loss is None or not LARGEST_LOSS < loss < math.inf:
            return "–"
        value = math.inf
    if math.isinf(value):
        known = loss is not None and math.isfinite(loss)
        return f"1e{loss / math.log(10):.0f}" if loss is not None and known else "beyond 1e308"
    if value >= 1e9:
        return f"{value:.0e}".replace("e+", "e")
    return f"{value:,.{digits}f}" if value < 10_000 else f"{value:,.0f}"


def evaluation_of(loss: float, tokens: int) -> SiloEvaluation:
    """Return a validation, given its loss in nats per token; a perplexity beyond all numbers is infinite."""
    return {"loss": loss, "perplexity": perplexity_of(loss), "tokens": tokens}


class Remembered(TypedDict):
    """What a model says to the questions of one silo that were forgotten once.

    How many were ``asked``, the mean ROUGE-1 recall of the right answers, and the share that is refused.
    """

    asked: int
    rouge1: _Number
    refused: _Number


class TaskFigures(TypedDict):
    """What lm-eval found of one task: metrics, over ``questions``, each with ``shots`` examples before it.

    ``chance`` is the accuracy of guessing; ``None`` where nothing is guessed or nobody has computed it.
    """

    metrics: dict[str, _Number]
    questions: int | None
    shots: int
    chance: float | None


class SuiteFigures(TypedDict):
    """Mean accuracy over a suite's tasks that are there, and its mean part above chance, if all have one."""

    tasks: int
    accuracy: float | None
    above_chance: float | None


@dataclass(frozen=True, kw_only=True)
class Event:
    """What every event carries: ``time``, unix seconds at which it happened.

    ``clock`` is the same moment in seconds of a clock that nobody sets, for the time between two events of
    one attempt; ``None`` where nobody has looked at it.
    """

    time: float = dataclasses.field(default_factory=time.time)
    clock: float | None = dataclasses.field(default=None, compare=False)

    def to_json(self) -> str:
        """Return the event as one line of JSON without a line end."""
        fields = {field.name: plain_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return json.dumps({"event": event_name(type(self)), **fields}, allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run began, or began again: ``resumed_from`` is the last complete round it goes on from.

    ``local_steps`` is 0 where the objective takes none. ``flops_per_token`` counts forward and backward pass;
    ``roofline_flops`` is the device's measured or documented peak in FLOP/s, ``None`` where nobody knows it.
    ``tree`` is what is below in a federation of federations, as `photon.config.tree.read_tree` reads it;
    ``None`` where there are silos alone.
    """

    run_id: str
    name: str
    strategy: str
    model: str
    parameters: int
    silos: list[SiloFacts]
    rounds: int
    cohort: int
    local_steps: int
    batch_size: int
    sequence_length: int
    engine: Literal["inprocess", "simulation", "deployment"]
    device: str
    roofline_flops: float | None
    resumed_from: int | None
    flops_per_token: _Number
    privacy: PrivacyFacts | None = None
    tree: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RoundStarted(Event):
    """The cohort of a round was drawn; ``global_step`` is the local steps done before it."""

    round: int
    cohort: list[str]
    global_step: int


@dataclass(frozen=True, kw_only=True)
class SiloFinished(Event):
    """A silo's reply was accepted; losses in nats per token, bytes as they crossed the link.

    Where no steps were taken, ``tokens`` were read, and there is no loss, gradient and learning rate (NaN).

    ``group_bytes_up`` and ``group_bytes_down`` are those of each state group's tensors; the rest of the bytes
    are names, shapes, request and report. ``privacy`` is None where updates leave as they are.
    ``before_merge`` has what models of silos gave on their own text that had not been averaged yet, by silo.
    """

    round: int
    silo: str
    steps: int
    tokens: int
    loss: _Number
    loss_last: _Number
    learning_rate: _Number
    seconds: SiloSeconds
    bytes_up: int
    bytes_down: int
    update_norm: _Number
    tokens_per_second: _Number
    mfu: float | None
    gradient_norm: _Number
    group_bytes_up: dict[str, int] = dataclasses.field(default_factory=dict)
    group_bytes_down: dict[str, int] = dataclasses.field(default_factory=dict)
    privacy: PrivacyReport | None = None
    before_merge: dict[str, SiloEvaluation] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SiloFailed(Event):
    """A silo of the cohort gave no usable reply."""

    round: int
    silo: str
    kind: Literal["error", "rejected", "refused", "deadline", "unavailable"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class RoundFinished(Event):
    """The outer step of a round is done.

    ``tokens`` is cumulative over all silos, the bytes are those of this round's training, over all silos;
    ``group_bytes_up`` and ``group_bytes_down`` as in `SiloFinished`.
    ``silo_cosine`` is the norm-weighted mean of the pairwise cosines between the silos' updates,
    ``None`` with a single silo; ``consensus`` that of the cosines between each and the pseudo-gradient.
    """

    round: int
    global_step: int
    tokens: int
    train_loss: _Number
    pseudo_gradient_norm: _Number
    silo_cosine: float | None
    consensus: _Number
    parameter_norm: _Number
    bytes_up: int
    bytes_down: int
    seconds: RoundSeconds
    group_bytes_up: dict[str, int] = dataclasses.field(default_factory=dict)
    group_bytes_down: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnostics(Event):
    """Further figures of a round, under ``figure/of what`` names.

    ``parameter_norm/LAYER``, ``pseudo_gradient_norm/LAYER``, ``outer_GROUP_norm/all``, ``noise/scale``; where
    ``telemetry.diagnostics`` is on also what the silos measure: ``exp_avg_norm/SILO``, its relative
    change over the round ``exp_avg_change/SILO``, its cosine with the silo's pseudo-gradient
    ``exp_avg_cosine/SILO``, LoRDO's ``basis_similarity/SILO``, norms of activations, and
    ``update_norm_before_clip/SILO`` where updates are clipped.
    Of key layers: the weights of attention to the children ``attention/BLOCK/CHILD`` and
    ``attention/BLOCK/self``; how much of its own a node keeps of what comes from above,
    ``attention_self/SILO`` and in a federation's own events ``attention_self/down``; and for each key block
    that travelled to a child that answered, how much they are alike: ``routed/BLOCK/ORIGIN>CHILD``.
    """

    round: int
    values: dict[str, _Number]


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The global model was validated; round 0 is before any training, overall is weighted by tokens.

    The bytes are what the validation itself moved over the link, all silos together. ``per_node`` has for
    every silo and federation below what its own model gives on its own text: the global one, unless the
    strategy leaves it layers of its own.

    Of ``of_silos`` that measure models ``asked`` were asked, and those in ``per_silo`` have answered.
    ``error`` is the standard error of ``loss`` as an estimate of what all would give: 0 where all have
    answered, ``None`` where one alone has, or nobody knows. ``figures`` are what the objective measures
    beside the loss, over those who told it, weighted as the loss is.

    ``remembered`` has, of silos that keep questions which were forgotten once, what the model says to them.
    """

    round: int
    per_silo: dict[str, SiloEvaluation]
    loss: _Number
    perplexity: _Number
    tokens_trained: int
    bytes_up: int
    bytes_down: int
    seconds: _Number
    per_node: dict[str, SiloEvaluation] = dataclasses.field(default_factory=dict)
    asked: int | None = None
    of_silos: int | None = None
    error: float | None = None
    remembered: dict[str, Remembered] = dataclasses.field(default_factory=dict)
    figures: dict[str, _Number] = dataclasses.field(default_factory=dict)

    @property
    def recall(self) -> float | None:
        """Mean ROUGE-1 recall of what was forgotten, over all questions that were asked; ``None``: none."""
        asked = sum(silo["asked"] for silo in self.remembered.values())
        recalled = math.fsum(silo["asked"] * silo["rouge1"] for silo in self.remembered.values())
        return recalled / asked if asked else None

    @property
    def is_estimate(self) -> bool:
        """Whether some of the silos alone were asked."""
        return self.asked is not None and self.of_silos is not None and self.asked < self.of_silos


@dataclass(frozen=True, kw_only=True)
class TasksEvaluated(Event):
    """The aggregator asked the global model the questions of tasks; ``tokens_trained`` as of `Evaluated`.

    ``suites`` has the mean of each suite, ``missing`` the tasks of suites that are not there. ``failure`` is
    why there is nothing, in one line.
    """

    round: int
    tokens_trained: int
    seconds: _Number
    tasks: dict[str, TaskFigures] = dataclasses.field(default_factory=dict)
    suites: dict[str, SuiteFigures] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Unlearned(Event):
    """Something was taken out of the model; ``request`` is what `photon.state.unlearned.Unlearned` says."""

    round: int
    request: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """A checkpoint is complete on disk; ``path`` is relative to the run folder."""

    round: int
    path: str
    bytes: int
    seconds: _Number


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """All rounds are done; ``summary`` is the content of ``summary.json``."""

    summary: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunInterrupted(Event):
    """The run stopped early after the complete round ``round``; but for bad input it can be resumed."""

    round: int
    reason: str
    bad_input: bool = False


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something a reader of the run should know, in words."""

    level: Literal["info", "warning"]
    message: str


EVENT_TYPES: tuple[type[Event], ...] = (
    RunStarted,
    RoundStarted,
    SiloFinished,
    SiloFailed,
    RoundFinished,
    Diagnostics,
    Evaluated,
    TasksEvaluated,
    Unlearned,
    Checkpointed,
    RunFinished,
    RunInterrupted,
    Notice,
)

Listener = Callable[[Event], None]


class EventStream:
    """Hands each event to every listener, in order.

    A listener that raises must not end a run: it is dropped, and a `Notice` tells the others.

    Parameters
    ----------
    listeners
        They hear each event.
    log
        It hears each event before them, and is never dropped: a run without its log cannot be told of, so
        what it raises ends the run. None: there is none.
    """

    def __init__(self, listeners: Sequence[Listener] = (), *, log: Listener | None = None) -> None:
        self._log = log
        self._listeners: list[Listener] = []
        self._at_the_end = ExitStack()
        if log is not None and hasattr(log, "close"):
            self._at_the_end.callback(log.close)
        for listener in listeners:
            self.add(listener)

    def add(self, listener: Listener) -> None:
        """Let one more hear what comes from now on, after the others."""
        self._listeners.append(listener)
        if hasattr(listener, "close"):
            self._at_the_end.callback(self._close, listener, listener.close)

    def emit(self, event: Event) -> None:
        """Hand ``event``, with the clock's seconds, to the log and to the listeners that are left."""
        if event.clock is None:
            event = dataclasses.replace(event, clock=time.monotonic())
        if self._log is not None:
            self._log(event)
        broken = []
        for listener in tuple(self._listeners):
            try:
                listener(event)
            except Exception as error:
                self._listeners.remove(listener)
                broken.append(_warning(listener, "is dropped, the run goes on", error))
        # Once all have heard the event, because it comes first.
        for notice in broken:
            self.emit(notice)

    def close(self) -> None:
        """Call ``close`` of all that have it, dropped ones too: the last first, and the log at the end."""
        self._at_the_end.close()

    def _close(self, listener: Listener, close: Callable[[], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)
        try:
            close()
        except Exception as error:
            # Where the log fails, too, that has been told already.
            with suppress(Exception):
                self.emit(_warning(listener, "could not be closed", error))


def event_name(kind: type[Event]) -> str:
    """Return the name under which ``kind`` stands in ``events.jsonl``, such as ``run_started``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def from_json(line: str) -> Event:
    """Read an event from a line written by `Event.to_json`, by an earlier version's, too.

    Raises
    ------
    PhotonError
        The line is not a JSON object, names an unknown event, or lacks a field or has one of a wrong type.
    """
    shown = line.strip() if len(line) <= 120 else f"{line.strip()[:117]}..."
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PhotonError(f"not an event, since it is no JSON ({error}): {shown}") from None
    if not isinstance(content, dict) or not isinstance(content.get("event"), str):
        raise PhotonError(f'not an event, since it is no JSON object with an "event": {shown}')
    present = renamed().event(content)
    name = present["event"]
    if name not in _types_by_name():
        raise PhotonError(f"unknown event {name!r} (known: {', '.join(_types_by_name())}): {shown}")
    if "time" not in content:
        raise PhotonError(f"event {name!r} lacks 'time': {shown}")
    try:
        return _adapter(name).validate_json(line if present == content else json.dumps(present), strict=True)
    except ValidationError as error:
        raise PhotonError(f"event {name!r} {_first_fault(error)}: {shown}") from None


def plain_json(value: Any) -> Any:
    """Return ``value`` as content that JSON knows: NaN and infinity become ``None``, numpy's scalars numbers.

    Raises
    ------
    TypeError
        There is something else than numbers, text, lists and dictionaries in it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # A file name that is not UTF-8 reaches Python with lone surrogates, which no reader accepts.
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {plain_json(str(key)): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no place in an event")


@functools.cache
def _types_by_name() -> dict[str, type[Event]]:
    return {event_name(kind): kind for kind in EVENT_TYPES}


@functools.cache
def _adapter(name: str) -> TypeAdapter[Event]:
    return TypeAdapter(_types_by_name()[name])


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"lacks '{where}'" if fault["type"] == "missing" else f"has a bad '{where}' ({fault['msg']})"


def _warning(listener: Listener, what: str, error: Exception) -> Notice:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return Notice(level="warning", message=f"telemetry: {_listener_name(listener)} {what}: {reason}")


def _listener_name(listener: Listener) -> str:
    return getattr(listener, "__qualname__", type(listener).__qualname__)
