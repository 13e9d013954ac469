"""FedProx against its closed form, against autograd, and against Photon where the term is absent."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.models.build import build_model
from photon.state.checkpoint import CheckpointStore
from photon.strategy.base import strategy_of
from photon.strategy.fedprox import Proximal
from photon.training.hooks import NO_HOOKS
from tests.told import told_loss

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]
SGD = ("optimizer=sgd", "optimizer.lr=0.5", "optimizer.momentum=0", "training.clip_norm=null")
FLAT = ("schedule=constant", "schedule.warmup_steps=0")
MU = 2.0


def test_steps_on_a_slope_follow_the_closed_form(small_config: Make) -> None:
    """With a constant gradient g: θ_k − θ_0 = −(g / μ) · (1 − (1 − η μ)^k)."""
    method = strategy_of(small_config("strategy=fedprox", f"strategy.mu={MU}")).local
    parameter = nn.Parameter(torch.tensor([3.0, -1.0]))
    first, slope, rate = parameter.detach().clone(), torch.tensor([1.0, -4.0]), 0.1
    hooks = method.hooks({"local/near": {"w": first}}, {})
    assert hooks.correct is not None
    for _ in range(3):
        parameter.grad = slope.clone()
        hooks.correct([("w", parameter)])
        with torch.no_grad():
            parameter -= rate * parameter.grad
    expected = first - slope / MU * (1 - (1 - rate * MU) ** 3)
    torch.testing.assert_close(parameter.detach(), expected)
    assert not torch.allclose(parameter.detach(), first - 3 * rate * slope, rtol=0.05), "μ counts"


def test_a_round_equals_autograd_on_the_loss_with_its_term(
    run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    chosen = ("strategy=fedprox", f"strategy.mu={MU}", *SGD, *FLAT, "cohort=1", "rounds=1", "local_steps=3")
    run_small(*chosen)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    (name,) = store.latest()[0].state.ledger
    config, data = small_config(*chosen), PreparedData.open(corpus)
    model = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
    first = {key: value.detach().clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    stream = WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name]))
    for _ in range(3):
        batch = stream.next_batch(config.training.batch_size)
        distance = sum(((value - first[key]) ** 2).sum() for key, value in model.named_parameters())
        optimizer.zero_grad()
        (told_loss(model, batch) + MU / 2 * distance).backward()
        optimizer.step()
    trained = store.latest()[0].load_params()
    for key, value in model.named_parameters():
        torch.testing.assert_close(trained[key], value.detach(), rtol=1e-4, atol=1e-6, msg=key)


def test_without_the_term_it_is_photon_bit_for_bit(run_small: Run, small_config: Make) -> None:
    chosen = ("cohort=2", "rounds=3")
    photon = run_small("strategy=photon", *chosen, name="photon")
    absent = run_small("strategy=fedprox", "strategy.mu=0", *chosen, name="absent")
    present = run_small("strategy=fedprox", "strategy.mu=0.1", *chosen, name="present")
    assert absent["weights_sha256"] == photon["weights_sha256"] != present["weights_sha256"]
    method = strategy_of(small_config("strategy=fedprox", "strategy.mu=0")).local
    assert isinstance(method, Proximal)
    assert method.hooks({}, {}) is NO_HOOKS


# What hooks of a strategy do in two devices is shown by default for SCAFFOLD, which has all of them.
@pytest.mark.slow
def test_two_devices_train_as_one(run_small: Run) -> None:
    chosen = ("strategy=fedprox", f"strategy.mu={MU}", "cohort=2", "rounds=2", *SGD, *FLAT)
    one = run_small(*chosen, name="one")
    # Sharded, which asks most of it; tests/silo/test_group.py has hooks in replicas, too.
    two = run_small(*chosen, "training.processes=2", "training.parallel=fsdp", name="two")
    assert two["perplexity"]["final"] == pytest.approx(one["perplexity"]["final"], rel=1e-5)


def test_it_goes_with_what_photon_goes_with(run_small: Run) -> None:
    synced = run_small(
        "strategy=fedprox",
        "strategy.local_state=sync",
        "strategy.sync={exp_avg: 8, exp_avg_sq: never}",
        "rounds=2",
    )
    assert synced["status"] == "finished"
    bounded = run_small("strategy=fedprox", "privacy=gaussian", "rounds=1", name="bounded")
    assert bounded["status"] == "finished"


@pytest.mark.parametrize("mu", ["-1", ".inf", ".nan"])
def test_a_wrong_weight_is_refused(mu: str, run_small: Run) -> None:
    with pytest.raises(PhotonError, match="mu="):
        run_small("strategy=fedprox", f"strategy.mu={mu}")
