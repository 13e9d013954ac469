"""The papers' own toy problems, with bounds that hold for every seed that was tried.

All seeds and workers are one tensor (arms × seeds × workers × 2), because the optimizers are elementwise.
A sync replaces a state by its mean over the workers, after the local step.
"""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from photon.optim import LoRDO, QHAdamW
from photon.optim.low_rank import basis_similarity

WORKERS, SEEDS = 256, 4
OPTIMUM = torch.tensor([1.0, 1.0], dtype=torch.float64)
Sync = Callable[[int, Mapping[str, torch.Tensor]], None]


def rosenbrock_gradient(x: torch.Tensor) -> torch.Tensor:
    first, second = x.unbind(-1)
    valley = second - first.square()
    return torch.stack([-2 * (1 - first) - 400 * first * valley, 200 * valley], -1)


def paths(
    optimizer: Callable[[torch.nn.Parameter], torch.optim.Optimizer],
    syncs: Sequence[Sync],
    *,
    steps: int,
    noise: float | torch.Tensor,
) -> list[torch.Tensor]:
    """Return for each way to sync the distance of the workers' mean from the optimum, steps × seeds.

    All ways go through one optimizer and meet the same noise.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    x = torch.nn.Parameter(start.expand(len(syncs), SEEDS, WORKERS, 2).clone())
    one = optimizer(x)
    means = torch.empty(steps, len(syncs), SEEDS, 2, dtype=torch.float64)
    for step in range(steps):
        if step % 64 == 0:
            draws = noise * torch.randn(64, SEEDS, WORKERS, 2, generator=generator, dtype=torch.float64)
        x.grad = rosenbrock_gradient(x.detach()) + draws[step % 64]
        one.step()
        states = {"params": x.data, **one.state[x]}
        for arm, sync in enumerate(syncs):
            sync(step + 1, {name: tensor[arm] for name, tensor in states.items() if tensor.ndim})
        torch.mean(x.detach(), 2, out=means[step])
    return list((means - OPTIMUM).norm(dim=-1).unbind(1))


def averaging(periods: Mapping[str, int]) -> Sync:
    """Average each state group at its own period, in local steps."""

    def sync(done: int, states: Mapping[str, torch.Tensor]) -> None:
        for group, period in periods.items():
            if done % period == 0:
                states[group].copy_(states[group].mean(1, keepdim=True).expand_as(states[group]))

    return sync


def adam(beta1: float, lr: float) -> Callable[[torch.nn.Parameter], QHAdamW]:
    return lambda x: QHAdamW([x], lr, betas=(beta1, 0.999), weights=(1.0,))


class ForgetfulAdam(QHAdamW):
    """Adam that starts anew after every 192 steps, its counter included."""

    def step(self, closure=None):
        if self.state and float(next(iter(self.state.values()))["step"]) == 192:
            self.state.clear()
        return super().step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("heterogeneous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_desloc_follows_local_adam_where_local_states_fail(heterogeneous):
    noise: float | torch.Tensor = 1.5
    if heterogeneous:
        generator = torch.Generator().manual_seed(1)
        noise = 3 * torch.randn(SEEDS, WORKERS, 1, generator=generator, dtype=torch.float64).abs()
    slow, steps = 0.5 ** (1 / 192), 192 * (60 if heterogeneous else 40)
    syncs = [
        averaging({"params": 192, "exp_avg": 192, "exp_avg_sq": 768}),
        averaging({"params": 192, "exp_avg": 192, "exp_avg_sq": 192}),
        averaging({"params": 192}),
    ]
    desloc, local_adam, persistent = (
        path[-960:].mean(0) for path in paths(adam(slow, 1.0), syncs, steps=steps, noise=noise)
    )
    (reset,) = paths(
        lambda x: ForgetfulAdam([x], 1.0, betas=(slow, 0.999), weights=(1.0,)),
        [averaging({"params": 192})],
        steps=steps,
        noise=noise,
    )
    assert desloc.max() < (0.6 if heterogeneous else 0.15)
    assert persistent.min() > (1.0 if heterogeneous else 0.8)
    assert reset[-960:].mean(0).min() > (1.5 if heterogeneous else 1.0)
    if not heterogeneous:
        assert (desloc - local_adam).abs().max() < 0.05


@pytest.mark.slow
def test_mtdao_stays_stable_with_the_slow_momentum_that_local_adam_cannot_use():
    sync = averaging({"params": 192, "exp_avg": 192, "exp_avg_sq": 192})

    def run(
        optimizer: Callable[[torch.nn.Parameter], QHAdamW], steps: int = 12_800
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean distance at the end, and the first step with a distance below 0.1."""
        (path,) = paths(optimizer, [sync], steps=steps, noise=2.0)
        near = path < 0.1
        return path[-1600:].mean(0), near.int().argmax(0).where(near.any(0), len(path))

    mtdao, first_hit = run(lambda x: QHAdamW([x], 0.1, betas=(0.9999, 0.999), weights=(0.95,)))
    local_slow, _ = run(adam(0.9999, 0.1))
    # Who has not come near by then comes later: the steps, and their noise, are the same.
    _, local_fast_hit = run(adam(0.9, 0.1), steps=int(first_hit.max()) + 1)
    assert mtdao.max() < 0.03
    assert local_slow.min() > 0.3
    assert (first_hit < local_fast_hit).all()


