"""Runs over a transition against local loops written by hand."""

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
from photon.optim import QHAdamW
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import RoundStarted, SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
Make = Callable[..., RunConfig]

#: Large enough that gradients which are zero but for rounding (the key's bias) do not move anything.
EPS = 1e-3
SETTINGS = (
    "optimizer=qhadamw",
    "optimizer.betas=[0.9,0.99]",
    "optimizer.weights=[1.0]",
    f"optimizer.eps={EPS}",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "strategy.weighting=uniform",
    "+transition.optimizer.betas=[0.99,0.98]",
    "+transition.optimizer.weights=[0.8]",
    "+transition.lr_scale=0.5",
)
ZERO_ALL = ("+transition.zero=[exp_avg,exp_avg_sq]", "+transition.reset_step=true")
KEEP_COUNT = ("+transition.zero=[exp_avg]",)


class Silo:
    """A local loop with a state of its own."""

    def __init__(self, name: str, config: RunConfig, data: PreparedData) -> None:
        self.model = build_model(config.model, data.manifest.vocab_size, seed=config.seed)
        self.optimizer = QHAdamW(self.model.parameters(), eps=EPS)
        self.stream = WindowStream([data.windows(name, "train")], stream_seed(config.seed, [name]))
        self.transitioned = False

    def train(self, config: RunConfig, first: int, steps: int) -> None:
        assert config.transition is not None
        after = first >= config.transition.step
        self.optimizer.param_groups[0].update(
            betas=(0.99, 0.98) if after else (0.9, 0.99),
            weights=(0.8,) if after else (1.0,),
            lr=config.model.recipe.learning_rate * (0.5 if after else 1.0),
        )
        if after and not self.transitioned:
            self.transitioned = True
            for state in self.optimizer.state.values():
                for group in config.transition.zero:
                    state[group].zero_()
                if config.transition.reset_step:
                    state["step"].zero_()
        for _ in range(steps):
            self.optimizer.zero_grad()
            causal_loss(self.model, self.stream.next_batch(4)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()


@torch.no_grad()
def by_hand(
    config: RunConfig, corpus: Path, cohorts: list[list[str]], *, averaged: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Train the cohorts in turn; after each round the mean goes to everybody, absent or not."""
    torch.set_num_threads(1)
    data = PreparedData.open(corpus)
    silos = {name: Silo(name, config, data) for name in data.silo_names}
    step = 0
    assert config.transition is not None
    for cohort in cohorts:
        steps = (config.transition.local_steps or 4) if step < config.transition.step else 4
        with torch.enable_grad():
            for name in cohort:
                silos[name].train(config, step, steps)
        step += steps
        for parameters in zip(*(silo.model.parameters() for silo in silos.values()), strict=True):
            own = dict(zip(silos, parameters, strict=True))
            _set(list(parameters), [own[name] for name in cohort])
            states = {name: silos[name].optimizer.state[own[name]] for name in silos}
            for group in averaged:
                mean = torch.stack([states[name][group] for name in cohort]).double().mean(0).float()
                for name in silos:
                    states[name][group] = mean.clone()
            # The count goes with the averages.
            count = min(states[name]["step"] for name in cohort)
            for name in silos if averaged else ():
                states[name]["step"] = count.clone()
        if averaged and step > config.transition.step:
            # What was averaged is of after the transition, for those who were absent as well.
            for silo in silos.values():
                silo.transitioned = True
    return {name: parameter.detach() for name, parameter in silos["alpha"].model.named_parameters()}


def _set(everybody: list[Any], cohort: list[Any]) -> None:
    mean = torch.stack([tensor.detach() for tensor in cohort]).double().mean(0).float()
    for tensor in everybody:
        tensor.detach().copy_(mean)


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return CheckpointStore(folder / "checkpoints").latest()[0].load_params()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("cohort", "strategy", "averaged", "warmup", "at"),
    [
        (3, "photon", (), (), ZERO_ALL),
        (3, "local-adam", ("exp_avg", "exp_avg_sq"), ("+transition.local_steps=2",), KEEP_COUNT),
        (2, "photon", (), (), ZERO_ALL),
        (2, "photon", (), ("+transition.local_steps=2",), KEEP_COUNT),
        (2, "local-adam", ("exp_avg", "exp_avg_sq"), (), KEEP_COUNT),
        (2, "local-adam", ("exp_avg", "exp_avg_sq"), (), ZERO_ALL),
    ],
)
def test_a_run_over_the_transition_equals_loops_by_hand(
    cohort: int,
    warmup: tuple[str, ...],
    strategy: str,
    averaged: tuple[str, ...],
    at: tuple[str, ...],
    run_small: Run,
    small_config: Make,
    corpus: Path,
    tmp_path: Path,
) -> None:
    """With two of three silos a round, one is absent in the first round after the transition."""
    chosen = (
        f"strategy={strategy}",
        *SETTINGS,
        *at,
        *warmup,
        "+transition.step=8",
        f"cohort={cohort}",
        "rounds=7",
    )
    run_small(*chosen)
    config = small_config(*chosen)
    events = read_events(tmp_path / "run" / "events.jsonl")
    cohorts = [event.cohort for event in events if isinstance(event, RoundStarted)]
    expected = by_hand(config, corpus, cohorts, averaged=averaged)
    result = trained(tmp_path / "run")
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.slow
def test_rounds_are_short_before_the_transition_and_average_everything(
    run_small: Run, tmp_path: Path
) -> None:
    run_small(
        "strategy=desloc",
        "rounds=10",
        "+transition.step=4",
        "+transition.local_steps=1",
        "+transition.zero=[exp_avg]",
        "checkpoint.keep=11",
    )
    events = read_events(tmp_path / "run" / "events.jsonl")
    steps = {event.round: event.steps for event in events if isinstance(event, SiloFinished)}
    assert steps == {number: 1 if number <= 4 else 4 for number in range(1, 11)}
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=11)
    averaged = [store.load(number).state.averaged_rounds for number in range(1, 11)]
    assert averaged[:4] == [{"exp_avg": number, "exp_avg_sq": number} for number in range(1, 5)]
    assert averaged[5] == {"exp_avg": 4, "exp_avg_sq": 4}
    assert averaged[6] == {"exp_avg": 7, "exp_avg_sq": 4}
    assert averaged[9] == {"exp_avg": 10, "exp_avg_sq": 10}


@pytest.mark.few(1)
@pytest.mark.parametrize(("strategy", "dies_after"), [("photon", 3), ("desloc", 2)])
def test_a_resume_over_the_transition_ends_with_the_same_bits(
    strategy: str, dies_after: int, run_small: Run
) -> None:
    chosen = (f"strategy={strategy}", *SETTINGS, *ZERO_ALL, "+transition.step=8", "cohort=2", "rounds=5")
    whole = run_small(*chosen, name="whole")
    whole_round = Federation._round

    def dying(self: Federation, checkpoint: Any) -> Any:
        if checkpoint.state.round == dies_after:
            raise RuntimeError("the server dies")
        return whole_round(self, checkpoint)

    with patch.object(Federation, "_round", dying), pytest.raises(RuntimeError, match="dies"):
        run_small(*chosen, name="parts")
    resumed = run_small(*chosen, name="parts", resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow
def test_the_presets_train(run_small: Run) -> None:
    for preset, more in (("mtdao", ()), ("lordo", ("optimizer.rank=4",))):
        summary = run_small(
            f"strategy={preset}", f"transition={preset}", "transition.step=4", "rounds=8", *more, name=preset
        )
        assert summary["perplexity"]["final"] < summary["perplexity"]["initial"]
