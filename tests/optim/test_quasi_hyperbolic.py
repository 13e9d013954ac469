import math

import pytest
import torch

from photon.optim import ADOPT, QHADOPT, QHAdamW
from tests.optim.helpers import largest_difference, parameters, set_gradients, trajectory


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_momentum_of_weight_one_is_torchs_adamw(foreach, weight_decay):
    ours = trajectory(
        lambda p: QHAdamW(p, 0.01, betas=(0.9, 0.95), weights=(1.0,), weight_decay=weight_decay), 20
    )
    torchs = trajectory(
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.9, 0.95), weight_decay=weight_decay, foreach=foreach),
        20,
    )
    assert largest_difference(ours, torchs) < 1e-6
    start = [parameter.detach() for _, parameter in parameters()]
    assert largest_difference(ours, start) > 0.05


def by_hand(steps, betas, weights, lr, eps):
    """Return what the recurrences of the paper give in plain arithmetic, one parameter after another."""
    named = parameters(dtype=torch.float64)
    *firsts, beta2 = betas
    moments = {name: [torch.zeros_like(p) for _ in firsts] for name, p in named}
    squares = {name: torch.zeros_like(p) for name, p in named}
    for step in range(steps):
        set_gradients(named, step)
        for name, parameter in named:
            g, t = parameter.grad, step + 1
            squares[name] = beta2 * squares[name] + (1 - beta2) * g**2
            numerator = (1 - sum(weights)) * g
            for j, (beta, weight) in enumerate(zip(firsts, weights, strict=True)):
                moments[name][j] = beta * moments[name][j] + (1 - beta) * g
                numerator = numerator + weight * moments[name][j] / (1 - beta**t)
            denominator = (squares[name] / (1 - beta2**t)).sqrt() + eps
            parameter.data = parameter.data - lr * numerator / denominator
    return [parameter.detach() for _, parameter in named]


@pytest.mark.parametrize(
    ("betas", "weights"),
    [((0.9, 0.999, 0.95), (0.05, 0.9)), ((0.999, 0.999), (0.95,)), ((0.9, 0.95), (0.0,))],
)
def test_qhadamw_against_the_recurrence(betas, weights):
    ours = trajectory(lambda p: QHAdamW(p, 0.01, betas, weights, eps=1e-3), 12, dtype=torch.float64)
    assert largest_difference(ours, by_hand(12, betas, weights, 0.01, 1e-3)) < 1e-12


def test_weight_zero_is_the_step_without_momentum_and_without_its_state():
    named = parameters()
    optimizer = QHAdamW(named, 0.01, betas=(0.9, 0.95), weights=(0.0,))
    set_gradients(named, 0)
    optimizer.step()
    assert set(optimizer.state[named[0][1]]) == {"step", "exp_avg_sq"}
    rmsprop = trajectory(lambda p: QHAdamW(p, 0.01, betas=(0.9, 0.95), weights=(0.0,)), 9)
    # Adam with β1 = 0 is RMSprop with a corrected second moment.
    adam = trajectory(lambda p: torch.optim.Adam(p, 0.01, betas=(0.0, 0.95)), 9)
    assert largest_difference(rmsprop, adam) < 1e-6


@pytest.mark.parametrize("kind", [QHAdamW, QHADOPT])
def test_momenta_of_equal_decay_are_one_of_their_summed_weight(kind):
    two = trajectory(lambda p: kind(p, 0.01, (0.9, 0.9, 0.99), (0.3, 0.5)), 15, dtype=torch.float64)
    one = trajectory(lambda p: kind(p, 0.01, (0.9, 0.99), (0.8,)), 15, dtype=torch.float64)
    assert largest_difference(two, one) < 1e-10


@pytest.mark.parametrize("kind", [QHAdamW, QHADOPT])
def test_a_momentum_of_weight_zero_is_left_out(kind):
    padded = trajectory(lambda p: kind(p, 0.01, (0.5, 0.99, 0.999), (0.0, 0.95)), 10)
    plain = trajectory(lambda p: kind(p, 0.01, (0.99, 0.999), (0.95,)), 10)
    assert largest_difference(padded, plain) == 0.0


