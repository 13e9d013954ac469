"""Model FLOPs: what the model's mathematics asks for, whatever the machine did on top."""

from torch import nn
from transformers import PreTrainedModel

from photon.models.abbie import body_of
from photon.models.build import parameter_count
from photon.models.experts import active_parameter_count, experts_of


def flops_per_token(parameters: int, layers: int, width: int, sequence_length: int) -> float:
    """Return the floating-point operations of training on one token, forward and backward.

    As LLM Foundry counts them, per sequence of T tokens ``3 (2 N T + 4 L d T^2)``: two operations per
    parameter and token, two matrix products of attention over the whole square (no credit for the causal
    half), and a backward pass of twice the forward. Recomputed activations do not count.

    Parameters
    ----------
    parameters
        N: a tied embedding once (as the output projection), positions included; of routed experts those that
        a token passes through; a block that is applied several times as often as that.
    layers, width
        L, the blocks that a token passes through, and d of the transformer.
    sequence_length
        T, tokens per sequence.
    """
    return 3.0 * (2 * parameters + 4 * layers * width * sequence_length)


def model_flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Return :func:`flops_per_token` of a model; meta tensors will do.

    Frozen parameters have no gradient, which is a third of what they would cost.
    """
    config = model.config
    experts = experts_of(config)
    parameters = parameter_count(model) if experts is None else active_parameter_count(model, experts)
    # A model of several parts has these for each of them: its attention is then left out.
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    body = body_of(model)
    again = config.passes - 1 if body else 0
    parameters += again * sum(map(parameter_count, body))
    layers += again * len(body)
    frozen = _frozen_count(model) + again * sum(map(_frozen_count, body))
    return flops_per_token(parameters, layers, width, sequence_length) - 2.0 * frozen


def _frozen_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


def mfu(tokens_per_second: float, flops_per_token: float, roofline: float | None) -> float | None:
    """Return the model FLOPs utilisation in [0, 1], or None where the roofline is not known.

    Parameters
    ----------
    tokens_per_second
        Tokens trained per second on the hardware that ``roofline`` describes.
    flops_per_token
        What :func:`flops_per_token` returns.
    roofline
        Peak in FLOP/s.
    """
    return None if not roofline else tokens_per_second * flops_per_token / roofline
