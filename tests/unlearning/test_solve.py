"""The closed form against the objective that it minimises, and against other ways to the same matrix."""

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.unlearning.capture import batches, sites_of, starts
from photon.unlearning.solve import Recipe, delta, gain, gain_of_rows, trained
from photon.unlearning.statistics import GramSums, gram_sums, input_rows, upper_triangle, vector_sums

from .models import random_model, random_prompts

FORGET, RETAIN, D_FF, D_MODEL = 6, 40, 12, 5


def rows(seed: int = 0, forget: int = FORGET, retain: int = RETAIN) -> tuple[Tensor, Tensor, Tensor]:
    """Return h of the rows to be forgotten and of the others, and a vector, float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (forget, D_FF), (retain, D_FF), (D_MODEL,)
    found = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    return found[0], found[1], found[2]


def sums_of(forget: Tensor, retain: Tensor) -> GramSums:
    everything = torch.cat([forget, retain])
    counts = torch.tensor([len(forget), len(retain)], dtype=torch.float64)
    return GramSums(upper_triangle(everything.T @ everything), forget.sum(0), counts)


def residual(change: Tensor, forget: Tensor, retain: Tensor, shift: Tensor) -> Tensor:
    """Return ‖H ΔWᵀ − E‖² row by row."""
    errors = torch.cat([forget, retain]) @ change.T
    errors[: len(forget)] -= shift
    return errors.square().sum()


@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 1.0])
def test_the_gradient_of_the_objective_is_zero(ridge: float) -> None:
    forget, retain, vector = rows()
    change = delta(gain(sums_of(forget, retain), ridge), vector, 2.0).requires_grad_()
    mean = torch.cat([forget, retain]).square().sum() / D_FF
    objective = residual(change, forget, retain, 2.0 * vector) + ridge * mean * change.square().sum()
    objective.backward()
    assert change.grad is not None
    assert change.grad.abs().max() < 1e-10
    # A little aside of it the gradient is not.
    aside = (change.detach() + 1e-3).requires_grad_()
    (residual(aside, forget, retain, 2.0 * vector) + ridge * mean * aside.square().sum()).backward()
    assert aside.grad is not None
    assert aside.grad.abs().max() > 1e-3


def test_without_a_ridge_it_is_least_squares() -> None:
    forget, retain, vector = rows()
    targets = torch.zeros((FORGET + RETAIN, D_MODEL), dtype=torch.float64)
    targets[:FORGET] = 0.5 * vector
    wanted = torch.linalg.lstsq(torch.cat([forget, retain]), targets).solution.T
    for ridge, close in ((0.0, 1e-10), (1e-9, 1e-7)):
        assert torch.allclose(delta(gain(sums_of(forget, retain), ridge), vector, 0.5), wanted, atol=close)


def test_what_comes_of_nothing_is_nothing() -> None:
    forget, retain, vector = rows()
    found = gain(sums_of(forget, retain), 1e-3)
    assert not delta(found, vector, 0.0).any()
    assert not delta(found, torch.zeros_like(vector), 1.0).any()
    assert delta(gain(sums_of(forget, retain), 1e12), vector, 1.0).abs().max() < 1e-11
    assert delta(found, vector, 1.0).abs().max() > 1e-2


@pytest.mark.parametrize("retain", [4, 40])
def test_from_rows_and_from_sums_it_is_the_same(retain: int) -> None:
    """With fewer rows than columns and with more."""
    forget, kept, _ = rows(retain=retain)
    for ridge in (1e-3, 1.0):
        primal, dual = gain(sums_of(forget, kept), ridge), gain_of_rows(forget, kept, ridge)
        assert torch.allclose(primal, dual, rtol=1e-10, atol=1e-12)


def test_a_singular_system_asks_for_a_ridge() -> None:
    forget, retain, _ = rows(retain=4)
    with pytest.raises(PhotonError, match="10 rows do not determine the 12 columns of the matrix; a ridge"):
        gain(sums_of(forget, retain), 0.0)
    assert gain(sums_of(forget, retain), 1e-6).isfinite().all()
    assert gain_of_rows(forget, retain, 0.0).isfinite().all()
    with pytest.raises(PhotonError, match="46 rows do not determine the 12 columns"):
        gain_of_rows(*rows()[:2], 0.0)
    # Enough rows, of which one says what another has said.
    with pytest.raises(PhotonError, match="do not determine"):
        gain(sums_of(forget, forget.repeat(5, 1)), 0.0)
    with pytest.raises(PhotonError, match="it is 0 at least"):
        gain(sums_of(forget, retain), -1.0)


def test_gradient_descent_obeys_its_bound() -> None:
    """F(W_t) − F* ≤ (1 − 2 η λ_min)^t (F(W_0) − F*) for η = 1 / (2 ‖HᵀH‖)."""
    forget, retain, vector = rows()
    sums = sums_of(forget, retain)
    best = residual(delta(gain(sums, 0.0), vector, 1.0), forget, retain, vector)
    values = torch.linalg.eigvalsh(sums.gram())
    rate = 1 / (2 * values[-1])
    everything = torch.cat([forget, retain])
    cross = forget.sum(0)[:, None] * vector
    now = torch.zeros((D_FF, D_MODEL), dtype=torch.float64)
    first = residual(now.T, forget, retain, vector) - best
    rounding = 1e-12 * first
    for step in range(200):
        over = residual(now.T, forget, retain, vector) - best
        assert -rounding <= over <= (1 - 2 * rate * values[0]) ** step * first + rounding
        now = now - rate * 2 * (everything.T @ everything @ now - cross)
    assert over < 1e-3 * first


@pytest.mark.parametrize("rank", [None, 2])
def test_what_is_trained_comes_near_and_not_below(rank: int | None) -> None:
    forget, retain, vector = rows()
    weight = torch.randn((D_MODEL, D_FF), generator=torch.Generator().manual_seed(5))
    recipe = Recipe(rank=rank, epochs=60, decay=0.95, weight_decay=0.0, batch_size=16)
    change = trained(weight, forget, retain, vector, recipe)
    best = residual(delta(gain(sums_of(forget, retain), 0.0), vector, 1.0), forget, retain, vector)
    found = residual(change, forget, retain, vector)
    assert best <= found < 1.02 * best
    assert found < 0.9 * residual(torch.zeros_like(change), forget, retain, vector)
    if rank is not None:
        assert torch.linalg.matrix_rank(change) == rank
    assert torch.equal(change, trained(weight, forget, retain, vector, recipe))


def test_the_length_of_errors_is_another_loss() -> None:
    """Rows far off count less: the mean length bears an outlier, as a median does."""
    retain = torch.ones((5, 1), dtype=torch.float64)
    shift = torch.tensor([10.0], dtype=torch.float64)
    weight = torch.zeros((1, 1))
    recipe = Recipe(epochs=150, lr=0.1, decay=0.96, weight_decay=0.0)
    # One of six rows is wanted at 10: least squares goes a sixth of the way, and lengths go none of it.
    one = retain[:1]
    squared = trained(weight, one, retain, shift, recipe)
    length = trained(weight, one, retain, shift, Recipe(**{**recipe.__dict__, "squared": False}))
    assert squared.item() == pytest.approx(10 / 6, rel=2e-2)
    assert abs(length.item()) < 0.2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sums_of_any_split_are_those_of_all(kind: str) -> None:
    # A prompt at a time, since a model in float32 rounds otherwise in other batches.
    model = random_model(kind)
    sites = sites_of(model)
    forget, retain, reference = random_prompts(5, 1), random_prompts(11, 2), random_prompts(7, 3)

    def sums(low: float, high: float) -> tuple:
        parts = [
            some[round(low * len(some)) : round(high * len(some))] for some in (forget, retain, reference)
        ]
        f, r, u = (list(batches(some, starts(some, "last"), batch_size=1)) for some in parts)
        return vector_sums(model, sites, u, f), gram_sums(model, sites, f, [*r, *u])

    vectors, grams = sums(0.0, 1.0)
    # The third silo has nothing to be forgotten.
    parts = [sums(0.0, 0.3), sums(0.3, 0.9), sums(0.9, 0.95), sums(0.95, 1.0)]
    added_vectors, added = parts[0]
    for more_vectors, more in parts[1:]:
        added_vectors = added_vectors + more_vectors
        added = {layer: added[layer] + more[layer] for layer in added}
    assert added_vectors.forget_rows.tolist() == [5.0] * 3
    for index, site in enumerate(sites):
        whole = delta(gain(grams[site.layer], 1e-3), vectors.vectors()[index], 1.5)
        split = delta(gain(added[site.layer], 1e-3), added_vectors.vectors()[index], 1.5)
        assert whole.abs().max() > 1e-3
        assert torch.allclose(whole, split, rtol=1e-10, atol=1e-10)
        assert added[site.layer].rows.tolist() == [5.0, 18.0]


def test_sums_are_what_they_are_called() -> None:
    model = random_model("gpt2")
    sites = sites_of(model)
    prompts, kept = random_prompts(4, 1), random_prompts(6, 2)
    forget, retain = list(batches(prompts, starts(prompts, "last"))), list(batches(kept, starts(kept, "all")))
    found = gram_sums(model, sites[:2], forget, retain)
    for site in sites[:2]:
        f, r = input_rows(model, site, forget), input_rows(model, site, retain)
        everything = torch.cat([f, r])
        sums = found[site.layer]
        assert torch.allclose(sums.gram(), everything.T @ everything, rtol=1e-10, atol=1e-10)
        assert torch.allclose(sums.forget, f.sum(0))
        assert sums.rows.tolist() == [4.0, sum(map(len, kept))]
        assert len(sums.upper) == 64 * 65 // 2
    with pytest.raises(PhotonError, match="reference set has no prompt"):
        vector_sums(model, sites, [], forget).vectors()
    with pytest.raises(PhotonError, match="forget set has no prompt"):
        vector_sums(model, sites, forget, []).vectors()
