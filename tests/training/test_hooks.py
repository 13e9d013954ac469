"""Shares of micro-batches by what they count, and what hooks add to a step, against loops written out."""

import numpy as np
import pytest
import torch
from torch import nn

from photon.data.loader import BatchStream
from photon.objective.causal_lm import CausalLM
from photon.training.groups import read_params
from photon.training.hooks import NO_HOOKS, Loss, StepHooks
from photon.training.loop import LocalTrainer
from photon.training.schedule import ConstantSchedule
from tests.objective.toy import Masked
from tests.training.tiny_lm import TinyLM, exact_batch_loss, exact_loss, stream


def trainer(model: nn.Module, *, rate: float = 0.1, batch: int = 4, micro: int = 2, clip=None, **more):
    return LocalTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9),
        ConstantSchedule(),
        loss=more.pop("loss", exact_batch_loss),
        batch_size=batch,
        micro_batch_size=micro,
        clip_norm=clip,
        precision="fp32",
        device=torch.device("cpu"),
        **more,
    )


class Costs(nn.Module):
    """A parameter whose gradient is the mean of the counted costs."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))


def masked_costs(model: nn.Module, batch, _) -> Loss:
    costs, counted = batch["costs"], batch["counted"]
    value = model.factor * (costs * counted).sum() / counted.sum().clamp_min(1)
    return Loss(value, {"costs": value.detach()})


def counted(batch):
    return batch["counted"].sum()


@pytest.mark.parametrize("micro", [1, 2])
def test_unequal_micro_batches_have_the_mean_of_all_items_not_of_means(micro: int) -> None:
    """One item costs 1, three cost 2: 7/4, where the mean of the two means is 3/2."""
    costs = np.array([[1, 0, 0], [2, 2, 2]], dtype=np.uint16)
    mask = np.array([[1, 0, 0], [1, 1, 1]], dtype=np.uint16)
    model = Costs()
    batches = BatchStream({"costs": [costs], "counted": [mask]}, seed=0)
    result = trainer(model, rate=1.0, batch=2, micro=micro, loss=masked_costs, count=counted).train(
        batches, global_step=0, steps=1
    )
    assert result.loss == result.gradient_norm == result.figures["costs"] == 1.75
    assert model.factor.item() == 1 - 1.75
    assert batches.position == 2


def test_a_batch_without_an_item_has_no_gradient() -> None:
    nothing = np.zeros((2, 3), dtype=np.uint16)
    model = Costs()
    result = trainer(model, batch=2, micro=1, loss=masked_costs, count=counted).train(
        BatchStream({"costs": [nothing + 1], "counted": [nothing]}, seed=0), global_step=0, steps=2
    )
    assert (result.loss, model.factor.item()) == (0.0, 1.0)


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_masked_loss_is_that_of_the_whole_batch(micro: int) -> None:
    parts, whole = TinyLM(dtype=torch.float64), TinyLM(dtype=torch.float64)
    toy = Masked(below=5)
    local = trainer(parts, batch=6, micro=micro, loss=toy.loss, count=toy.count)
    split = local.train(stream(), global_step=0, steps=4)
    local = trainer(whole, batch=6, micro=6, loss=toy.loss, count=toy.count)
    together = local.train(stream(), global_step=0, steps=4)
    for name, ours in read_params(parts).items():
        torch.testing.assert_close(ours, read_params(whole)[name], rtol=0, atol=1e-7)
    assert split.loss == pytest.approx(together.loss, rel=1e-6)
    assert split.figures["right"] == pytest.approx(together.figures["right"], rel=1e-6)


def test_without_counts_and_hooks_the_loop_is_the_bare_loop_bit_for_bit() -> None:
    ours, bare = TinyLM(), TinyLM()
    result = trainer(ours, clip=0.3, loss=CausalLM().loss).train(
        stream(), global_step=0, steps=6, hooks=NO_HOOKS
    )
    optimizer, batches, losses = torch.optim.SGD(bare.parameters(), lr=0.1, momentum=0.9), stream(), []
    for _ in range(6):
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in batches.next_batch(4)["tokens"].split(2):
            loss = CausalLM().loss(bare, {"tokens": part}, None).value / 2
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(bare.parameters(), 0.3)
        optimizer.step()
        losses.append(total.item())
    assert all(torch.equal(ours, read_params(bare)[name]) for name, ours in read_params(ours).items())
    assert result.loss_last == losses[-1]
    assert result.figures == {}


def hand_loop(model: nn.Module, steps: int, clip: float | None, *, term=None, correct=None) -> list[float]:
    """Steps written out, the batch at once; returns the losses without the term."""
    optimizer, batches, losses = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), stream(), []
    for _ in range(steps):
        loss = exact_loss(model, batches.next_batch(4)["tokens"])
        optimizer.zero_grad()
        (loss if term is None else loss + term(model)).backward()
        if correct is not None:
            for parameter in model.parameters():
                correct(parameter)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_equal(ours: nn.Module, expected: nn.Module) -> None:
    for name, tensor in read_params(ours).items():
        torch.testing.assert_close(tensor, read_params(expected)[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("micro", "clip"), [(4, None), (1, 0.3), (2, 0.3)])
def test_a_term_counts_once_a_step_and_is_not_reported(micro: int, clip: float | None) -> None:
    ours, hand, without = (TinyLM(dtype=torch.float64) for _ in range(3))
    start = {name: tensor.clone() for name, tensor in read_params(ours).items()}

    def term(model: nn.Module) -> torch.Tensor:
        squares = ((parameter - start[name]) ** 2 for name, parameter in model.named_parameters())
        return 0.7 * sum(one.sum() for one in squares)

    result = trainer(ours, micro=micro, clip=clip).train(
        stream(), global_step=0, steps=5, hooks=StepHooks(term=term)
    )
    losses = hand_loop(hand, 5, clip, term=term)
    hand_loop(without, 5, clip)
    assert_equal(ours, hand)
    assert result.loss == pytest.approx(sum(losses) / 5, abs=1e-13)
    assert (hand.mix - without.mix).abs().max() > 1e-3, "the term matters"


@pytest.mark.parametrize(("micro", "clip"), [(4, None), (1, 0.3), (2, 0.3)])
def test_gradients_are_corrected_whole_and_before_the_norm(micro: int, clip: float | None) -> None:
    ours, hand = TinyLM(dtype=torch.float64), TinyLM(dtype=torch.float64)
    raw = {name: torch.zeros_like(tensor) for name, tensor in read_params(ours).items()}
    seen = []

    def correct(named) -> None:
        for name, parameter in named:
            raw[name] += parameter.grad
            parameter.grad += 0.2
        seen.append([name for name, _ in named])

    result = trainer(ours, micro=micro, clip=clip).train(
        stream(), global_step=0, steps=4, hooks=StepHooks(correct=correct)
    )
    sums, norms = {id(one): torch.zeros_like(one) for one in hand.parameters()}, []

    def by_hand(parameter: nn.Parameter) -> None:
        sums[id(parameter)] += parameter.grad
        parameter.grad += 0.2
        norms.append(parameter.grad.norm().item())

    hand_loop(hand, 4, clip, correct=by_hand)
    assert_equal(ours, hand)
    assert seen == [["mix", "bias", "embedding.weight"]] * 4
    for name, parameter in hand.named_parameters():
        torch.testing.assert_close(raw[name], sums[id(parameter)], rtol=0, atol=1e-13)
    squares = torch.tensor(norms).reshape(4, 3).square().sum(1).sqrt()
    assert result.gradient_norm == pytest.approx(squares.mean().item(), rel=1e-6)
