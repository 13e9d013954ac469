"""What is added to a projection, so that it steers some rows and leaves others as they are.

Rows H, targets H W₀ᵀ + E with E = c·r on the rows to be forgotten and 0 on the others. The ridge towards W₀,

    ΔWᵀ = (HᵀH + λ mean(diag HᵀH) I)⁻¹ HᵀE,

has rank one: HᵀE = s (c·r)ᵀ with s = Σ h over the rows to be forgotten, so ΔW = c·r gᵀ, where g is the
*gain*: what is added for a row h is (g·h) c·r. Another coefficient c needs no other solution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from photon.errors import PhotonError
from photon.unlearning.statistics import GramSums


def gain(sums: GramSums, ridge: float) -> Tensor:
    """Return g of the closed form, float64 of shape (d_ff,).

    Parameters
    ----------
    sums
        Of all rows.
    ridge
        λ, at least 0.

    Raises
    ------
    PhotonError
        If the system is singular, as it is without a ridge where there are fewer rows than columns.
    """
    gram = sums.gram()
    rows = int(sums.rows.sum())
    return _solved(gram, sums.forget, ridge * float(gram.diagonal().mean()), rows, len(gram))


def gain_of_rows(forget: Tensor, retain: Tensor, ridge: float) -> Tensor:
    """Return the same g from the rows themselves, by a system of as many unknowns as there are rows.

        g = Hᵀ (HHᵀ + λ mean(diag HᵀH) I)⁻¹ y,   y = 1 on the rows to be forgotten and 0 on the others

    Parameters
    ----------
    forget, retain
        h of each row, float64 of shape (rows, d_ff).
    ridge
        λ, above 0 unless the rows are independent.

    Raises
    ------
    PhotonError
        If the system is singular.
    """
    rows = torch.cat([forget, retain])
    steered = rows.new_zeros(len(rows))
    steered[: len(forget)] = 1
    shift = ridge * float((rows**2).sum()) / rows.shape[1]
    return rows.T @ _solved(rows @ rows.T, steered, shift, *rows.shape)


def _solved(matrix: Tensor, right: Tensor, shift: float, rows: int, columns: int) -> Tensor:
    """Return x of (matrix + shift · I) x = right."""
    if not shift >= 0:
        raise PhotonError(f"unlearning: ridge of {shift:g}; it is 0 at least")
    shifted = matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    # Of a singular matrix rounding may leave a factor, with a pivot that is nothing but rounding.
    least = len(matrix) * torch.finfo(matrix.dtype).eps * float(shifted.diagonal().max())
    if int(failed) or not float(factor.diagonal().min() ** 2) > least:
        raise PhotonError(
            f"unlearning: {rows:,} rows do not determine the {columns:,} columns of the matrix; a ridge "
            "above 0, such as 1e-3, does"
        )
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def delta(gain: Tensor, vector: Tensor, coefficient: float) -> Tensor:
    """Return ΔW = c · r gᵀ, float64 of shape (d_model, d_ff).

    Parameters
    ----------
    gain
        g, of shape (d_ff,).
    vector
        r, of shape (d_model,).
    coefficient
        c.
    """
    return coefficient * torch.outer(vector.double(), gain)


@dataclass(frozen=True)
class Recipe:
    """How `trained` goes about it; the defaults are those of the released code.

    Attributes
    ----------
    lr, weight_decay, decay
        Of AdamW; the rate is multiplied by ``decay`` after each epoch.
    epochs, batch_size
        Passes through the rows, and rows of a step.
    squared
        The loss is the mean squared error; otherwise the mean length of a row's error, as in Eq. 6.
    rank
        Train a product of two matrices of this rank (LoRA), which begin as N(0, 0.01²); None: the matrix.
    seed
        Of the order of the rows and of those matrices.
    """

    lr: float = 1e-2
    weight_decay: float = 0.01
    decay: float = 0.9
    epochs: int = 20
    batch_size: int = 64
    squared: bool = True
    rank: int | None = None
    seed: int = 0


def trained(weight: Tensor, forget: Tensor, retain: Tensor, shift: Tensor, recipe: Recipe) -> Tensor:
    """Return ΔW that AdamW finds, float64 of shape (d_model, d_ff).

    Parameters
    ----------
    weight
        W₀, of shape (d_model, d_ff).
    forget, retain
        h of each row, of shape (rows, d_ff).
    shift
        c · r, of shape (d_model,).
    recipe
        How it is trained, in float32.
    """
    start = weight.detach().float()
    rows = torch.cat([forget, retain]).float().to(start.device)
    targets = rows @ start.T
    targets[: len(forget)] += shift.to(start.device, torch.float32)
    draw = torch.Generator().manual_seed(recipe.seed)
    if recipe.rank is None:
        factors = [nn.Parameter(start.clone())]
    else:
        shapes = ((start.shape[0], recipe.rank), (recipe.rank, start.shape[1]))
        drawn = (0.01 * torch.randn(shape, generator=draw) for shape in shapes)
        factors = [nn.Parameter(one.to(start.device)) for one in drawn]
    optimizer = torch.optim.AdamW(factors, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, recipe.decay)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(rows), generator=draw).to(start.device)
        for some in order.split(recipe.batch_size):
            now = factors[0] if recipe.rank is None else start + factors[0] @ factors[1]
            error = rows[some] @ now.T - targets[some]
            loss = error.square().mean() if recipe.squared else error.norm(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = (
            factors[0].double() - start.double()
            if recipe.rank is None
            else factors[0].double() @ factors[1].double()
        )
    return found.cpu()
