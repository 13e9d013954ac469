"""How large what came is, computed from its tensors, and whether that is plausible beside its peers.

The size of a reply's update Δ over d parameters after s local steps is ‖Δ‖ / √(d s): how far one parameter
has moved in one step, if steps are independent. Of other state groups, and of key layers, it is the root mean
square of their values. So silos with more steps, or fewer parameters, are measured alike.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from photon.config.schema import RunConfig
from photon.link.bounded import MAX_FIGURE
from photon.link.encoding import SparseTensor
from photon.state.checkpoint import Checkpoint
from photon.strategy.contract import PARAMS, Contract

#: Elements that are subtracted at a time: few beside a model, and many beside what a call costs.
_SLICE = 2**20
#: What the sizes of key layers are called, which are no mean of what children send.
OWN = "own"
#: Fewest replies of a round whose median says what is usual.
FEWEST = 3
#: A move of all parameters by this share of their root mean square is never too large.
HARMLESS = 0.01

#: State group to the size of what came of it.
Sizes = Mapping[str, float]
Tensors = Mapping[str, torch.Tensor | SparseTensor]


@dataclass(frozen=True)
class Measured:
    """What was measured of a reply.

    Attributes
    ----------
    sizes
        By state group.
    norm
        ‖Δ‖ over the parameters of which the server takes the mean; None: they are masked.
    whole
        ‖Δ‖ over all parameters that came, key layers of the node's own among them.
    """

    sizes: dict[str, float]
    norm: float | None
    whole: float | None


def measure(
    groups: Mapping[str, Tensors],
    contract: Contract,
    sent: Mapping[str, torch.Tensor],
    *,
    update: bool,
    masked: bool,
    steps: int,
) -> Measured:
    """Measure a reply whose names and shapes are those of the contract.

    Parameters
    ----------
    sent
        The parameters from which it has trained.
    update
        Whether ``params`` holds updates; else it holds trained parameters.
    masked
        Whether what may be masked is.
    steps
        That it has taken.
    """
    sizes: dict[str, float] = {}
    params = groups.get(PARAMS, {})
    squares: dict[bool, list[float]] = {False: [], True: []}
    counts = {False: 0, True: 0}
    for name, tensor in params.items():
        if masked and name in contract.masked:
            continue
        own = name in contract.own
        norm = _norm(tensor, None if update else sent.get(name))
        # A product may be infinite; a power raises.
        squares[own].append(norm * norm)
        counts[own] += tensor.shape.numel()
    norms = {own: math.sqrt(math.fsum(of)) for own, of in squares.items()}
    if counts[False]:
        sizes[PARAMS] = norms[False] / math.sqrt(counts[False] * max(1, steps))
    if counts[True]:
        sizes[OWN] = norms[True] / math.sqrt(counts[True])
    for group, tensors in groups.items():
        if group != PARAMS and contract.leaving[group].kind != "sum":
            count = sum(tensor.shape.numel() for tensor in tensors.values())
            sizes[group] = math.hypot(*(_norm(tensor) for tensor in tensors.values())) / math.sqrt(
                max(1, count)
            )
    hidden = masked and bool(contract.masked)
    return Measured(
        sizes,
        None if hidden else norms[False],
        None if hidden else math.hypot(*norms.values()),
    )


def _norm(tensor: torch.Tensor | SparseTensor, origin: torch.Tensor | None = None) -> float:
    """Return ‖tensor − origin‖; NaN or infinity if a value is not finite."""
    if isinstance(tensor, SparseTensor):
        if origin is None:
            return float(torch.linalg.vector_norm(tensor.values))
        tensor = tensor.dense()
    if origin is None:
        return float(torch.linalg.vector_norm(tensor))
    if tensor.numel() <= _SLICE:
        return float(torch.linalg.vector_norm(tensor - origin))
    # One buffer for all slices: new memory for each costs more than the arithmetic.
    buffer = torch.empty(_SLICE, dtype=torch.promote_types(tensor.dtype, origin.dtype))
    squares = []
    parts = zip(tensor.reshape(-1).split(_SLICE), origin.reshape(-1).split(_SLICE), strict=True)
    for one, other in parts:
        difference = torch.sub(one, other, out=buffer[: len(one)])
        squares.append(_square(difference))
    return math.sqrt(math.fsum(squares))


def _square(vector: torch.Tensor) -> float:
    """Return ‖vector‖²; NaN or infinity if a value is not finite."""
    if vector.dtype == torch.float32:  # Of what arrives, nearly all: the product is faster than the norm.
        return float(torch.dot(vector, vector))
    norm = float(torch.linalg.vector_norm(vector))
    return norm * norm


class Plausibility:
    """Judges the sizes of a round's replies by their median, and by what was accepted before.

    A reply is rejected if one of its sizes is beyond ``factor`` times both of

    * the median of the round, if it has three replies or more,
    * the median of what the participants' last accepted replies had.

    Where there is neither, nobody knows what is usual, and nothing is rejected. States of a local optimizer
    may be squares of gradients: for all groups but the parameters it is the square of ``factor``.

    Parameters
    ----------
    factor
        None: all are accepted.
    history
        Participant to the sizes of its last accepted reply.
    harmless
        Returns a size of the parameters' update up to which it is accepted whatever is usual.
    """

    def __init__(
        self, factor: float | None, history: Mapping[str, Sizes], harmless: Callable[[], float]
    ) -> None:
        self._factor = factor
        self._harmless = harmless
        known: dict[str, list[float]] = {}
        for sizes in history.values():
            for group, size in sizes.items():
                known.setdefault(group, []).append(size)
        self._before = {group: statistics.median(of) for group, of in known.items()}

    def at_once(self, sizes: Sizes) -> bool:
        """Tell whether a reply is accepted whatever the others of its round are."""
        if self._factor is None:
            return True
        return all(
            group in self._before and size <= self._most(group, self._before[group])
            for group, size in sizes.items()
        )

    def problems(self, replies: Mapping[str, Sizes]) -> dict[str, str]:
        """Return who is to be rejected of a round's replies, all of which are in, and why."""
        if self._factor is None:
            return {}
        usual = self.usual(replies)
        return {
            name: problem
            for name, sizes in replies.items()
            if (problem := self._problem(sizes, usual)) is not None
        }

    def usual(self, replies: Mapping[str, Sizes]) -> dict[str, float]:
        """Return what the sizes of a round's replies are compared with, by state group."""
        of_round: dict[str, list[float]] = {}
        for sizes in replies.values():
            for group, size in sizes.items():
                of_round.setdefault(group, []).append(size)
        usual: dict[str, float] = {}
        for group, of in of_round.items():
            medians = [self._before[group]] if group in self._before else []
            if len(of) >= FEWEST:
                medians.append(statistics.median_low(of))
            # A median of zero, as of control variates at first, says nothing.
            if medians and max(medians) > 0:
                usual[group] = max(medians)
        return usual

    def _problem(self, sizes: Sizes, usual: Mapping[str, float]) -> str | None:
        for group, size in sizes.items():
            if group not in usual or size <= self._most(group, usual[group]):
                continue
            if group == PARAMS and size <= self._harmless():
                continue
            what = "its update" if group == PARAMS else f"its {group}"
            return (
                f"{what} is {size / usual[group]:.3g} times as large as is usual, beyond "
                f"federation.admission.norm_factor={self._factor:g}"
            )
        return None

    def _most(self, group: str, usual: float) -> float:
        assert self._factor is not None, "asked by those that have one"
        return usual * (self._factor if group == PARAMS else self._factor**2)