def lordo(
    weight: float, *, seeds: int = 2, workers: int = 4, rounds: int = 60
) -> tuple[float, float, float, float]:
    """Return smallest and largest loss, mean basis similarity, and change of what lies outside the basis."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = randn(seeds, 24, 32)
    copies = [
        [torch.nn.Parameter(torch.zeros(24, 32, dtype=torch.float64)) for _ in range(workers)]
        for _ in range(seeds)
    ]
    everyone = [x for of_seed in copies for x in of_seed]
    optimizer = LoRDO(everyone, 0.02, rank=4, betas=(0.9, 0.999), weight=weight)
    noise = 0.5
    start = [torch.stack([noise * randn(24, 32) - one for _ in range(workers)]).mean(0) for one in target]
    optimizer.refresh({x: start[seed] for seed, of_seed in enumerate(copies) for x in of_seed})
    first = [optimizer.state[of_seed[0]]["basis"].clone() for of_seed in copies]
    similarities = []
    for _ in range(rounds):
        reference = [of_seed[0].detach().clone() for of_seed in copies]
        for _ in range(16):
            for seed, of_seed in enumerate(copies):
                for x in of_seed:
                    x.grad = x.detach() - target[seed] + noise * randn(24, 32)
            optimizer.step()
        for of_seed in copies:
            for name in ("params", "exp_avg", "exp_avg_sq"):
                tensors = [x.data if name == "params" else optimizer.state[x][name] for x in of_seed]
                mean = torch.stack(tensors).mean(0)
                for tensor in tensors:
                    tensor.copy_(mean)
        old = [optimizer.state[of_seed[0]]["basis"].clone() for of_seed in copies]
        optimizer.refresh(
            {x: reference[seed] - x.detach() for seed, of_seed in enumerate(copies) for x in of_seed}
        )
        for of_seed, before in zip(copies, old, strict=True):
            bases = [optimizer.state[x]["basis"] for x in of_seed]
            assert all(torch.equal(bases[0], other) for other in bases)
            similarities.append(basis_similarity(bases[0], before))
    losses = [
        float((of_seed[0].detach() - one).square().mean() / 2)
        for of_seed, one in zip(copies, target, strict=True)
    ]
    outside = max(
        float((of_seed[0].detach() - basis @ (basis.T @ of_seed[0].detach())).abs().max())
        for of_seed, basis in zip(copies, first, strict=True)
    )
    return min(losses), max(losses), sum(similarities) / len(similarities), outside


@pytest.mark.slow
def test_lordo_stagnates_without_the_full_rank_term_and_recovers_with_it():
    results = {weight: lordo(weight) for weight in (1.0, 0.99, 0.97, 0.90)}
    assert results[1.0][0] > 0.22
    assert 0.08 < results[0.99][0] <= results[0.99][1] < 0.17
    assert results[0.97][1] < 0.05
    assert results[0.90][1] < 0.002
    similarities = [similarity for _, _, similarity, _ in results.values()]
    assert similarities == sorted(similarities, reverse=True)
    # Without it nothing ever leaves the first subspace.
    assert similarities[0] == pytest.approx(1.0, abs=1e-6)
    assert results[1.0][3] < 1e-9
    assert results[0.97][3] > 0.1
