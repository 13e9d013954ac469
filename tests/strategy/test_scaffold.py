"""SCAFFOLD against a loop written by hand in float64, and what becomes of its control variates."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.models.build import build_model
from photon.state.checkpoint import CheckpointStore
from photon.state.silo import SiloStore
from photon.strategy.local import Start
from photon.strategy.scaffold import CONTROL, OWN_CONTROL, Controlled
from photon.telemetry.events import RoundStarted, SiloFinished
from photon.telemetry.log import read_events
from tests.told import told_loss

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]
Tensors = dict[str, torch.Tensor]
SCAFFOLD = (
    "strategy=scaffold",
    "optimizer=sgd",
    "optimizer.lr=0.3",
    "optimizer.momentum=0",
    "training.clip_norm=null",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "local_steps=3",
)


def by_hand(config: RunConfig, corpus: Path, cohorts: list[list[str]]) -> tuple[Tensors, Tensors]:
    """Option II of the paper, from parameters: c_k⁺ = c_k − c + (x − y) / (K η), in float64."""
    data, rate, steps = PreparedData.open(corpus), 0.3, config.local_steps
    model = build_model(config.model, data.manifest.vocab_size, seed=config.seed).double()
    named = dict(model.named_parameters())
    world = {key: value.detach().clone() for key, value in named.items()}
    control = {key: torch.zeros_like(value) for key, value in world.items()}
    own = {name: dict(control) for name in data.silo_names}
    streams = {
        name: WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name])) for name in own
    }
    keys = list(world)
    for cohort in cohorts:
        moved = {key: torch.zeros_like(value) for key, value in world.items()}
        changed = {key: torch.zeros_like(value) for key, value in world.items()}
        for name in cohort:
            with torch.no_grad():
                for key, value in named.items():
                    value.copy_(world[key])
            for _ in range(steps):
                batch = streams[name].next_batch(config.training.batch_size)
                model.zero_grad()
                told_loss(model, batch).backward()
                with torch.no_grad():
                    for key, value in named.items():
                        value.sub_(rate * (value.grad - own[name][key] + control[key]))
            for key, value in named.items():
                difference = world[key] - value.detach()
                new = own[name][key] - control[key] + difference / (steps * rate)
                changed[key] += (new - own[name][key]) / len(cohort)
                moved[key] -= difference / len(cohort)
                own[name] = {**own[name], key: new}
        for key in keys:
            world[key] = world[key] + moved[key]
            control[key] = control[key] + len(cohort) / len(own) * changed[key]
    mean = {key: torch.stack([own[name][key] for name in own]).mean(0) for key in keys}
    for key, value in control.items():
        torch.testing.assert_close(value, mean[key])
    return world, control


def cohorts_of(run_dir: Path) -> list[list[str]]:
    return [e.cohort for e in read_events(run_dir / "events.jsonl") if isinstance(e, RoundStarted)]


def own_controls(run_dir: Path) -> dict[str, Tensors]:
    """Return each silo's control variate after the last round that counted for it."""
    state = CheckpointStore(run_dir / "checkpoints").latest()[0].state
    found = {}
    for name, entry in state.ledger.items():
        kept = SiloStore(run_dir / "silos" / name, keep=3).load(state.run_id, entry.last_round)
        assert kept is not None
        found[name] = kept.groups[OWN_CONTROL]
    return found


def test_five_rounds_equal_a_loop_in_float64(
    run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    chosen = (*SCAFFOLD, "cohort=2", "rounds=5", "checkpoint.keep=5")
    run_small(*chosen)
    cohorts = cohorts_of(tmp_path / "run")
    assert len({tuple(cohort) for cohort in cohorts}) > 1, "somebody is away"
    world, control = by_hand(small_config(*chosen), corpus, cohorts)
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0]
    params, kept = checkpoint.load_params(), checkpoint.load_kept()[CONTROL]
    for key in world:
        torch.testing.assert_close(params[key].double(), world[key], rtol=1e-5, atol=1e-5, msg=key)
        torch.testing.assert_close(kept[key].double(), control[key], rtol=1e-5, atol=1e-5, msg=key)
    # Without the correction it would be somewhere else.
    run_small("strategy=photon", "strategy.weighting=uniform", *chosen[1:], name="plain")
    plain = CheckpointStore(tmp_path / "plain" / "checkpoints").latest()[0].load_params()
    assert max((plain[key].double() - world[key]).abs().max() for key in world) > 1e-3


