"""What holds for every local optimizer: exact round trips, closures, missing gradients, state groups."""

import copy
import io

import pytest
import torch

from photon.optim import ADOPT, QHADOPT, LoRDO, MuonAdamW, QHAdamW, RefreshedAdamW
from photon.training.groups import Refreshing, read_optimizer, reset_optimizer, write_optimizer
from tests.optim.helpers import Make, largest_difference, parameters, set_gradients

OPTIMIZERS: dict[str, Make] = {
    "adopt": lambda p: ADOPT(p, 0.01, weight_decay=0.1),
    "qhadamw": lambda p: QHAdamW(p, 0.01),
    "qhadamw-2": lambda p: QHAdamW(p, 0.01, betas=(0.9, 0.999, 0.99), weights=(0.05, 0.95)),
    "qhadopt": lambda p: QHADOPT(p, 0.01),
    "lordo": lambda p: LoRDO(p, 0.01, rank=5, weight_decay=0.1),
    "lordo-local": lambda p: LoRDO(p, 0.01, rank=5, projection="local"),
    "lordo-error": lambda p: LoRDO(p, 0.01, rank=5, error_feedback=True),
    "muon": lambda p: MuonAdamW(p, 0.01),
    "refreshed": lambda p: RefreshedAdamW(p, 0.01, weight_decay=0.1),
}


class Model(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        for name, parameter in parameters(seed):
            self.register_parameter(name, parameter)

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.named_parameters())


def walk(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model.named(), step)
        optimizer.step()
        if isinstance(optimizer, Refreshing) and step % 4 == 3:
            optimizer.refresh({p: p.detach() + p.grad for p in model.parameters()})


def values(model: Model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


def test_state_dict_goes_on_bit_for_bit(make):
    model = Model()
    optimizer = make(model.named())
    walk(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    restored = make(other.named())
    restored.load_state_dict(torch.load(file, weights_only=True))
    walk(model, optimizer, range(7, 14))
    walk(other, restored, range(7, 14))
    assert largest_difference(values(model), values(other)) == 0.0


def test_photons_state_groups_go_on_bit_for_bit(make):
    model = Model()
    optimizer = make(model.named())
    walk(model, optimizer, range(7))
    groups, scalars = read_optimizer(model, optimizer)
    assert scalars["step"] == 7.0
    other = copy.deepcopy(model)
    fresh = make(other.named())
    groups = {name: {key: one.clone() for key, one in group.items()} for name, group in groups.items()}
    # Over a state that is there already, as on a runtime that serves several silos.
    walk(copy.deepcopy(other), fresh, range(1))
    write_optimizer(other, fresh, groups, scalars)
    walk(model, optimizer, range(7, 14))
    walk(other, fresh, range(7, 14))
    assert largest_difference(values(model), values(other)) == 0.0
    scalars = read_optimizer(other, fresh)[1]
    assert scalars == read_optimizer(model, optimizer)[1]
    assert scalars["step"] == 14.0


def test_reset_starts_anew(make):
    model, other = Model(), Model()
    optimizer = make(model.named())
    walk(model, optimizer, range(3))
    reset_optimizer(optimizer)
    with torch.no_grad():
        for mine, start in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(start)
    walk(model, optimizer, range(5))
    walk(other, make(other.named()), range(5))
    assert largest_difference(values(model), values(other)) == 0.0


def test_a_copy_goes_its_own_way(make):
    model = Model()
    optimizer = make(model.named())
    walk(model, optimizer, range(4))
    other, twin = copy.deepcopy((model, optimizer))
    walk(model, optimizer, range(4, 8))
    before = values(other)
    walk(other, twin, range(4, 8))
    assert largest_difference(before, values(other)) > 0
    assert largest_difference(values(model), values(other)) == 0.0


def test_closures_run_with_gradients_and_their_loss_is_returned(make):
    model = Model()
    optimizer = make(model.named())

    def closure():
        optimizer.zero_grad()
        loss = sum((parameter**2).sum() for parameter in model.parameters())
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses[3] < losses[0]


def test_parameters_without_a_gradient_stay_where_they_are(make):
    model = Model()
    optimizer = make(model.named())
    before = values(model)
    for step in range(3):
        set_gradients(model.named(), step)
        model.hidden.grad = model.bias.grad = None
        optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, values(model), strict=True)]
    assert dict(zip(dict(model.named()), moved, strict=True)) == {
        "embed": True,
        "hidden": False,
        "tall": True,
        "bias": False,
        "scale": True,
    }


def test_the_learning_rate_of_every_group_scales_the_step(make):
    model = Model()
    optimizer = make(model.named())
    before = values(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    walk(model, optimizer, range(3))
    assert largest_difference(values(model), before) == 0.0


def test_memory_layouts_do_not_matter(make):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 400, generator=generator)
    results = []
    for transposed in (False, True):
        value = start.T.contiguous().T if transposed else start.clone()
        parameter = torch.nn.Parameter(value)
        assert parameter.is_contiguous() != transposed
        optimizer = make([("embed", parameter)])
        for step in range(4):
            gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.allclose(*results, rtol=0, atol=1e-6)


def test_trains_under_autocast(make):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = make(list(model.named_parameters()))
    inputs = torch.randn(64, 16)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(inputs).float() - inputs[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())
