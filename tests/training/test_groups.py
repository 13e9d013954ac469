import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.training.groups import (
    read_optimizer,
    read_params,
    reset_optimizer,
    split_state,
    write_optimizer,
    write_params,
)
from tests.training.tiny_lm import LENGTH, VOCABULARY, TinyLM, exact_loss

OPTIMIZERS: dict[str, Callable[[TinyLM], torch.optim.Optimizer]] = {
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adam-amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "sgd-plain": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01, initial_accumulator_value=0.3),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2], lr=0.01),
}


def step(model: TinyLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    exact_loss(model, ids).backward()
    optimizer.step()


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_params_are_views_in_name_order_with_tied_weights_once():
    model = TinyLM()
    params = read_params(model)
    assert list(params) == ["bias", "embedding.weight", "mix"]
    assert not any(tensor.requires_grad for tensor in params.values())
    params["bias"].fill_(7.0)
    assert model.bias.detach().eq(7.0).all()


def test_write_params_keeps_the_parameter_objects():
    source, target = TinyLM(seed=1), TinyLM(seed=2)
    before = [id(parameter) for parameter in target.parameters()]
    write_params(target, read_params(source))
    assert equal(read_params(target), read_params(source))
    assert [id(parameter) for parameter in target.parameters()] == before
    assert target.head.weight is target.embedding.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("mix"), "parameter mix is missing"),
        (lambda p: p.update(other=torch.zeros(1)), "no parameter other"),
        (lambda p: p.update(mix=torch.zeros(6, 5)), r"mix has shape \(6, 5\)"),
    ],
)
def test_write_params_names_what_does_not_fit_and_changes_nothing(change, message):
    model = TinyLM()
    before = snapshot(read_params(model))
    params = snapshot(read_params(TinyLM(seed=3)))
    change(params)
    with pytest.raises(PhotonError, match=message):
        write_params(model, params)
    assert equal(read_params(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_restored_optimizer_continues_bit_for_bit(name, used):
    model = TinyLM()
    optimizer = OPTIMIZERS[name](model)
    for seed in range(3):
        step(model, optimizer, seed)
    groups, scalars = read_optimizer(model, optimizer)
    groups = {group: snapshot(tensors) for group, tensors in groups.items()}
    params = snapshot(read_params(model))

    other = TinyLM(seed=9)
    other_optimizer = OPTIMIZERS[name](other)
    if used:
        step(other, other_optimizer, 99)
    write_params(other, params)
    write_optimizer(other, other_optimizer, groups, scalars)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert equal(read_params(other), read_params(model))
    state, restored = read_optimizer(model, optimizer), read_optimizer(other, other_optimizer)
    assert state[1] == restored[1]
    assert state[0].keys() == restored[0].keys()
    assert all(equal(state[0][group], restored[0][group]) for group in state[0])


def test_groups_and_scalars_of_adamw():
    model = TinyLM()
    optimizer = OPTIMIZERS["adamw-fused"](model)
    assert read_optimizer(model, optimizer) == ({}, {})
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    groups, scalars = read_optimizer(model, optimizer)
    assert sorted(groups) == ["exp_avg", "exp_avg_sq"]
    assert list(groups["exp_avg"]) == list(read_params(model))
    assert scalars == {"step": 2.0}


def test_groups_do_not_depend_on_the_optimizers_order():
    a, b = TinyLM(), TinyLM()
    one = torch.optim.Adam(a.parameters())
    two = torch.optim.Adam(list(b.parameters())[::-1])
    step(a, one, 0)
    step(b, two, 0)
    ours, theirs = read_optimizer(a, one)[0], read_optimizer(b, two)[0]
    assert [list(tensors) for tensors in ours.values()] == [list(tensors) for tensors in theirs.values()]
    assert all(equal(ours[group], theirs[group]) for group in ours)


def test_a_parameter_of_one_number_keeps_its_moments_as_tensors():
    parameter = torch.nn.Parameter(torch.tensor(1.0))
    state = {"step": torch.tensor(4.0), "exp_avg": torch.tensor(0.5)}
    groups, scalars = split_state({"scale": (parameter, state)})
    assert list(groups) == ["exp_avg"]
    assert scalars == {"step": 4.0}


def test_scalars_that_differ_are_refused():
    model = TinyLM()
    optimizer = OPTIMIZERS["adamw-foreach"](model)
    step(model, optimizer, 0)
    optimizer.state[model.mix]["step"] += 1
    with pytest.raises(PhotonError, match=r"step is 2\.0 for mix"):
        read_optimizer(model, optimizer)


def test_unknown_parameter_in_a_group_is_refused():
    model = TinyLM()
    optimizer = OPTIMIZERS["sgd-momentum"](model)
    with pytest.raises(PhotonError, match="momentum_buffer: the model has no parameter nope"):
        write_optimizer(model, optimizer, {"momentum_buffer": {"nope": torch.zeros(1)}}, {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_equals_a_new_optimizer(name):
    model = TinyLM()
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer, 0)
    other = copy.deepcopy(model)
    reset_optimizer(optimizer)
    new = OPTIMIZERS[name](other)
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(other, new, seed)
    assert equal(read_params(model), read_params(other))
