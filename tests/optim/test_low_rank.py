import pytest
import torch

from photon.optim import LoRDO
from photon.optim.low_rank import basis_similarity, leading_singular_vectors
from tests.optim.helpers import largest_difference, parameters, set_gradients, trajectory

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def matrix_of_spectrum(rows: int, columns: int, singular: list[float]) -> torch.Tensor:
    left = torch.linalg.qr(randn(rows, len(singular), seed=1)).Q
    right = torch.linalg.qr(randn(columns, len(singular), seed=2)).Q
    return left @ torch.diag(torch.tensor(singular, dtype=DOUBLE)) @ right.T


def one_matrix(shape: tuple[int, int], **settings) -> tuple[torch.nn.Parameter, LoRDO]:
    parameter = torch.nn.Parameter(randn(*shape, seed=3))
    return parameter, LoRDO([("hidden", parameter)], **settings)


def after_steps(shape: tuple[int, int], steps: int, **settings) -> tuple[torch.nn.Parameter, LoRDO]:
    parameter, optimizer = one_matrix(shape, **settings)
    for step in range(steps):
        parameter.grad = randn(*shape, seed=10 + step)
        optimizer.step()
    return parameter, optimizer


# --- bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (12, 200)])
def test_leading_singular_vectors_against_a_full_decomposition(shape):
    matrix = matrix_of_spectrum(*shape, [2.0**-k for k in range(12)])
    basis = leading_singular_vectors(matrix, 4)
    left, _, right = torch.linalg.svd(matrix)
    exact = left[:, :4] if shape[0] <= shape[1] else right[:4].T
    assert basis.shape == (min(shape), 4)
    assert torch.allclose((basis.T @ exact).abs(), torch.eye(4, dtype=DOUBLE), atol=1e-5)
    assert largest_difference([basis.T @ basis], [torch.eye(4, dtype=DOUBLE)]) < 1e-12


def test_leading_singular_vectors_hold_nearly_all_the_energy_that_any_basis_can():
    # The worst case: a spectrum without gaps.
    matrix = randn(100, 300)
    basis = leading_singular_vectors(matrix, 10)
    best = torch.linalg.svdvals(matrix)[:10].square().sum()
    assert (basis.T @ matrix).square().sum() > 0.95 * best


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_and_sign_convention(scale):
    matrix = matrix_of_spectrum(20, 30, [4.0, 2.0, 1.0])
    basis = leading_singular_vectors(matrix, 3)
    scaled = leading_singular_vectors((-scale * matrix).float(), 3)
    assert torch.allclose(scaled.double(), basis, atol=1e-5)
    assert all(column[column.abs().argmax()] > 0 for column in basis.T)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_useless_pseudo_gradient_gives_a_basis_all_the_same(bad):
    parameter, optimizer = after_steps((10, 14), 2, lr=0.1, rank=3)
    optimizer.refresh({parameter: torch.full((10, 14), bad, dtype=DOUBLE)})
    basis = optimizer.state[parameter]["basis"]
    assert largest_difference([basis.T @ basis], [torch.eye(3, dtype=DOUBLE)]) < 1e-12
    optimizer.step()
    assert torch.isfinite(parameter).all()


def test_bases_are_orthonormal_and_equal_on_all_silos_whatever_they_did_before():
    silos = [after_steps((24, 32), steps, lr=0.1, rank=4) for steps in (1, 5, 9)]
    for round_number in range(3):
        delta = randn(24, 32, seed=100 + round_number)
        for parameter, optimizer in silos:
            optimizer.refresh({parameter: delta.clone()})
        bases = [optimizer.state[parameter]["basis"] for parameter, optimizer in silos]
        assert all(torch.equal(bases[0], other) for other in bases)
        assert largest_difference([bases[0].T @ bases[0]], [torch.eye(4, dtype=DOUBLE)]) < 1e-12


def test_similarity():
    basis = torch.linalg.qr(randn(20, 6)).Q
    turned = basis[:, :3] @ torch.linalg.qr(randn(3, 3)).Q
    assert basis_similarity(basis[:, :3], turned) == pytest.approx(1.0)
    assert basis_similarity(basis[:, :3], basis[:, 3:]) == pytest.approx(0.0)


# --- equivalences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_full_rank_with_the_identity_as_basis_is_adamw(weight_decay):
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    ours = trajectory(lambda p: LoRDO(p, rank=1000, weight=1.0, **settings), 12, dtype=DOUBLE)
    torchs = trajectory(lambda p: torch.optim.AdamW(p, **settings), 12, dtype=DOUBLE)
    assert largest_difference(ours, torchs) < 1e-12


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_fixed_orthogonal_basis_is_adam_on_the_turned_matrix(shape):
    parameter, optimizer = one_matrix(shape, lr=0.05, rank=6, betas=(0.9, 0.95), weight=1.0)
    turn = torch.linalg.qr(randn(6, 6, seed=7)).Q
    optimizer.rebase({parameter: turn})
    wide = shape[0] < shape[1]
    turned = torch.nn.Parameter(turn.T @ parameter.detach() if wide else parameter.detach() @ turn)
    adam = torch.optim.Adam([turned], lr=0.05, betas=(0.9, 0.95))
    for step in range(8):
        gradient = randn(*shape, seed=step)
        parameter.grad = gradient
        turned.grad = turn.T @ gradient if wide else gradient @ turn
        optimizer.step()
        adam.step()
    back = turn @ turned if wide else turned @ turn.T
    assert largest_difference([parameter.detach()], [back.detach()]) < 1e-12


