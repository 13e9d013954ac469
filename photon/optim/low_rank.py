"""LoRDO: AdamW whose states live in a small subspace of every matrix, for training with rare syncs.

The subspace is found anew at every sync, from what all silos learnt together. Steps inside it alone would
keep it for ever: the pseudo-gradient then lies in it too. The full-rank gradient term lets it turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from photon.optim.blocks import in_blocks
from photon.optim.matrices import EMBEDDINGS, hidden_matrices
from photon.optim.quasi_hyperbolic import adamw_update, by_steps_done, check_settings, state_names

_EXTRA_DIRECTIONS = 8
_POWER_ITERATIONS = 2


class LoRDO(torch.optim.Optimizer):
    """Low-rank AdamW with a full-rank quasi-hyperbolic term.

    For a hidden matrix W (p×q, p ≤ q; else everything transposed) with an orthonormal basis Q (p×r):

        a = g + E,  ĝ = Qᵀ a,  E ← a − Q ĝ              (E = 0 without error feedback)
        u ← β1 u + (1 − β1) ĝ,  v ← β2 v + (1 − β2) ĝ²
        D = √v̂ + ε
        W ← (1 − η λ) W − η [(1 − ω) g / mean(D) + ω Q (û / D)]

    `refresh` sets Q to the leading singular vectors of the pseudo-gradient and turns u and v into it. Before
    the first one Q is the first r columns of the identity.

    States are ``exp_avg`` and ``exp_avg_sq`` (r×q), ``basis`` (p×r), ``step`` and, if asked for,
    ``error_feedback`` (p×q). All other parameters are stepped as `QHAdamW` does, with full-size states.

    Parameters
    ----------
    params
        Named parameters, or groups of them; without names every matrix is projected, embeddings included.
    lr
        Learning rate η.
    rank
        r; at most min(p, q) of it is used.
    betas
        β1 and β2.
    weight
        ω, the weight of the low-rank first moment; 1 leaves out the full-rank term.
    eps
        ε, added to the denominators.
    weight_decay
        λ, decoupled.
    projection
        ``"global"``: bases from the pseudo-gradient. ``"local"``: bases from the first gradient after a
        refresh, and the gradient term inside the subspace: W ← W − η Q [((1 − ω) ĝ + ω û) / D].
    error_feedback
        Keep what the projection leaves out, in a state of full size, and add it to the next gradient.
    full_rank_weight
        Weight of the first moment of the parameters that are not projected; 1 is AdamW.
    excluded
        Parts of the names of matrices that are not projected.

    Raises
    ------
    ValueError
        When a setting is out of its range.
    """

    #: Averaged moments are in the basis that was averaged with them.
    synced_together = ("basis", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        rank: int = 32,
        betas: Sequence[float] = (0.999, 0.999),
        weight: float = 0.97,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        projection: Literal["global", "local"] = "global",
        error_feedback: bool = False,
        full_rank_weight: float = 1.0,
        excluded: Sequence[str] = EMBEDDINGS,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "betas": tuple(betas),
            "weight": weight,
            "eps": eps,
            "weight_decay": weight_decay,
            "projection": projection,
            "error_feedback": error_feedback,
            "full_rank_weight": full_rank_weight,
            "excluded": tuple(excluded),
            "refresh_due": False,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own where it states them.

        Raises
        ------
        ValueError
            When a setting is out of its range, or a matrix is sharded over devices.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for weight in ("weight", "full_rank_weight"):
            check_settings({**group, "weights": (group[weight],)})
        if group["rank"] < 1:
            raise ValueError(f"rank is {group['rank']}; it must be at least 1")
        if group["projection"] not in ("global", "local"):
            raise ValueError(f"projection is {group['projection']!r}; use global or local")
        if any(isinstance(parameter, DTensor) for parameter in group["params"]):
            raise ValueError("LoRDO needs whole matrices; use training.parallel=ddp")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there; return what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices, others = _split(group)
            self._step_full_rank([one for one in others if one.grad is not None], group)
            self._step_low_rank([one for one in matrices if one.grad is not None], group)
        return loss

    @torch.no_grad()
    def refresh(self, pseudo_gradient: Mapping[Tensor, Tensor]) -> None:
        """Choose new subspaces at a sync, and turn the moments into them.

        Call it after averaging: turning the second moment is not linear.

        Parameters
        ----------
        pseudo_gradient
            Parameter → Δ, its value at the last sync minus its value now: equal on all silos, which then
            have equal bases. With ``projection="local"`` it is not looked at; the next gradients are.
        """
        for group in self.param_groups:
            if group["projection"] == "local":
                group["refresh_due"] = True
                continue
            rank = group["rank"]
            self.rebase(
                {
                    parameter: leading_singular_vectors(pseudo_gradient[parameter].to(parameter.device), rank)
                    for parameter in _split(group)[0]
                    if parameter in pseudo_gradient
                }
            )

    @torch.no_grad()
    def rebase(self, bases: Mapping[Tensor, Tensor]) -> None:
        """Put new bases in place, and turn the moments into them.

        Parameters
        ----------
        bases
            Parameter → orthonormal basis of its smaller side, min(p, q) × r.
        """
        for group in self.param_groups:
            for parameter in _split(group)[0]:
                if parameter not in bases:
                    continue
                state = self._low_rank_state(parameter, group)
                new = bases[parameter]
                _rotate(state, new, group["betas"], left=_is_left(parameter))
                state["basis"].copy_(new)

    def _step_full_rank(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        weight = group["full_rank_weight"]
        momenta = [(group["betas"][0], weight)] if weight > 0 else []
        names = state_names(len(momenta))
        for done, members in by_steps_done(self.state, parameters, names):
            rows = (
                [parameter, parameter.grad, *(self.state[parameter][name] for name in names)]
                for parameter in members
            )
            for block in in_blocks(rows):
                adamw_update(
                    block,
                    momenta,
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    step=done + 1,
                )

    def _step_low_rank(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        if group["projection"] == "local":
            due = group["refresh_due"]
            chosen = [one for one in parameters if due or "basis" not in self.state[one]]
            self.rebase({one: leading_singular_vectors(_gradient(one), group["rank"]) for one in chosen})
            group["refresh_due"] = False
        for parameter in parameters:
            self._low_rank_state(parameter, group)
        for done, members in by_steps_done(self.state, parameters, ()):
            for batch in _batches(members):
                self._update(batch, group, done + 1)

    def _update(self, parameters: Sequence[Tensor], group: dict[str, Any], step: int) -> None:
        states = [self.state[parameter] for parameter in parameters]
        low = [self._project(parameter, state) for parameter, state in zip(parameters, states, strict=True)]
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(exp_avgs, low, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, low, low, 1 - beta2)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominators, group["eps"])

        lr, weight = group["lr"], group["weight"]
        directions = torch._foreach_mul(exp_avgs, weight / (1 - beta1**step))
        full_rank = weight < 1 and group["projection"] == "global"
        if weight < 1 and not full_rank:
            torch._foreach_add_(directions, low, alpha=1 - weight)
        torch._foreach_div_(directions, denominators)
        for parameter, state, direction, denominator in zip(
            parameters, states, directions, denominators, strict=True
        ):
            left, right = _factors(state["basis"], direction, left=_is_left(parameter))
            parameter.addmm_(left, right, beta=1 - lr * group["weight_decay"], alpha=-lr)
            if full_rank:
                parameter.addcdiv_(_gradient(parameter), denominator.mean(), value=-lr * (1 - weight))

    def _project(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the gradient, with the error if there is one, in the subspace; keep what is left out."""
        signal, basis = _gradient(parameter), state["basis"]
        error = state.get("error_feedback")
        if error is not None:
            signal = error.add_(signal)
        left = _is_left(parameter)
        low = basis.T @ signal if left else signal @ basis
        if error is not None:
            error.addmm_(*_factors(basis, low, left=left), alpha=-1)
        return low

    def _low_rank_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        if "basis" not in state:
            rows, columns = parameter.shape
            rank = min(group["rank"], rows, columns)
            shape = (rank, columns) if _is_left(parameter) else (rows, rank)
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = parameter.new_zeros(shape)
            state["exp_avg_sq"] = parameter.new_zeros(shape)
            state["basis"] = torch.eye(
                min(rows, columns), rank, dtype=parameter.dtype, device=parameter.device
            )
            if group["error_feedback"]:
                state["error_feedback"] = torch.zeros_like(parameter)
        return state


