"""Outer optimizers against hand-written recurrences on recorded pseudo-gradients."""

from typing import Any

import pytest
import torch

from photon.errors import PhotonError
from photon.strategy.outer import OuterOptimizer

SGD = "torch.optim.SGD"


def drive(
    section: dict[str, Any], rounds: int = 10, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Step through ``rounds`` means drawn around the parameters; return parameters and pseudo-gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = {"a.w": torch.randn(4, 3, generator=generator, dtype=dtype)}
    outer = OuterOptimizer(section)
    state: dict[str, dict[str, torch.Tensor]] = {}
    scalars: dict[str, float] = {}
    trajectory, gradients = [params["a.w"].clone()], []
    for _ in range(rounds):
        delta = 0.1 * torch.randn(4, 3, generator=generator, dtype=dtype)
        mean = {"a.w": params["a.w"] - delta}
        gradients.append(params["a.w"] - mean["a.w"])
        _, state, scalars = outer.step(params, mean, state, scalars)
        state = {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in state.items()}
        trajectory.append(params["a.w"].clone())
    return trajectory, gradients


def test_fedavg_takes_the_mean_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    params = {"w": torch.randn(1000, generator=generator)}
    mean = torch.randn(1000, generator=generator)
    before = params["w"].clone()
    step, state, scalars = OuterOptimizer({"_target_": SGD, "lr": 1.0}).step(
        params, {"w": mean.clone()}, {}, {}
    )
    assert torch.equal(params["w"], mean)
    assert state == {}
    assert scalars == {}
    assert step.pseudo_gradient_norm == pytest.approx(float((before - mean).norm()), rel=1e-6)
    assert step.parameter_norm == pytest.approx(float(mean.norm()), rel=1e-6)


@pytest.mark.parametrize("lr", [1.0, 0.7])
def test_nesterov_without_momentum_is_fedavg(lr: float) -> None:
    plain, _ = drive({"_target_": SGD, "lr": lr})
    # torch refuses nesterov with momentum 0, so the smallest momentum stands for it.
    nesterov, _ = drive({"_target_": SGD, "lr": lr, "momentum": 1e-300, "nesterov": True})
    for a, b in zip(plain, nesterov, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_nesterov_follows_its_recurrence() -> None:
    """m ← μ m + Δ;  θ ← θ − η (Δ + μ m),  m_0 = 0 (the papers' FedNesterov)."""
    lr, mu = 0.7, 0.9
    trajectory, gradients = drive({"_target_": SGD, "lr": lr, "momentum": mu, "nesterov": True})
    theta, momentum = trajectory[0].clone(), torch.zeros_like(trajectory[0])
    for expected, gradient in zip(trajectory[1:], gradients, strict=True):
        momentum = mu * momentum + gradient
        theta = theta - lr * (gradient + mu * momentum)
        torch.testing.assert_close(theta, expected, rtol=0, atol=1e-12)


def test_fedmom_form_equals_nesterov() -> None:
    """v' = θ − ηΔ;  θ ← (1+μ) v' − μ v;  v ← v',  v_0 = θ_1: the same trajectory."""
    lr, mu = 0.7, 0.9
    trajectory, gradients = drive({"_target_": SGD, "lr": lr, "momentum": mu, "nesterov": True})
    theta = v = trajectory[0].clone()
    for expected, gradient in zip(trajectory[1:], gradients, strict=True):
        ahead = theta - lr * gradient
        theta, v = (1 + mu) * ahead - mu * v, ahead
        torch.testing.assert_close(theta, expected, rtol=0, atol=1e-12)


def test_fedadam_descends_and_equals_a_restatement() -> None:
    lr, b1, b2, eps = 0.1, 0.9, 0.95, 1e-9
    trajectory, gradients = drive({"_target_": "torch.optim.Adam", "lr": lr, "betas": (b1, b2), "eps": eps})
    theta = trajectory[0].clone()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (expected, gradient) in enumerate(zip(trajectory[1:], gradients, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        theta = theta - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
        torch.testing.assert_close(theta, expected, rtol=1e-9, atol=1e-12)
    params = {"w": torch.ones(5)}
    outer, state, scalars = OuterOptimizer({"_target_": "torch.optim.Adam", "lr": 0.1}), {}, {}
    for _ in range(5):
        _, state, scalars = outer.step(params, {"w": 0.9 * params["w"]}, state, scalars)
    assert float(params["w"].norm()) < float(torch.ones(5).norm())


def test_maps_of_a_checkpoint_are_read_and_never_written_to() -> None:
    """A write to a map costs a page of the system for every 4 KiB."""
    outer = OuterOptimizer({"_target_": "torch.optim.Adam", "lr": 0.1})
    first = {"w": torch.ones(5)}
    _, state, scalars = outer.step(first, {"w": torch.zeros(5)}, {}, {})
    given = {"w": first["w"].clone()}
    mapped, moments = dict(given), {group: tensors["w"] for group, tensors in state.items()}
    before = {group: tensor.clone() for group, tensor in moments.items()}
    _, after, _ = outer.step(given, {"w": torch.zeros(5)}, state, scalars)
    assert torch.equal(mapped["w"], first["w"])
    assert not torch.equal(given["w"], first["w"])
    assert moments.keys() == {"exp_avg", "exp_avg_sq"}
    for group, tensor in moments.items():
        assert torch.equal(tensor, before[group])
        assert not torch.equal(after[group]["w"], tensor)


def test_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(PhotonError, match=r"outer\.momentun.*did you mean 'momentum'"):
        OuterOptimizer({"_target_": SGD, "lr": 1.0, "momentun": 0.9}).step(
            {"w": torch.ones(2)}, {"w": torch.ones(2)}, {}, {}
        )
