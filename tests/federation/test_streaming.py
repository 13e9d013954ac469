"""Whole runs that sync fragments, against local loops written by hand."""

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
from photon.federation.federation import Federation
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.state.checkpoint import CheckpointStore
from photon.strategy.streaming import split_parameters
from photon.telemetry.events import RoundStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]

#: Large enough that gradients which are zero but for rounding (the key's bias) do not move anything.
EPS = 1e-3
STREAMING = (
    "strategy=streaming-diloco",
    "strategy.fragments=3",
    "model.architecture.n_layer=2",
    f"optimizer.eps={EPS}",
    "schedule=constant",
    "schedule.warmup_steps=0",
)


def by_hand(
    config: RunConfig, corpus: Path, cohorts: list[list[str]], *, fragments: int, mixing: float
) -> dict[str, torch.Tensor]:
    """Local AdamW loops; one fragment a round goes through Nesterov momentum of its own."""
    torch.set_num_threads(1)
    data = PreparedData.open(corpus)
    models, optimizers, streams = {}, {}, {}
    for name in data.silo_names:
        models[name] = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
        optimizers[name] = torch.optim.AdamW(
            models[name].parameters(),
            lr=config.model.recipe.learning_rate,
            betas=(0.9, 0.95),
            eps=EPS,
            weight_decay=0.0,
            fused=True,
        )
        streams[name] = WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name]))
    own = {name: dict(models[name].named_parameters()) for name in models}
    world = {key: value.detach().clone() for key, value in own["alpha"].items()}
    parts = split_parameters({key: value.shape for key, value in world.items()}, fragments, "strided")
    velocity = {key: torch.zeros_like(value) for key, value in world.items()}
    synced: list[str] = []
    for number, cohort in enumerate(cohorts, 1):
        for name in cohort:
            with torch.no_grad():
                if number == 1 or name not in cohorts[number - 2]:
                    for key, value in own[name].items():
                        value.copy_(world[key])
                else:
                    for key in synced:
                        own[name][key].copy_(mixing * world[key] + (1 - mixing) * own[name][key])
            for _ in range(config.local_steps):
                optimizers[name].zero_grad()
                causal_loss(models[name], streams[name].next_batch(4)).backward()
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                optimizers[name].step()
        synced = list(world) if number == config.rounds else parts[(number - 1) % fragments]
        for key in synced:
            mean = torch.stack([own[name][key].detach() for name in cohort]).double().mean(0).float()
            delta = world[key] - mean
            velocity[key] = 0.9 * velocity[key] + delta
            world[key] = world[key] - 0.7 * (delta + 0.9 * velocity[key])
    return world


@pytest.mark.few(1)
@pytest.mark.parametrize(("cohort", "mixing"), [(3, 1.0), (2, 0.5)])
def test_a_run_equals_local_loops_that_sync_fragments_by_hand(
    cohort: int, mixing: float, run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    chosen = (*STREAMING, f"strategy.mixing={mixing}", f"cohort={cohort}", "rounds=8")
    run_small(*chosen)
    events = read_events(tmp_path / "run" / "events.jsonl")
    cohorts = [event.cohort for event in events if isinstance(event, RoundStarted)]
    expected = by_hand(small_config(*chosen), corpus, cohorts, fragments=3, mixing=mixing)
    trained = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=5e-5, atol=5e-6, msg=name)


def test_one_fragment_is_diloco_bit_for_bit(run_small: Run) -> None:
    chosen = ("cohort=2", "rounds=4")
    diloco = run_small("strategy=diloco", *chosen, name="diloco")
    streaming = run_small("strategy=streaming-diloco", "strategy.fragments=1", *chosen, name="streaming")
    assert streaming["weights_sha256"] == diloco["weights_sha256"]


def test_a_round_sends_a_fragment_and_a_newcomer_gets_everything(
    run_small: Run, small_config: Make, tmp_path: Path
) -> None:
    run_small(*STREAMING, "cohort=2", "rounds=7", "link.keep_received=false")
    params = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    shapes = {name: tensor.shape for name, tensor in params.items()}
    parts = split_parameters(shapes, 3, "strided")
    whole = sum(tensor.nbytes for tensor in params.values())
    sizes = [sum(params[name].nbytes for name in part) for part in parts]
    assert max(sizes) < 1.5 * whole / 3
    before: list[str] = []
    cohort: list[str] = []
    events = read_events(tmp_path / "run" / "events.jsonl")
    seen = set()
    for event in events:
        if isinstance(event, RoundStarted):
            before, cohort = cohort, event.cohort
        if isinstance(event, SiloFinished):
            up = whole if event.round == 7 else sizes[(event.round - 1) % 3]
            down = sizes[(event.round - 2) % 3] if event.silo in before else whole
            assert event.group_bytes_up == {"params": up}
            assert event.group_bytes_down == {"params": down}
            seen.add((event.silo in before, event.round > 1))
    assert seen == {(False, False), (False, True), (True, True)}


@pytest.mark.few(1)
@pytest.mark.parametrize("outer", ["diloco", "fedadam"])
def test_a_resumed_run_ends_with_the_same_bits(outer: str, run_small: Run) -> None:
    """Adam counts the steps of each fragment by itself."""
    chosen = (*STREAMING, f"outer={outer}", "cohort=2", "rounds=6")
    whole = run_small(*chosen, name="whole")
    whole_round = Federation._round

    def dying(self: Federation, checkpoint: Any) -> Any:
        if checkpoint.state.round == 4:
            raise RuntimeError("the server dies")
        return whole_round(self, checkpoint)

    with patch.object(Federation, "_round", dying), pytest.raises(RuntimeError, match="dies"):
        run_small(*chosen, name="parts")
    resumed = run_small(*chosen, name="parts", resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_a_silo_that_has_lost_its_parameters_fails_once_and_then_receives_all(
    run_small: Run, tmp_path: Path
) -> None:
    whole_round = Federation._round

    def losing(self: Federation, checkpoint: Any) -> Any:
        if checkpoint.state.round == 2:
            shutil.rmtree(tmp_path / "run" / "silos" / "beta")
        return whole_round(self, checkpoint)

    with patch.object(Federation, "_round", losing):
        run_small(*STREAMING, "cohort=3", "rounds=5")
    events = read_events(tmp_path / "run" / "events.jsonl")
    failures = [(event.round, event.silo) for event in events if isinstance(event, SiloFailed)]
    assert failures == [(3, "beta")]
    finished = [event.round for event in events if isinstance(event, SiloFinished) and event.silo == "beta"]
    assert finished == [1, 2, 4, 5]
