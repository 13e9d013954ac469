"""Muon for the hidden matrices, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from photon.optim.matrices import EMBEDDINGS, hidden_matrices
from photon.optim.orthogonal import BatchedMuon


class MuonAdamW(torch.optim.Optimizer):
    """Step hidden matrices as `torch.optim.Muon` does and all other parameters with `torch.optim.AdamW`.

    Matrices of one shape are orthogonalised together, in bfloat16 where the device multiplies it.

    Every group of parameters becomes two: its matrices with Muon's settings, and the rest with AdamW's. The
    states are ``momentum_buffer`` for matrices and ``exp_avg``, ``exp_avg_sq`` for the rest; ``step`` counts
    for all.

    Parameters
    ----------
    params
        Named parameters, or groups of them; without names every matrix is Muon's, embeddings included.
    lr
        Learning rate of both.
    momentum, nesterov, weight_decay, adjust_lr_fn
        Of Muon. ``"match_rms_adamw"`` gives its update the size of AdamW's, so that one rate serves both.
    betas, eps
        Of AdamW, which has no weight decay here.
    excluded
        Parts of the names of matrices that are not hidden ones.

    Raises
    ------
    ValueError
        When torch refuses a setting.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw",
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        excluded: Sequence[str] = EMBEDDINGS,
    ) -> None:
        super().__init__(params, {"lr": lr})
        matrices, others = _split(self.param_groups, excluded)
        self._muon = BatchedMuon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._adamw = torch.optim.AdamW(
            others, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=0.0, fused=_can_fuse(others)
        )
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs."""
        return {**super().__getstate__(), "_muon": self._muon, "_adamw": self._adamw}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of another optimizer of the same parameters."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on the gradients that are there; return what ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        # Muon counts nothing; a state that is saved must say for all parameters alike how old it is.
        for group in self._muon.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] = state.get("step", torch.zeros(())) + 1
        return loss

    def _share(self) -> None:
        """Let the two work on this optimizer's groups and state, so that there is one of each."""
        split = len(self._muon.param_groups)
        self._muon.param_groups = self.param_groups[:split]
        self._adamw.param_groups = self.param_groups[split:]
        self._muon.state = self._adamw.state = self.state


def _split(
    groups: Sequence[dict[str, Any]], excluded: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        hidden = hidden_matrices(group, excluded)
        for part, wanted in ((matrices, True), (others, False)):
            chosen: dict[str, Any] = {
                key: [item for item, is_hidden in zip(group[key], hidden, strict=True) if is_hidden == wanted]
                for key in ("params", "param_names")
                if key in group
            }
            part.append({**group, **chosen})
    return matrices, others


def _can_fuse(groups: Sequence[dict[str, Any]]) -> bool:
    parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    return bool(parameters) and all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda") for parameter in parameters
    )