def by_hand(steps, *, weight, local=False):
    """Return the trajectory of the paper's formulas for one 6×9 matrix of rank 2 that is refreshed once."""
    value, moment, square = randn(6, 9, seed=3), torch.zeros(2, 9), torch.zeros(2, 9)
    moment, square = moment.double(), square.double()
    basis = torch.eye(6, 2, dtype=DOUBLE)
    if local:
        basis = leading_singular_vectors(randn(6, 9, seed=10), 2)
    for step in range(1, steps + 1):
        gradient = randn(6, 9, seed=9 + step)
        low = basis.T @ gradient
        moment = 0.9 * moment + 0.1 * low
        square = 0.95 * square + 0.05 * low**2
        denominator = (square / (1 - 0.95**step)).sqrt() + 1e-8
        corrected = moment / (1 - 0.9**step)
        if local:
            value -= 0.1 * basis @ (((1 - weight) * low + weight * corrected) / denominator)
        else:
            value -= 0.1 * ((1 - weight) * gradient / denominator.mean())
            value -= 0.1 * weight * basis @ (corrected / denominator)
    return value


@pytest.mark.parametrize("weight", [1.0, 0.97, 0.0])
@pytest.mark.parametrize("projection", ["global", "local"])
def test_steps_against_the_formulas(weight, projection):
    settings = {"lr": 0.1, "rank": 2, "betas": (0.9, 0.95), "weight": weight, "projection": projection}
    parameter, _ = after_steps((6, 9), 5, **settings)
    expected = by_hand(5, weight=weight, local=projection == "local")
    assert largest_difference([parameter.detach()], [expected]) < 1e-12


def test_a_tall_matrix_is_stepped_as_its_transpose():
    wide, narrow = after_steps((6, 9), 0, lr=0.1, rank=2), after_steps((9, 6), 0, lr=0.1, rank=2)
    with torch.no_grad():
        narrow[0].copy_(wide[0].T)
    for step in range(6):
        wide[0].grad = randn(6, 9, seed=step)
        narrow[0].grad = wide[0].grad.T.contiguous()
        wide[1].step()
        narrow[1].step()
        if step == 3:
            wide[1].refresh({wide[0]: randn(6, 9, seed=50)})
            narrow[1].refresh({narrow[0]: randn(6, 9, seed=50).T})
    assert largest_difference([wide[0].detach()], [narrow[0].detach().T]) < 1e-12


def test_only_hidden_matrices_are_projected():
    named = parameters()
    optimizer = LoRDO(named, 0.01, rank=5)
    set_gradients(named, 0)
    optimizer.step()
    states = {name: optimizer.state[parameter] for name, parameter in named}
    assert [name for name, state in states.items() if "basis" in state] == ["hidden", "tall"]
    assert states["hidden"]["exp_avg"].shape == (5, 32)
    assert states["hidden"]["basis"].shape == (24, 5)
    assert states["tall"]["exp_avg_sq"].shape == (40, 5)
    assert states["tall"]["basis"].shape == (12, 5)
    assert states["embed"]["exp_avg"].shape == (2500, 120)


# --- rotation -----------------------------------------------------------------------------------------


def test_rotation_against_its_formula():
    parameter, optimizer = after_steps((12, 20), 6, lr=0.1, rank=4, betas=(0.9, 0.95))
    state = optimizer.state[parameter]
    u, v, old = (state[key].clone() for key in ("exp_avg", "exp_avg_sq", "basis"))
    delta = randn(12, 20, seed=99)
    optimizer.refresh({parameter: delta})
    change = leading_singular_vectors(delta, 4).T @ old
    first, second = 1 - 0.9**6, 1 - 0.95**6
    mean = u / first
    variance = (v / second - mean**2).clamp(min=0)
    assert torch.allclose(state["exp_avg"], change @ u, atol=1e-14)
    expected = (change**2 @ variance + (change @ mean) ** 2).abs() * second
    assert torch.allclose(state["exp_avg_sq"], expected, atol=1e-14)
    assert state["exp_avg"].norm() <= u.norm()


