"""A process of a group that builds all anew for each job; a folder's name says what its strategy adds.

So tests of what is computed share two processes: starting them takes far longer than their steps.
"""

import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from photon.silo import group_process, runtime
from photon.strategy.base import strategy_of
from photon.training.device_job import load_job, serve
from photon.training.groups import StateGroups
from photon.training.hooks import StepHooks

STRENGTH = 0.7


class Proximal:
    """Pulls the parameters towards those of the context, by a term of the loss."""

    def attach(self, model: nn.Module) -> None:
        pass

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: StateGroups) -> None:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.detach(), context["received"][name])

    def hooks(self, context: StateGroups, collected: StateGroups) -> StepHooks:
        def term(model: nn.Module) -> torch.Tensor:
            away = [
                (one - context["received"][name]).square().sum() for name, one in model.named_parameters()
            ]
            return STRENGTH / 2 * torch.stack(away).sum()

        return StepHooks(term=term)


class Controlled(Proximal):
    """Adds a control of the context to each gradient, and collects the gradients as they were."""

    def hooks(self, context: StateGroups, collected: StateGroups) -> StepHooks:
        def correct(named) -> None:
            for name, parameter in named:
                collected["raw"][name] += parameter.grad
                parameter.grad += context["control"][name]

        return StepHooks(correct=correct)


METHODS: dict[str, type[Proximal]] = {"term": Proximal, "correct": Controlled}


def work(folder: Path) -> None:
    """Do a job as the first job of new processes."""

    def chosen(config: Any) -> Any:
        method = METHODS.get(folder.name)
        return strategy_of(config) if method is None else SimpleNamespace(local=method())

    runtime.strategy_of = group_process.strategy_of = chosen
    job = load_job(folder)
    group_process._Member(job).train(job, folder)


if __name__ == "__main__":
    # They meet once; what they are to train can change.
    group_process.join_group = cache(group_process.join_group)
    sys.exit(serve(work))
