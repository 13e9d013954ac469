"""Silos that are away for some rounds, under averaged states, against loops written by hand.

In each round some silos train. A silo that comes back takes every average that was made since it left, and
with them their step count, by which an optimizer corrects its moments. What nobody has averaged meanwhile it
has kept, as large as it was once it is corrected.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from photon.components import build
from photon.config.schema import RunConfig
from photon.data.loader import WindowStream, stream_seed
from photon.data.prepared import PreparedData
from photon.models.build import build_model
from photon.models.loss import causal_loss
from photon.optim.low_rank import LoRDO
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]
State = dict[str, dict[str, Tensor]]

STEPS = 4
ROUNDS = 9
COMMON = (
    *("cohort=1", f"rounds={ROUNDS}", f"local_steps={STEPS}", "schedule=constant", "schedule.warmup_steps=0"),
    *("strategy.weighting=uniform", "optimizer.eps=1e-3", "federation.admission.norm_factor=null"),
)
BETAS = {"exp_avg": 0.9, "exp_avg_sq": 0.95}
CASES = {
    "local-adam": (("strategy=local-adam",), dict.fromkeys(("exp_avg", "exp_avg_sq"), 1), BETAS),
    "desloc": (
        ("strategy=desloc", f"strategy.sync={{exp_avg: {2 * STEPS}, exp_avg_sq: {3 * STEPS}}}"),
        {"exp_avg": 2, "exp_avg_sq": 3},
        BETAS,
    ),
    "mtdao": (
        ("strategy=mtdao",),
        dict.fromkeys(("exp_avg", "exp_avg_sq"), 1),
        {"exp_avg": 0.999, "exp_avg_sq": 0.999},
    ),
    "lordo": (
        ("strategy=lordo", "optimizer.rank=4"),
        dict.fromkeys(("exp_avg", "exp_avg_sq", "basis"), 1),
        {"exp_avg": 0.999, "exp_avg_sq": 0.999},
    ),
}


@dataclass
class Silo:
    """What one has kept: moments, their count of steps, and when it last took part."""

    stream: WindowStream
    state: State = field(default_factory=dict)
    step: float = 0.0
    last: int = 0


@dataclass
class Average:
    tensors: dict[str, Tensor]
    step: float
    round: int


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, group: str) -> dict[str, Tensor]:
    return {
        name: optimizer.state[parameter][group].clone()
        for name, parameter in model.named_parameters()
        if group in optimizer.state[parameter]
    }


def write_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State, step: float) -> None:
    for name, parameter in model.named_parameters():
        own = {group: tensors[name].clone() for group, tensors in state.items() if name in tensors}
        if own:
            optimizer.state[parameter] = {"step": torch.tensor(step), **own}


def by_hand(
    config: RunConfig, data: PreparedData, cohorts: list[list[str]], periods: dict[str, int], betas: Any
) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    model = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
    silos = {
        name: Silo(WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name])))
        for name in data.silo_names
    }
    x = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before: dict[str, Tensor] | None = None
    averages: dict[str, Average] = {}
    for number, cohort in enumerate(cohorts, start=1):
        trained = []
        for name in cohort:
            silo = silos[name]
            due = {g: average for g, average in averages.items() if silo.last <= average.round}
            if silo.last == 0 and len(due) < len(periods):
                due = {}
            if due:
                step = next(iter(due.values())).step
                kept = {
                    group: {
                        key: m * (1 - betas[group] ** step) / (1 - betas[group] ** silo.step)
                        for key, m in tensors.items()
                    }
                    for group, tensors in silo.state.items()
                    if group not in due
                }
                silo.state = kept | {group: average.tensors for group, average in due.items()}
                silo.step = step
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.copy_(x[key])
            optimizer = build(config.optimizer.as_mapping(), "optimizer", list(model.named_parameters()))
            write_state(model, optimizer, silo.state, silo.step)
            if isinstance(optimizer, LoRDO) and silo.state and before is not None:
                optimizer.refresh({p: before[key] - p.detach() for key, p in model.named_parameters()})
            for _ in range(STEPS):
                optimizer.zero_grad()
                causal_loss(model, silo.stream.next_batch(4)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            silo.state = {group: state_of(model, optimizer, group) for group in periods}
            silo.step += STEPS
            silo.last = number
            trained.append(({key: p.detach().clone() for key, p in model.named_parameters()}, silo))
        before = x
        x = {key: torch.stack([params[key] for params, _ in trained]).mean(0) for key in x}
        count = sorted(silo.step for _, silo in trained)[(len(trained) - 1) // 2]
        for group, period in periods.items():
            if number % period == 0:
                states = [silo.state[group] for _, silo in trained]
                mean = {key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]}
                averages[group] = Average(mean, count, number)
        # One step count goes with all averages: that of the last round.
        for average in averages.values():
            average.step = count
    return x


@pytest.mark.few(2)
@pytest.mark.parametrize("cohort", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_silo_that_comes_back_trains_with_the_step_of_the_averages(
    case: str, cohort: int, run_small: Run, small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    overrides, periods, betas = CASES[case]
    chosen = (*overrides, *COMMON, f"cohort={cohort}")
    run_small(*chosen)
    events = read_events(tmp_path / "run" / "events.jsonl")
    cohorts = [
        [e.silo for e in events if isinstance(e, SiloFinished) and e.round == number]
        for number in range(1, ROUNDS + 1)
    ]
    away = [set(one) - set(other) for one, other in itertools.pairwise(cohorts)]
    assert any(away), "nobody was ever away"
    config = small_config(*chosen)
    expected = by_hand(config, PreparedData.open(corpus), cohorts, periods, betas)
    trained = CheckpointStore(tmp_path / "run" / "checkpoints").latest()[0].load_params()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