def test_turning_into_the_same_basis_keeps_the_mean_and_mends_the_variance():
    parameter, optimizer = after_steps((12, 20), 3, lr=0.1, rank=4, betas=(0.9, 0.95))
    state = optimizer.state[parameter]
    u, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    optimizer.rebase({parameter: state["basis"].clone()})
    assert torch.allclose(state["exp_avg"], u, atol=1e-15)
    at_least = (u / (1 - 0.9**3)) ** 2 * (1 - 0.95**3)
    assert torch.allclose(state["exp_avg_sq"], torch.maximum(v, at_least), atol=1e-15)


def test_averaging_before_turning_is_not_turning_before_averaging():
    def silo(seed):
        parameter, optimizer = one_matrix((12, 20), lr=0.1, rank=4)
        for step in range(3):
            parameter.grad = randn(12, 20, seed=1000 * seed + step)
            optimizer.step()
        return parameter, optimizer

    delta = randn(12, 20, seed=99)
    states = []
    for average_first in (True, False):
        silos = [silo(seed) for seed in (1, 2)]
        both = [optimizer.state[parameter] for parameter, optimizer in silos]
        for turn in (False, True) if average_first else (True, False):
            if turn:
                for parameter, optimizer in silos:
                    optimizer.refresh({parameter: delta})
            else:
                for key in ("exp_avg", "exp_avg_sq"):
                    mean = (both[0][key] + both[1][key]) / 2
                    both[0][key].copy_(mean)
                    both[1][key].copy_(mean)
        states.append(both[0])
    assert torch.allclose(states[0]["exp_avg"], states[1]["exp_avg"])
    assert not torch.allclose(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"], rtol=1e-3)


# --- error feedback -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_error_feedback_keeps_exactly_what_the_projection_leaves_out(shape):
    parameter, optimizer = one_matrix(shape, lr=0.1, rank=4, betas=(0.0, 0.9), error_feedback=True)
    inside = torch.zeros(shape, dtype=DOUBLE)
    given = torch.zeros(shape, dtype=DOUBLE)
    for step in range(9):
        parameter.grad = randn(*shape, seed=step)
        given += parameter.grad
        optimizer.step()
        state = optimizer.state[parameter]
        basis, low = state["basis"], state["exp_avg"]
        # With β1 = 0 the first moment is the projected signal itself.
        inside += basis @ low if shape[0] < shape[1] else low @ basis.T
        assert torch.allclose(inside + state["error_feedback"], given, atol=1e-12)
        error = state["error_feedback"]
        assert (basis.T @ error if shape[0] < shape[1] else error @ basis).abs().max() < 1e-12
        if step % 3 == 2:
            optimizer.refresh({parameter: randn(*shape, seed=70 + step)})


def test_error_feedback_is_inert_until_the_basis_turns():
    runs = {on: after_steps((12, 20), 6, lr=0.1, rank=4, error_feedback=on) for on in (True, False)}
    assert largest_difference(*([parameter.detach()] for parameter, _ in runs.values())) < 1e-12
    for parameter, optimizer in runs.values():
        optimizer.refresh({parameter: randn(12, 20, seed=99)})
        parameter.grad = randn(12, 20, seed=98)
        optimizer.step()
    assert largest_difference(*([parameter.detach()] for parameter, _ in runs.values())) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"weight": 1.1}, "weights are"),
        ({"full_rank_weight": -0.1}, "weights are"),
        ({"betas": (0.9, 0.9, 0.9)}, "one beta for each weight"),
        ({"projection": "other"}, "use global or local"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRDO(parameters(), **settings)


# --- products of lower precision ----------------------------------------------------------------------


@pytest.fixture
def medium_products():
    before = torch.get_float32_matmul_precision()
    yield lambda: torch.set_float32_matmul_precision("medium")
    torch.set_float32_matmul_precision(before)


def test_rounded_factors_move_parameters_by_nearly_the_same(medium_products):
    """On hardware that gains nothing by rounding factors to bfloat16, by the very same."""

    def change() -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(96, 160))
        # With a denominator that is nearly 1 no small entry decides alone which way it goes.
        optimizer = LoRDO([("hidden", parameter)], rank=16, weight=0.97, eps=100.0)
        parameter.grad = randn(96, 160).float()
        optimizer.refresh({parameter: parameter.grad})
        optimizer.step()
        return parameter.detach()

    exact = change()
    medium_products()
    assert exact.norm() > 0
    assert (change() - exact).norm() < 0.05 * exact.norm()


def test_rounded_factors_leave_bases_orthonormal_and_parameters_in_float32(medium_products):
    medium_products()
    basis = leading_singular_vectors(randn(96, 160).float(), 16).double()
    assert largest_difference([basis.T @ basis], [torch.eye(16, dtype=DOUBLE)]) < 1e-5
    # Digits that bfloat16 lacks, in a parameter that a step leaves as it is.
    parameter = torch.nn.Parameter(torch.full((96, 160), 1000.001))
    optimizer = LoRDO([("hidden", parameter)], rank=16)
    parameter.grad = torch.zeros(96, 160)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.full((96, 160), 1000.001))