def clip_problem(
    norm: float, count: int, clip_norm: float, noise_multiplier: float, *, lossy: bool
) -> str | None:
    """Return why the norm of a clipped and noised update is not possible, or None.

    Parameters
    ----------
    norm, count
        ‖Δ‖, and over how many parameters.
    clip_norm, noise_multiplier
        C, and the standard deviation of the noise in units of it: z.
    lossy
        Whether codecs may have changed it.

    Notes
    -----
    ‖Δ‖ ≤ C + z C (√d + 8): the norm of d normal variables exceeds √d + 8 about once in 10¹⁴. Codecs that
    round or drop values may make it longer; up to four times is then let through.
    """
    most = clip_norm * (1 + noise_multiplier * (math.sqrt(count) + 8)) * (4 if lossy else 1.001)
    if norm <= most:
        return None
    return f"its update has norm {norm:.4g}, and privacy.clip_norm={clip_norm:g} allows {most:.4g}"


def believed_norm(told: float | None, computed: float, *, lossy: bool) -> float:
    """Return the norm of an update for figures: the reported one if what came is like it, else the computed.

    Codecs change an update after its norm is taken, and those that drop values by much.
    """
    room = 100.0 if lossy else 1.001
    return told if told is not None and computed / room <= told <= computed * room else computed


def too_large(measured: Measured) -> str | None:
    """Return what is beyond all bounds, or not finite, whatever is usual."""
    for group, size in measured.sizes.items():
        # Written so that NaN is refused, too.
        if not size <= MAX_FIGURE:
            return f"{group} holds values that are not finite, or enormous ({size:.3g} in the mean)"
    return None


def judge_of(config: RunConfig, checkpoint: Checkpoint) -> Plausibility:
    """Return what judges the round that starts from a checkpoint."""

    def harmless() -> float:
        params = checkpoint.load_params()
        count = sum(tensor.numel() for tensor in params.values())
        return HARMLESS * math.hypot(*(_norm(tensor) for tensor in params.values())) / math.sqrt(count)

    history = {name: entry.sizes for name, entry in checkpoint.state.ledger.items() if entry.sizes}
    return Plausibility(config.federation.admission.norm_factor, history, harmless)