def leading_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis of the leading ``rank`` directions of the smaller side of ``matrix``.

    Subspace iteration from a fixed start, and then the eigenvectors within that subspace, so the result is a
    function of the matrix alone. It is exact when the matrix has at most ``rank`` + 8 rows or columns, or a
    rank of at most that.

    Parameters
    ----------
    matrix
        p×q.
    rank
        How many directions; min(p, q) if there are fewer.

    Returns
    -------
    Tensor
        min(p, q) × rank in the type of ``matrix``, computed in float32 at least, by falling singular value.
        The largest entry of each column is positive. A matrix that is zero or not finite gives a fixed basis.
    """
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    wide = (matrix if _is_left(matrix) else matrix.T).to(dtype)
    size = wide.shape[0]
    rank = min(rank, size)
    scale = wide.abs().amax()
    width = min(rank + _EXTRA_DIRECTIONS, size)
    start = torch.randn(size, width, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    space = torch.linalg.qr(start.to(wide.device, dtype)).Q
    # Powers of tiny or huge entries must not leave the number format. No branch: a GPU would wait for it.
    wide = torch.where(torch.isfinite(scale) & (scale > 0), wide / scale, 0.0)
    for _ in range(_POWER_ITERATIONS + 1):
        space = torch.linalg.qr(wide @ (wide.T @ space)).Q
    inside = (space.T @ wide).double()
    vectors = torch.linalg.eigh(inside @ inside.T).eigenvectors.flip(1)[:, :rank]
    basis = torch.linalg.qr(space.double() @ vectors).Q
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * largest.sign()).to(matrix.dtype)


def basis_similarity(one: Tensor, other: Tensor) -> float:
    """Return the mean squared singular value of oneᵀ other: 1 for equal subspaces, 0 for orthogonal ones."""
    return float((one.T @ other).square().sum() / min(one.shape[1], other.shape[1]))


def _rotate(state: dict[str, Any], new: Tensor, betas: Sequence[float], *, left: bool) -> None:
    """Turn the moments from their basis into ``new``: mean and variance by themselves, bias-corrected."""
    step = int(state["step"])
    if step == 0:
        return
    change = new.T @ state["basis"]
    correction1, correction2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    mean = state["exp_avg"] / correction1
    variance = (state["exp_avg_sq"] / correction2 - mean.square()).clamp_min(0)
    squares = change.square()
    mean = change @ mean if left else mean @ change.T
    variance = squares @ variance if left else variance @ squares.T
    state["exp_avg"].copy_(mean * correction1)
    state["exp_avg_sq"].copy_((variance + mean.square()) * correction2)


def _split(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the projected parameters of a group and the others."""
    hidden = hidden_matrices(group, group["excluded"])
    pairs = list(zip(group["params"], hidden, strict=True))
    return [one for one, is_hidden in pairs if is_hidden], [one for one, is_hidden in pairs if not is_hidden]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _is_left(matrix: Tensor) -> bool:
    """Whether the basis is multiplied from the left: rows are the smaller side."""
    return matrix.shape[0] <= matrix.shape[1]


def _factors(basis: Tensor, low: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return two matrices whose product is ``low`` in the full space."""
    return (basis, low) if left else (low, basis.T)


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield what is stepped together: on a CPU one matrix, so that it stays in the cache."""
    if parameters and parameters[0].device.type != "cpu":
        yield list(parameters)
        return
    for parameter in parameters:
        yield [parameter]
