"""One process of those that train together on several devices of a silo.

It builds what one process would (`photon.silo.runtime`) from the text of the configuration. How it gets jobs
is in `photon.training.device_job`, what it shares with the others in `photon.training.collectives`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from photon.config.compose import parse
from photon.data.loader import BatchStream
from photon.files.atomic import atomic_directory, write_text
from photon.models.head import fuse_head
from photon.models.residual import narrow_residual
from photon.models.vocabulary import unpack_vocabulary
from photon.objective.configured import objective_of
from photon.silo import runtime
from photon.strategy.base import strategy_of
from photon.training.collectives import GroupTrainer, gather, join_group, place_model, placed_like
from photon.training.device_job import GroupJob, GroupState, load_job, load_state, save_state, serve
from photon.training.draws import seeded
from photon.training.groups import (
    StateGroups,
    read_optimizer,
    read_params,
    reset_optimizer,
    write_optimizer,
    write_params,
)
from photon.training.loop import TrainResult, build_optimizer
from photon.training.schedule import build_schedule


def main() -> int:
    """Be one process of the group; the environment says which. Returns the exit code."""
    members: list[_Member] = []

    def work(folder: Path) -> None:
        job = load_job(folder)
        if not members:
            members.append(_Member(job))
        members[0].train(job, folder)

    return serve(work)


class _Member:
    """What a process keeps from one job to the next.

    Parameters
    ----------
    job
        The first job; its fixed part holds for all.
    """

    def __init__(self, job: GroupJob) -> None:
        self._device = torch.device("cpu")
        if job.device == "cuda":
            self._device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self._device)
        config = parse(job.config)
        torch.set_float32_matmul_precision(config.training.matmul_precision)
        if config.training.threads is not None:
            # Also on a machine whose program knows nothing of the run.
            share = config.training.threads * config.training.machines // config.training.processes
            torch.set_num_threads(max(1, share))
        join_group(self._device)
        whole = runtime.trained_model(config, job.vocab_size, torch.device("cpu"))
        # Before it is sharded: what looks at whole parameters would leave them whole.
        fuse_head(whole, self._device)
        if config.training.narrows(job.precision):
            narrow_residual(whole)
        self._model = place_model(whole, config.training, job.precision, self._device)
        self._optimizer = build_optimizer(config.optimizer.as_mapping(), self._model)
        self._method, objective = strategy_of(config).local, objective_of(config)
        self._trainer = GroupTrainer(
            self._model,
            self._optimizer,
            build_schedule(config.schedule.as_mapping(), config.total_steps, config.training.batch_size),
            loss=objective.loss,
            count=objective.count,
            training=config.training,
            batch_size=job.batch_size,
            precision=job.precision,
            device=self._device,
            transition=config.transition,
        )

    def train(self, job: GroupJob, folder: Path) -> None:
        """Train from the state in ``folder`` and leave the trained state there."""
        state = load_state(folder)
        self._write(state)
        context = placed_like(self._model, state.context)
        # Hooks change it, and what was loaded is a memory map of the file.
        collected = placed_like(self._model, _copied(state.collected))
        arrays = {name: [_mapped(path) for path in paths] for name, paths in job.arrays.items()}
        stream = BatchStream(arrays, job.stream_seed, job.position, tokens=job.sequence_length)
        rows = None
        if job.rows is not None:
            rows = unpack_vocabulary(job.rows, self._model.config.vocab_size)
        # Dropout must not draw the same mask for the rows of different processes.
        with seeded(job.draw_seed + dist.get_rank(), self._device):
            self._method.begin(self._model, self._optimizer, context)
            result = self._trainer.train(
                stream,
                global_step=job.global_step,
                steps=job.steps,
                rows=rows,
                hooks=self._method.hooks(context, collected),
            )
        self._save(folder, result, collected, stream.position)
        if self._device.type == "cuda":
            # Until the next job the device may serve the process that evaluates.
            torch.cuda.empty_cache()

    def _write(self, state: GroupState) -> None:
        write_params(self._model, placed_like(self._model, {"params": state.params})["params"])
        if state.groups:
            groups = placed_like(self._model, state.groups)
            write_optimizer(self._model, self._optimizer, groups, state.scalars)
        else:
            reset_optimizer(self._optimizer)

    def _save(self, folder: Path, result: TrainResult, collected: StateGroups, position: int) -> None:
        groups, scalars = read_optimizer(self._model, self._optimizer)
        # Gathering takes all processes; only the first keeps what it gets.
        params = gather({"params": read_params(self._model)})["params"]
        state = GroupState(params, gather(groups), scalars, collected=gather(collected))
        if dist.get_rank() != 0:
            return
        with atomic_directory(folder / "trained") as trained:
            save_state(trained, state)
            outcome: dict[str, Any] = {"position": position, "result": dataclasses.asdict(result)}
            write_text(trained / "result.json", json.dumps(outcome))


def _copied(groups: Any) -> StateGroups:
    return {group: {name: t.clone() for name, t in tensors.items()} for group, tensors in groups.items()}


def _mapped(path: Path) -> np.ndarray:
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


if __name__ == "__main__":
    sys.exit(main())
