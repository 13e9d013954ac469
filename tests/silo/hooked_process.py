"""A process of a group whose strategy adds to the steps what its first argument names."""

import sys
from types import SimpleNamespace

import torch
from torch import nn

from photon.silo import group_process, runtime
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

if __name__ == "__main__":
    strategy = SimpleNamespace(local=METHODS[sys.argv[1]]())
    runtime.strategy_of = group_process.strategy_of = lambda config: strategy
    sys.exit(group_process.main())
