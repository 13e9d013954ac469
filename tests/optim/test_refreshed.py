"""What a refresh reads from the pseudo-gradient."""

import pytest
import torch

from photon.optim import RefreshedAdamW

GRADIENT = torch.tensor([1e-3, 1.0, -30.0], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def walked(steps: int) -> tuple[torch.nn.Parameter, RefreshedAdamW]:
    """Step with a gradient that does not change, of very different sizes: every step is one learning rate."""
    parameter = torch.nn.Parameter(START.clone())
    optimizer = RefreshedAdamW([parameter], lr=0.01, betas=(0.8, 0.99))
    parameter.grad = GRADIENT.clone()
    for _ in range(steps):
        optimizer.step()
    return parameter, optimizer


def moment_after(parameter: torch.nn.Parameter, optimizer: RefreshedAdamW) -> torch.Tensor:
    """Return the first moment that a step has begun with."""
    optimizer.step()
    return (optimizer.state[parameter]["exp_avg"] - 0.2 * GRADIENT) / 0.8


def test_a_lone_silo_with_a_steady_gradient_keeps_its_moment():
    parameter, optimizer = walked(5)
    before = optimizer.state[parameter]["exp_avg"].clone()
    optimizer.state[parameter]["exp_avg"].zero_()
    optimizer.refresh({parameter: START - parameter.detach()})
    torch.testing.assert_close(moment_after(parameter, optimizer), before, rtol=1e-4, atol=0.0)
    # Once: the next step begins with what this one has left.
    left = optimizer.state[parameter]["exp_avg"].clone()
    torch.testing.assert_close(moment_after(parameter, optimizer), left)


def test_silos_go_on_at_their_mean_velocity_whatever_the_learning_rate():
    parameter, optimizer = walked(4)
    # Another silo went the opposite way in the second entry, so that the mean did not move there.
    optimizer.refresh({parameter: torch.tensor([0.04, 0.0, -0.04], dtype=torch.float64)})
    optimizer.param_groups[0]["lr"] = 0.02
    expected = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64) * GRADIENT * (1 - 0.8**4)
    torch.testing.assert_close(moment_after(parameter, optimizer), expected, rtol=1e-4, atol=1e-12)


def test_steps_are_counted_from_the_last_refresh():
    parameter, optimizer = walked(4)
    optimizer.refresh({parameter: START - parameter.detach()})
    before = parameter.detach().clone()
    optimizer.step()
    optimizer.refresh({parameter: before - parameter.detach()})
    expected = GRADIENT * (1 - 0.8**5)
    torch.testing.assert_close(moment_after(parameter, optimizer), expected, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("steps", [0.0, 2.0])
def test_a_count_that_has_started_anew_leaves_the_moment(steps):
    parameter, optimizer = walked(4)
    optimizer.refresh({parameter: START - parameter.detach()})
    optimizer.step()
    state = optimizer.state[parameter]
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    state["step"].fill_(steps)
    optimizer.refresh({parameter: torch.ones_like(START)})
    assert moment_after(parameter, optimizer).abs().max() < 1e-12
    assert float(state["refreshed"]) == steps


def test_a_learning_rate_of_zero_moves_nothing():
    parameter, optimizer = walked(4)
    before = parameter.detach().clone()
    optimizer.refresh({parameter: torch.ones_like(START)})
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(parameter.detach(), before)