def test_the_servers_variate_is_the_mean_under_adamw_clipping_and_a_schedule(
    run_small: Run, tmp_path: Path
) -> None:
    """And that of raw gradients: tiny steps see the gradient of one point, whatever AdamW makes of it."""
    run_small("strategy=scaffold", "cohort=null", "rounds=2", "optimizer.weight_decay=0.1")
    kept = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_kept()[CONTROL]
    own = own_controls(tmp_path / "run")
    assert len(own) == 3
    for key, value in kept.items():
        mean = torch.stack([controls[key] for controls in own.values()]).mean(0)
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-6)
    norms = [
        event for event in read_events(tmp_path / "run" / "events.jsonl") if isinstance(event, SiloFinished)
    ]
    largest = max(event.gradient_norm for event in norms)
    total = torch.sqrt(sum((value.double() ** 2).sum() for value in own["alpha"].values()))
    assert 0.1 * largest < total < 2 * largest, "of a gradient's size, not of an AdamW step over η"


def test_a_silo_that_was_killed_goes_back_to_its_last_accepted_variate(
    run_small: Run, tmp_path: Path
) -> None:
    chosen = (*SCAFFOLD, "cohort=2", "rounds=4", "checkpoint.keep=4")
    whole = run_small(*chosen, name="whole")
    run_small(*chosen, name="half")
    for number in (3, 4):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / f"round-{number:06d}")
    resumed = run_small(*chosen, name="half", resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_lost_variate_is_replaced_by_the_servers(run_small: Run, tmp_path: Path) -> None:
    """Its steps of that round are Photon's, so the round is worth no less than without control variates."""
    chosen = (*SCAFFOLD, "cohort=null", "rounds=3")
    run_small(*chosen)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "round-000003")
    shutil.rmtree(tmp_path / "run" / "silos" / "beta")
    control = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_kept()[CONTROL]
    corrections: dict[str, Start] = {}

    def start(self, received, kept, request, data):
        begun = original(self, received, kept, request, data)
        corrections[request.silo] = begun
        return begun

    original = Controlled.start
    with patch.object(Controlled, "start", start):
        assert run_small(*chosen, resume=True)["status"] == "finished"
    for name, tensor in corrections["beta"].stays[OWN_CONTROL].items():
        assert torch.equal(tensor, control[name])
    assert any(map(torch.any, control.values()))
    assert not any(map(torch.any, corrections["beta"].context["local/correction"].values()))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy=gaussian"], "control variates leave without noise or masks"),
        (["privacy=secure", "link.uplink_payload=update"], "control variates leave without noise or masks"),
        (["link.states=[{_target_: photon.link.codecs.Cast, dtype: bfloat16}]"], "link.states"),
        (["strategy.local_state=sync"], "local_state"),
        (["federation.tree={north: [alpha, beta]}", "cohort=null"], "no control variate of its own"),
    ],
)
def test_what_it_does_not_go_with_is_refused(overrides: list[str], message: str, run_small: Run) -> None:
    with pytest.raises(PhotonError, match=message):
        run_small("strategy=scaffold", *overrides)


@pytest.mark.slow
def test_two_devices_train_as_one(run_small: Run) -> None:
    chosen = (*SCAFFOLD, "cohort=2", "rounds=3")
    one = run_small(*chosen, name="one")
    # Sharded, which asks most of it; tests/silo/test_group.py has hooks in replicas, too.
    two = run_small(*chosen, "training.processes=2", "training.parallel=fsdp", name="two")
    assert two["perplexity"]["final"] == pytest.approx(one["perplexity"]["final"], rel=1e-5)