def test_states_have_the_names_of_the_sync_plan():
    named = parameters()
    optimizer = QHAdamW(named, 0.01, (0.9, 0.99, 0.999, 0.95), (0.1, 0.2, 0.3))
    set_gradients(named, 0)
    optimizer.step()
    names = {"step", "exp_avg", "exp_avg_2", "exp_avg_3", "exp_avg_sq"}
    assert all(set(optimizer.state[parameter]) == names for _, parameter in named)


def adopt_by_hand(steps, betas, weights, lr, eps, weight_decay):
    """Return ADOPT as its authors state it, element by element in Python's own numbers."""
    named = parameters(dtype=torch.float64)[2:]
    *firsts, beta2 = betas
    values = [parameter.detach().flatten().tolist() for _, parameter in named]
    seconds = [[0.0] * len(one) for one in values]
    moments = [[[0.0] * len(one) for _ in firsts] for one in values]
    for step in range(steps):
        for parameter, one in zip((p for _, p in named), values, strict=True):
            parameter.data = torch.tensor(one, dtype=torch.float64).view(parameter.shape)
        all_named = parameters(dtype=torch.float64)[:2] + named
        set_gradients(all_named, step)
        for number, (_, parameter) in enumerate(named):
            for i, g in enumerate(parameter.grad.flatten().tolist()):
                if step == 0:
                    seconds[number][i] = g * g
                    continue
                n = g / max(math.sqrt(seconds[number][i]), eps)
                n = max(-(step**0.25), min(step**0.25, n))
                value = values[number][i] * (1 - lr * weight_decay)
                value -= lr * (1 - sum(weights)) * n
                for j, (beta, weight) in enumerate(zip(firsts, weights, strict=True)):
                    moments[number][j][i] = beta * moments[number][j][i] + (1 - beta) * n
                    value -= lr * weight * moments[number][j][i]
                values[number][i] = value
                seconds[number][i] = beta2 * seconds[number][i] + (1 - beta2) * g * g
    return [torch.tensor(one, dtype=torch.float64) for one in values]


@pytest.mark.parametrize("weights", [(1.0,), (0.9,), (0.2, 0.7), (0.0,)])
def test_adopt_against_its_restatement(weights):
    betas = (*(0.9, 0.99, 0.999)[: len(weights)], 0.99)
    settings = {"lr": 0.02, "eps": 0.3, "weight_decay": 0.1}
    ours = trajectory(lambda p: QHADOPT(p, betas=betas, weights=weights, **settings), 9, dtype=torch.float64)
    expected = adopt_by_hand(9, betas, weights, 0.02, 0.3, 0.1)
    assert largest_difference([one.flatten() for one in ours[2:]], expected) < 1e-12


def test_adopt_is_qhadopt_of_weight_one():
    adopt = trajectory(lambda p: ADOPT(p, 0.01, betas=(0.95, 0.9999)), 10)
    qhadopt = trajectory(lambda p: QHADOPT(p, 0.01, betas=(0.95, 0.9999), weights=(1.0,)), 10)
    assert largest_difference(adopt, qhadopt) == 0.0


def test_first_step_of_adopt_only_looks_at_the_gradient():
    named = parameters()
    before = [parameter.detach().clone() for _, parameter in named]
    optimizer = ADOPT(named, 0.1, weight_decay=0.5)
    set_gradients(named, 0)
    optimizer.step()
    assert largest_difference([parameter.detach() for _, parameter in named], before) == 0.0
    for _, parameter in named:
        assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], parameter.grad.square())


