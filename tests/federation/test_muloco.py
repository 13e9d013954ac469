"""A run of strategy=muloco against loops written by hand: Muon in the silos, Nesterov momentum outside."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import RoundStarted, SiloFinished
from photon.telemetry.log import read_events

#: Large enough that gradients which are zero but for rounding (the key's bias) do not move anything.
EPS = 1e-3
MULOCO = (
    "strategy=muloco",
    "model.architecture.n_layer=2",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "rounds=4",
    "cohort=2",
    f"optimizer.eps={EPS}",
)
EMBEDDINGS = ("wte", "wpe", "lm_head")


def test_a_run_equals_local_loops_by_hand(
    run_small: Callable[..., dict[str, Any]],
    small_config: Callable[..., RunConfig],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As torch's own, on a machine without bfloat16, too.
    monkeypatch.setattr("photon.optim.orthogonal.product_format", lambda device: torch.bfloat16)
    run_small(*MULOCO)
    config = small_config(*MULOCO)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    cohorts = [event.cohort for event in events if isinstance(event, RoundStarted)]
    trained = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    torch.set_num_threads(1)
    data = PreparedData.open(corpus)
    rate = 2 * config.model.recipe.learning_rate
    models, optimizers, streams = {}, {}, {}
    for name in data.silo_names:
        models[name] = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
        named = dict(models[name].named_parameters())
        matrices = [
            tensor
            for key, tensor in named.items()
            if tensor.dim() == 2 and not any(part in key for part in EMBEDDINGS)
        ]
        others = [tensor for tensor in named.values() if all(tensor is not one for one in matrices)]
        optimizers[name] = (
            torch.optim.Muon(
                matrices,
                lr=rate,
                weight_decay=0.0,
                momentum=0.9,
                nesterov=True,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.999), eps=EPS, weight_decay=0.0, fused=True),
        )
        streams[name] = WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name]))
    first = dict(models["alpha"].named_parameters())
    world = {key: value.detach().clone() for key, value in first.items()}
    began = {key: value.clone() for key, value in world.items()}
    velocity = {key: torch.zeros_like(value) for key, value in world.items()}
    for cohort in cohorts:
        for name in cohort:
            own = dict(models[name].named_parameters())
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(world[key])
            for _ in range(config.local_steps):
                models[name].zero_grad()
                causal_loss(models[name], streams[name].next_batch(4)).backward()
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
                for optimizer in optimizers[name]:
                    optimizer.step()
        for key, before in world.items():
            silos = [dict(models[name].named_parameters())[key].detach() for name in cohort]
            delta = before - torch.stack(silos).double().mean(0).float()
            velocity[key] = 0.5 * velocity[key] + delta
            world[key] = before - 0.7 * (delta + 0.5 * velocity[key])
    for key, tensor in world.items():
        # Muon orthogonalises in bfloat16, where the last bit of a mean may be another.
        share = 0.05 if tensor.dim() == 2 and not any(part in key for part in EMBEDDINGS) else 0.002
        assert (trained[key] - tensor).norm() <= share * (tensor - began[key]).norm(), key


def test_two_bits_take_two_bits(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = run_small("strategy=muloco", "link=two-bit", "cohort=2")
    assert summary["failures"] == 0
    assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]
    sent = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFinished)]
    for event in sent:
        # Two bits a value, two sizes a tensor, and a byte that is not full.
        assert event.group_bytes_up["params"] < summary["parameters"] / 4 + 16 * 64


def test_averaged_silos_share_every_state_of_both_optimizers(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    summary = run_small("strategy=muloco-averaged", "cohort=2")
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0]
    params = checkpoint.load_params()
    hidden = {name for name, t in params.items() if t.dim() == 2 and not any(e in name for e in EMBEDDINGS)}
    shared = {group: set(checkpoint.load_averaged(group)) for group in checkpoint.state.averaged_rounds}
    others = set(params) - hidden
    assert shared == {"momentum_buffer": hidden, "exp_avg": others, "exp_avg_sq": others}
    assert set(checkpoint.state.averaged_rounds.values()) == {summary["rounds"]}
    assert checkpoint.load_outer().keys() == {"momentum_buffer"}, "and the outer step has its momentum"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_local_optimizer_and_its_rate_can_be_others(
    optimizer: str, small_config: Callable[..., RunConfig]
) -> None:
    config = small_config("strategy=muloco", f"optimizer={optimizer}")
    assert config.optimizer.as_mapping()["lr"] == config.model.recipe.learning_rate
    own = small_config("strategy=muloco", "model.recipe.learning_rate=0.003")
    assert own.optimizer.as_mapping()["lr"] == pytest.approx(0.006)
    assert small_config("strategy=muloco", "optimizer.lr=0.01").optimizer.as_mapping()["lr"] == 0.01
