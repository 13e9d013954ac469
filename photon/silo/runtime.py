"""The runtime: model, optimizer and local loop, and the probe for the size of its micro-batches.

It is built once per process and lent to every silo that the process serves; nothing in it is a silo's own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from photon.config.compose import parse
from photon.config.schema import Component, RunConfig
from photon.models.attention import use_attention
from photon.models.head import fuse_head
from photon.models.residual import narrow_residual
from photon.objective.configured import model_of, objective_of
from photon.strategy.base import strategy_of
from photon.training.batch_probe import find_micro_batch_size
from photon.training.draws import draw_seed, seeded
from photon.training.groups import read_params, reset_optimizer, write_params
from photon.training.hardware import DTYPES, resolve_device, set_up_torch
from photon.training.loop import LocalTrainer, build_optimizer, enable_activation_checkpointing
from photon.training.precision import Precision, resolve_precision
from photon.training.schedule import Schedule, build_schedule, resolve_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Runtime:
    """What a process builds once: model, optimizer and loop for one configuration."""

    model: "PreTrainedModel"
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    precision: Precision
    trainers: dict[tuple[int, int | str | None], LocalTrainer]

    def seeded(self, seed: int, server_round: int, silo: str, purpose: str) -> AbstractContextManager[None]:
        """Let a block draw from a seed of its own, as of `draw_seed`."""
        return seeded(draw_seed(seed, server_round, silo, purpose), self.device)


def runtime_of(config: RunConfig, vocab_size: int) -> Runtime:
    """Return model, optimizer and loop for a configuration; the last one is kept."""
    return _runtime(_as_built(config.text), vocab_size)


@lru_cache(maxsize=16)
def as_trained(config_text: str) -> str:
    """Drop in what sub-federations of one run differ: they train the same model on the same runtime."""
    config = parse(config_text)
    federation = config.federation.model_copy(
        update={"tree": None, "parent": None, "deadline": None, "quorum": 1, "silos": None}
    )
    schedule = resolve_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    own = {
        "run_dir": None,
        "cohort": None,
        "rounds": 1 if config.transition is None else config.rounds,
        "outer": Component.model_validate({"_target_": "torch.optim.SGD", "lr": 1.0}),
        "schedule": Component.model_validate(schedule),
        "federation": federation,
    }
    return config.model_copy(update=own).text


@lru_cache(maxsize=16)
def _as_built(config_text: str) -> str:
    """Drop in what loops over one model differ: a run's first round probes for what the others are told."""
    config = parse(as_trained(config_text))
    training = config.training.model_copy(update={"micro_batch_size": None})
    return config.model_copy(update={"training": training}).text


def trained_model(config: RunConfig, vocab_size: int, device: torch.device) -> "PreTrainedModel":
    """Build the model, with what objective and strategy change about it."""
    model = model_of(config, vocab_size, device)
    if config.training.attention == "products":
        use_attention(model, "products")
    strategy_of(config).local.attach(model)
    if config.training.activation_checkpointing:
        enable_activation_checkpointing(model)
    return model


@lru_cache(maxsize=1)
def _runtime(config_text: str, vocab_size: int) -> Runtime:
    config = parse(config_text)
    set_up_torch(config.training, config.federation.silos_in_parallel)
    device = resolve_device(config.training.device)
    model = trained_model(config, vocab_size, device)
    fuse_head(model, device)
    precision = resolve_precision(config.training.precision, device)
    if config.training.narrows(precision):
        narrow_residual(model)
    optimizer = build_optimizer(config.optimizer.as_mapping(), model)
    schedule = build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size)
    return Runtime(model, optimizer, schedule, device, precision, {})


def trainer(runtime: Runtime, config: RunConfig, batch_size: int) -> LocalTrainer:
    """Return the local loop for a batch size; it is made, and ``auto`` probed for, on first use."""
    asked = config.training.micro_batch_size
    if (batch_size, asked) not in runtime.trainers:
        micro = _probe_micro_batch(runtime, config, batch_size) if asked == "auto" else asked
        objective = objective_of(config)
        runtime.trainers[batch_size, asked] = LocalTrainer(
            runtime.model,
            runtime.optimizer,
            runtime.schedule,
            loss=objective.loss,
            count=objective.count,
            batch_size=batch_size,
            micro_batch_size=micro,
            clip_norm=config.training.clip_norm,
            precision=runtime.precision,
            device=runtime.device,
            compile_mode=config.training.compile_mode if config.training.compile else None,
            transition=config.transition,
        )
    return runtime.trainers[batch_size, asked]


def _probe_micro_batch(runtime: Runtime, config: RunConfig, batch_size: int) -> int:
    """Probe beside all that training holds: gradients, as from the second micro-batch on, and local state."""
    for parameter in runtime.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    fresh = not runtime.optimizer.state
    if fresh:
        _allocate_optimizer_state(runtime)
    try:
        return find_micro_batch_size(_probe_step(runtime, config), batch_size)
    finally:
        runtime.optimizer.zero_grad(set_to_none=True)
        if fresh:
            reset_optimizer(runtime.optimizer)


def _allocate_optimizer_state(runtime: Runtime) -> None:
    """Take a local step and undo what it does to the parameters: only the optimizer knows what it keeps."""
    before = {name: tensor.to("cpu", copy=True) for name, tensor in read_params(runtime.model).items()}
    runtime.optimizer.step()
    write_params(runtime.model, before)


def _probe_step(runtime: Runtime, config: RunConfig) -> Callable[[int], None]:
    """Return a forward and backward pass of a given number of sequences, for the batch probe."""
    objective, rows = objective_of(config), None
    if strategy_of(config).local.restricts_rows:
        # A softmax over some rows takes more memory than one over all.
        rows = torch.ones(runtime.model.config.vocab_size, dtype=torch.bool, device=runtime.device)

    def step(sequences: int) -> None:
        sample = objective.sample(sequences, config.model.sequence_length)
        batch = {name: array.to(runtime.device) for name, array in sample.items()}
        runtime.model.train()
        with torch.autocast(
            runtime.device.type, dtype=DTYPES[runtime.precision], enabled=runtime.precision != "fp32"
        ):
            loss = objective.loss(runtime.model, batch, rows).value
        loss.backward()

    return step
