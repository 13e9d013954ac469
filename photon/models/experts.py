"""Mixtures of experts, as `transformers` configures and names them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

# Each model family has its own words.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k_experts")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class Experts:
    """The routed experts of each layer that has some.

    Attributes
    ----------
    total, active
        How many there are, and how many of them a token passes through.
    coefficient
        Weight of the loss that keeps the router from choosing few of them; 0: none.
    """

    total: int
    active: int
    coefficient: float


def experts_of(config: Any) -> Experts | None:
    """Return the experts that a model's configuration describes; None: the model is dense."""
    # DBRX alone has them in a section of their own.
    for section in (config, getattr(config, "ffn_config", None)):
        total, active = _first(section, _EXPERTS), _first(section, _ACTIVE)
        if total > 1 and active:
            return Experts(int(total), int(active), float(_first(section, _COEFFICIENTS)))
    return None


def active_parameter_count(model: nn.Module, experts: Experts) -> int:
    """Return the parameters that one token passes through: of the routed experts a share, of all else all."""
    routed = everything = 0
    for name, parameter in model.named_parameters():
        everything += parameter.numel()
        # Some families keep them in a matrix for each expert without saying so in the name.
        stacked = parameter.ndim == 3 and parameter.shape[0] == experts.total
        if stacked or "experts" in name.split("."):
            routed += parameter.numel()
    return everything - routed + routed * experts.active // experts.total


def _first(section: Any, names: tuple[str, ...]) -> Any:
    """Return the first of some fields that is set, or 0."""
    return next((value for name in names if (value := getattr(section, name, None))), 0)