def test_adopt_clips_what_it_divides():
    # After tiny gradients a large one is worth t^¼ and not its ratio to them.
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = QHADOPT([parameter], lr=1.0, betas=(0.9, 0.99), weights=(0.0,))
    for gradient in (1e-3, 1e-3, 1e3):
        parameter.grad = torch.full((3,), gradient)
        before = parameter.detach().clone()
        optimizer.step()
    assert torch.allclose(before - parameter.detach(), torch.full((3,), 2**0.25))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"eps": -1e-8}, "eps is"),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"betas": (0.9, 0.9, 0.9)}, "one beta for each weight"),
        ({"weights": (-0.1,)}, "weights are"),
        ({"betas": (0.9, 0.9, 0.9), "weights": (0.6, 0.5)}, "sum at most 1"),
    ],
)
@pytest.mark.parametrize("kind", [QHAdamW, QHADOPT])
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(parameters(), **settings)


def test_a_group_may_have_settings_of_its_own_and_they_are_checked():
    (_, a), (_, b) = parameters()[:2]
    optimizer = QHAdamW([{"params": [a], "lr": 0.0}, {"params": [b]}], lr=0.1)
    before = a.detach().clone(), b.detach().clone()
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    assert torch.equal(a.detach(), before[0])
    assert not torch.equal(b.detach(), before[1])
    with pytest.raises(ValueError, match="sum at most 1"):
        QHAdamW([{"params": [a], "weights": (1.5,)}])


def test_a_perturbed_momentum_decays_by_its_own_half_life():
    # MT-DAO: what a sync gave is kept to the part β^K over K steps with the same gradients.
    for beta, kept in ((0.9, 0.03434), (0.99, 0.72498), (0.999, 0.96849), (0.9999, 0.99680)):
        runs = []
        for delta in (0.0, 1.0):
            parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
            optimizer = QHAdamW([parameter], 0.0, betas=(beta, 0.999), weights=(0.9,))
            for step in range(40):
                parameter.grad = torch.tensor([math.sin(step)], dtype=torch.float64)
                if step == 8:
                    optimizer.state[parameter]["exp_avg"] += delta
                optimizer.step()
            runs.append(float(optimizer.state[parameter]["exp_avg"]))
        assert runs[1] - runs[0] == pytest.approx(beta**32, rel=1e-9)
        assert beta**32 == pytest.approx(kept, abs=5e-6)


@pytest.mark.parametrize(("beta", "expected"), [(0.9, 0.05257), (0.999, 3.103e-5)])
def test_noise_that_enters_a_momentum_between_syncs(beta, expected):
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = QHAdamW([parameter], 0.0, betas=(beta, 0.999), weights=(1.0,))
    generator = torch.Generator().manual_seed(0)
    for _ in range(32):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    assert (1 - beta) / (1 + beta) * (1 - beta**64) == pytest.approx(expected, rel=1e-3)
    assert float(optimizer.state[parameter]["exp_avg"].var()) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(("beta", "beta2", "steps"), [(0.9, 0.99, 5), (0.99, 0.999, 32), (0.5, 0.9, 1)])
@pytest.mark.parametrize("bound", [0.5, 2.0])
def test_drift_of_states_is_bounded(beta, beta2, steps, bound):
    # DES-LOC: gradients within ±ρ; from any states that such gradients lead to.
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(torch.zeros(500, dtype=torch.float64))
    optimizer = QHAdamW([parameter], 0.0, betas=(beta, beta2), weights=(1.0,))

    def walk(sign):
        for _ in range(steps):
            gradient = 3 * bound * torch.randn(500, generator=generator, dtype=torch.float64)
            # Half of the coordinates meet the worst case: everything one way, then the other.
            gradient[::2] = sign * 10 * bound
            parameter.grad = gradient.clamp(-bound, bound)
            optimizer.step()
        state = optimizer.state[parameter]
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()

    for window in range(6):
        u, v = walk(1)
        later_u, later_v = walk(-1)
        assert u.abs().max() <= bound
        assert v.min() >= 0
        assert v.max() <= bound**2 * (1 + 1e-12)
        drift = float((later_u - u).abs().max())
        assert drift <= 2 * bound * (1 - beta**steps) + 1e-12, window
        assert float((later_v - v).abs().max()) <= bound**2 * (1 - beta2**steps) + 1e-12
