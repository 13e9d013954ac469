"""Folds that a minority of liars among the silos cannot move far.

Of n replies x_1 … x_n, of which f lie, with each state group taken as one vector and folded by itself:

* ``median``: the coordinate-wise median (Yin et al. 2018, 1803.01498, Definition 1); of an even n the mean of
  the two in the middle.
* ``trimmed-mean``: the coordinate-wise mean without the f largest and the f smallest values (the same,
  Definition 2, with β = f / n).
* ``krum``: the reply with the smallest score, s_i = Σ_{i→j} ‖x_i − x_j‖² over the n − f − 2 replies x_j that
  are closest to x_i (Blanchard et al. 2017, 1703.02757, section 4).
* ``multi-krum``: the mean of the m = n − f replies with the smallest scores (the same, section 4).
* ``norm-bounded-mean``: c + (1 / n) Σ_k min(1, τ / ‖x_k − c‖) (x_k − c), where c is what the silos were sent
  (norm thresholding of Sun et al. 2019, 1911.07963; with this c one iteration of the centered clipping of
  Karimireddy et al. 2021, 2012.10333).

What they promise, whatever the liars send:

* With f < n / 2 each coordinate of median and trimmed mean lies between honest ones.
* With n ≥ 2f + 3 what Krum chooses is no farther from an honest reply than √s, s the smallest score that an
  honest reply would have among the honest alone: of its n − f − 2 neighbours one is honest at least.
* The norm-bounded mean is within τ of c, and f liars move it by at most 2 f τ / n. With f < n / 2 the median
  of the norms, as τ, is between honest ones.

All replies are looked at together. They lie on disk, and are read in blocks of the same coordinates of all.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator

from photon.config.schema import RunConfig
from photon.config.section import Section
from photon.link.encoding import SparseTensor
from photon.link.pipelines import uplink_pipelines
from photon.link.sparsify import RandomK, TopK, TopKTiles
from photon.strategy.contract import PARAMS
from photon.strategy.fold import Folded, Groups, WeightedMean

Rule = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "norm-bounded-mean"]
#: One state group of each reply, in cohort order.
Vectors = Sequence[Mapping[str, torch.Tensor | SparseTensor]]
Tensors = dict[str, torch.Tensor]
#: Values of all replies together that are in memory at a time, 4 bytes each.
BLOCK = 2**20


class Fold(Section):
    """How replies are folded."""

    rule: Rule = Field("mean", description="What is made of the replies.")
    liars: int | None = Field(None, ge=0, description="Replies of a round that may lie (f).")
    norm_bound: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Bound on an update's L2 norm (τ); null: the median of the round's.",
    )

    @model_validator(mode="after")
    def _possible(self) -> "Fold":
        counts = self.rule in ("trimmed-mean", "krum", "multi-krum")
        if counts and self.liars is None:
            raise ValueError(f"liars: not set; {self.rule} needs to know how many replies may lie")
        if self.rule == "mean" and self.liars:
            raise ValueError(f"liars={self.liars}: rule=mean bears none; set rule=median or another")
        if self.norm_bound is not None and self.rule != "norm-bounded-mean":
            raise ValueError(f"norm_bound={self.norm_bound:g}: rule={self.rule} bounds no norms; set null")
        return self

    @property
    def is_robust(self) -> bool:
        """Whether it is another fold than the mean."""
        return self.rule != "mean"

    @property
    def least_cohort(self) -> int:
        """Replies that it takes to bear the liars."""
        return 2 * (self.liars or 0) + (3 if self.rule.endswith("krum") else 1)

    def bearable(self, replies: int) -> int:
        """Return how many liars a round with so many replies bears: fewer, where some replies are missing."""
        if self.rule.endswith("krum"):
            return min(self.liars or 0, max(0, (replies - 3) // 2))
        most = (replies - 1) // 2
        return min(self.liars or 0, most) if self.rule == "trimmed-mean" else most


def check_fold(fold: Fold, config: RunConfig, weighting: str, local_state: str) -> None:
    """Check that a fold goes with the rest of a configuration.

    Raises
    ------
    ValueError
        If it does not.
    """
    if not fold.is_robust:
        return
    rule = f"fold.rule={fold.rule}"
    if weighting != "uniform":
        raise ValueError(f"weighting={weighting}: {rule} counts silos alike; set strategy.weighting=uniform")
    if config.privacy.secure_aggregation:
        raise ValueError(
            f"{rule} looks at replies one by one, which privacy.secure_aggregation hides; set "
            "strategy.fold.rule=mean, or privacy.secure_aggregation=false"
        )
    if config.link.mean_over == "senders":
        raise ValueError(
            f"{rule} takes what a reply leaves out for zero; set link.mean_over=silos, or "
            "strategy.fold.rule=mean"
        )
    by_coordinate = fold.rule in ("median", "trimmed-mean")
    if by_coordinate:
        _check_dense(rule, config)
    elif local_state == "sync":
        raise ValueError(
            f"{rule} keeps no second moment of a liar's from being negative; with local_state=sync set "
            "strategy.fold.rule=median or trimmed-mean"
        )
    cohort = min((size for size in (config.cohort, config.federation.silos) if size), default=None)
    if cohort is not None and cohort < fold.least_cohort:
        raise ValueError(
            f"fold.liars={fold.liars or 0}: {rule} needs a cohort of {fold.least_cohort}, and it has "
            f"{cohort}; lower fold.liars, or raise cohort"
        )


def _check_dense(rule: str, config: RunConfig) -> None:
    pipelines = uplink_pipelines(config.link)
    for codecs in (pipelines.params, *(codecs for _, codecs in pipelines.named)):
        for codec in codecs:
            if isinstance(codec, TopK | TopKTiles | RandomK):
                raise ValueError(
                    f"{rule}: under the codec {codec.name} most silos leave a coordinate out, so its fold is "
                    "zero and nothing is learnt; set fold.rule=multi-krum or norm-bounded-mean, or another "
                    "link"
                )


def fold_robustly(replies: Mapping[str, Groups], fold: Fold, sent: Groups, block: int = BLOCK) -> Folded:
    """Fold replies by a robust rule.

    Parameters
    ----------
    replies
        The state groups of each participant, in cohort order; names and shapes are the same in all. What is
        absent from a sparse tensor is zero. Only read.
    fold
        The rule.
    sent
        What the norm-bounded mean measures from; a group that it lacks is a change already.
    block
        Values of all replies together that are in memory at a time. It changes nothing of the result.

    Returns
    -------
    Folded
        ``weights`` are those of Krum's choice; other rules take no weighted mean. The figures say how many
        liars the round could bear, and which share of each reply's parameters counted: Krum takes all or
        nothing, the norm-bounded mean a fraction, and the others some of the coordinates.
    """
    names = list(replies)
    step = max(1, block // len(names))
    bears = fold.bearable(len(names))
    groups: dict[str, Tensors] = {}
    counted: Sequence[float] = []
    for group in replies[names[0]]:
        vectors = [replies[name][group] for name in names]
        if fold.rule.endswith("krum"):
            chosen = 1 if fold.rule == "krum" else len(names) - bears
            groups[group], shares = _krum(vectors, bears, chosen, step)
        elif fold.rule == "norm-bounded-mean":
            bound = fold.norm_bound if group == PARAMS else None
            groups[group], shares = _norm_bounded_mean(vectors, sent.get(group), bound, step)
        else:
            groups[group], shares = _trimmed_mean(vectors, bears, step)
        if group == PARAMS:
            counted = shares
    figures = {f"counted/{name}": share for name, share in zip(names, counted, strict=True)}
    weights = {}
    if fold.rule.endswith("krum"):
        taken = [name for name, share in zip(names, counted, strict=True) if share]
        weights = dict.fromkeys(taken, 1 / len(taken))
    return Folded(groups, len(names), weights, figures={**figures, "liars_bearable/all": float(bears)})


# --- rules ------------------------------------------------------------------------------------------


def _trimmed_mean(vectors: Vectors, trim: int, step: int) -> tuple[Tensors, list[float]]:
    """Return the trimmed mean, and of each reply the share of coordinates within what it is the mean of.

    Without ``trim`` of n values on either side; the largest possible ``trim`` makes it the median.
    """
    result: Tensors = {}
    within, count = torch.zeros(len(vectors), dtype=torch.int64), 0
    for name, first in vectors[0].items():
        flat = torch.empty(first.shape.numel())
        for where, rows in _blocks([vector[name] for vector in vectors], step):
            middle = _middle(rows.clone(), trim)
            mean = middle[0].clone()
            for number, row in enumerate(middle[1:], 2):
                # Of equal values exactly that value, and the same bits in a block of any size.
                mean += (row - mean) / number
            flat[where] = mean
            within += ((rows >= middle.amin(0)) & (rows <= middle.amax(0))).sum(1)
        count += flat.numel()
        result[name] = flat.view(first.shape)
    return result, [int(one) / max(1, count) for one in within]


def _middle(rows: torch.Tensor, trim: int) -> torch.Tensor:
    """Return the rows without the ``trim`` smallest and largest values of each column; ``rows`` is used up.

    Each pass moves the smallest of what is left to the front, and the largest to the end. For the few rows of
    a cohort that is faster than sorting columns.
    """
    smaller = torch.empty_like(rows[0])

    def exchange(above: int) -> None:
        torch.minimum(rows[above], rows[above + 1], out=smaller)
        torch.maximum(rows[above], rows[above + 1], out=rows[above + 1])
        rows[above].copy_(smaller)

    for done in range(trim):
        last = len(rows) - 2 - done
        for above in range(done, last + 1):
            exchange(above)
        for above in range(last - 1, done - 1, -1):
            exchange(above)
    return rows[trim : len(rows) - trim]


def _krum(vectors: Vectors, liars: int, chosen: int, step: int) -> tuple[Tensors, list[float]]:
    """Return the mean of the replies with the smallest scores, and which they are: 1 or 0.

    Of equal scores the first in cohort order is taken. With fewer than four replies there is one neighbour.
    """
    count = len(vectors)
    above = torch.triu_indices(count, count, 1)
    squares = torch.zeros(count, count, dtype=torch.float64)
    for name in vectors[0]:
        for _, rows in _blocks([vector[name] for vector in vectors], step):
            squares[above[0], above[1]] += torch.nn.functional.pdist(rows.double()).square()
    distances = (squares + squares.T).fill_diagonal_(math.inf)
    scores = distances.sort(dim=1).values[:, : max(1, count - liars - 2)].sum(1).tolist()
    best = sorted(range(count), key=lambda reply: (scores[reply], reply))[:chosen]
    mean = WeightedMean()
    for reply in sorted(best):
        mean.add({PARAMS: vectors[reply]}, 1.0)
    return mean.result()[PARAMS], [float(reply in best) for reply in range(count)]


def _norm_bounded_mean(
    vectors: Vectors, centre: Mapping[str, torch.Tensor | SparseTensor] | None, bound: float | None, step: int
) -> tuple[Tensors, list[float]]:
    """Return the mean of replies within ``bound`` of the centre, and what each was multiplied by."""
    count = len(vectors)

    def moved(name: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | float]]:
        tensors = [vector[name] for vector in vectors]
        if centre is None:
            yield from ((where, rows, 0.0) for where, rows in _blocks(tensors, step))
            return
        for where, rows in _blocks([*tensors, centre[name]], step):
            yield where, rows[:-1] - rows[-1], rows[-1]

    squares = torch.zeros(count, dtype=torch.float64)
    for name in vectors[0]:
        for _, moves, _ in moved(name):
            squares += moves.double().square().sum(1)
    # As float32, so that the order of the sum, and with it the size of the blocks, leaves no trace.
    norms = squares.sqrt().float().tolist()
    most = statistics.median(norms) if bound is None else bound
    factors = [min(1.0, most / norm) if norm else 1.0 for norm in norms]
    result: Tensors = {}
    for name, first in vectors[0].items():
        flat = torch.empty(first.shape.numel())
        for where, moves, begin in moved(name):
            mean = torch.zeros_like(moves[0])
            for move, factor in zip(moves, factors, strict=True):
                mean += move * (factor / count)
            flat[where] = mean + begin
        result[name] = flat.view(first.shape)
    return result, factors


# --- blocks -----------------------------------------------------------------------------------------


def _blocks(
    tensors: Sequence[torch.Tensor | SparseTensor], step: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield tensors of one shape by ``step`` coordinates, as float32 of shape (tensors, coordinates)."""
    readers = [_reader(tensor) for tensor in tensors]
    numel = tensors[0].shape.numel()
    for begin in range(0, numel, step):
        where = slice(begin, min(begin + step, numel))
        yield where, torch.stack([read(where) for read in readers])


def _reader(tensor: torch.Tensor | SparseTensor) -> Callable[[slice], torch.Tensor]:
    """Return what reads some coordinates of a tensor, as float32."""
    if isinstance(tensor, SparseTensor):
        order = tensor.indices.argsort()
        return partial(_read_sparse, tensor.indices[order], tensor.values[order])
    flat = tensor.reshape(-1)
    return lambda where: flat[where].to(torch.float32)


def _read_sparse(indices: torch.Tensor, values: torch.Tensor, where: slice) -> torch.Tensor:
    begin, end = torch.searchsorted(
        indices, torch.tensor([where.start, where.stop], dtype=indices.dtype)
    ).tolist()
    row = torch.zeros(where.stop - where.start)
    row[indices[begin:end] - where.start] = values[begin:end].to(torch.float32)
    return row
