"""How a silo's machine computes a training step, where the configuration leaves that to it.

On a CPU the model's own step is timed: forward and backward pass of its loss, in fp32, in bf16, and in bf16
with attention by plain products. What is found is remembered by the machine, said by the silo, kept by the
server and told back, so that a run goes on as it began.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from photon.config.compose import parse
from photon.config.schema import ModelSection, RunConfig
from photon.errors import PhotonError
from photon.models.attention import Attention, takes_products, use_attention
from photon.models.flops import model_flops_per_token
from photon.objective.configured import model_of, objective_of
from photon.silo.runtime import trained_model
from photon.strategy.base import strategy_of
from photon.training.hardware import resolve_device, set_up_torch
from photon.training.precision import resolve_precision
from photon.training.step_probe import Gains, measure_gains, remembered_gains

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is timed beside a step in fp32.
BF16, BF16_PRODUCTS = "bf16", "bf16, products"
#: How much faster products must be than torch's operation to be chosen.
_FASTER = 1.05
#: FLOPs of a timed pass: as many sequences of the micro-batch as that allows, and one at least.
_PASS_FLOPS = 5e9


def as_decided(config: RunConfig, vocab_size: int) -> RunConfig:
    """Return a configuration with precision and attention as they are chosen here, where it leaves them open.

    Parameters
    ----------
    config
        The run's configuration as it is carried out here; what the silo has chosen earlier stands in it.
    vocab_size
        Number of entries of the tokenizer.
    """
    if "auto" not in (config.training.precision, config.training.attention):
        return config
    return _decided(config.text, vocab_size)


def measured_gain(config: RunConfig, vocab_size: int) -> float:
    """Return how much faster the model's step is in bf16 than in fp32 on this machine's CPU."""
    gains = _gains(config, vocab_size)
    return max(gains[BF16], gains.get(BF16_PRODUCTS, 0.0))


@lru_cache(maxsize=16)
def _decided(config_text: str, vocab_size: int) -> RunConfig:
    config = parse(config_text)
    training, device = config.training, resolve_device(config.training.device)
    # An objective that takes no steps has none to time.
    gain = (lambda: measured_gain(config, vocab_size)) if objective_of(config).trains else None
    precision = resolve_precision(training.precision, device, gain)
    attention: Literal["auto"] | Attention = training.attention
    if attention == "auto":
        attention = "sdpa"
        # In fp32 torch's operation was the faster one at every size that was tried.
        if precision == "bf16" and device.type == "cpu" and gain is not None:
            gains = _gains(config, vocab_size)
            attention = "products" if gains.get(BF16_PRODUCTS, 0.0) >= _FASTER * gains[BF16] else "sdpa"
    training = training.model_copy(update={"precision": precision, "attention": attention})
    return config.model_copy(update={"training": training})


def _gains(config: RunConfig, vocab_size: int) -> Gains:
    return remembered_gains(_timed_as(config, vocab_size), lambda: _measured(config, vocab_size))


def _timed_as(config: RunConfig, vocab_size: int) -> str:
    """Return what the speed of a step depends on, in a short form."""
    training = config.training
    parts = {
        "model": config.model.model_dump(mode="json", exclude={"name", "recipe", "warm_start"}),
        "vocabulary": vocab_size,
        "objective": None if config.objective is None else config.objective.model_dump(mode="json"),
        "strategy": config.strategy.target,
        "sequences": _sequences(config),
        "products": training.matmul_precision,
        "checkpointing": training.activation_checkpointing,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{config.model.name}, {digest[:16]}"


def _sequences(config: RunConfig) -> int:
    micro = config.training.micro_batch_size
    return micro if isinstance(micro, int) else config.training.batch_size


def _measured(config: RunConfig, vocab_size: int) -> dict[str, float]:
    set_up_torch(config.training, config.federation.silos_in_parallel)
    plain, rows = _model(config, vocab_size)
    steps = {"fp32": _step(config, plain, rows, bf16=False), BF16: _step(config, plain, rows, bf16=True)}
    if takes_products(plain):
        other, _ = _model(config, vocab_size)
        use_attention(other, "products")
        steps[BF16_PRODUCTS] = _step(config, other, rows, bf16=True)
    return measure_gains(steps)


def _model(config: RunConfig, vocab_size: int) -> tuple["PreTrainedModel", int]:
    """Return what is timed, and in how many sequences: the model, or a smaller one like it."""
    on_meta = model_of(config, vocab_size, "meta")
    sequence = config.model.sequence_length
    flops = model_flops_per_token(on_meta, sequence) * sequence
    model = None
    if flops > _PASS_FLOPS and (smaller := _with_fewer_layers(config.model, on_meta.config.vocab_size)):
        try:
            model = _trained(config.model_copy(update={"model": smaller}), 1)
            flops = model_flops_per_token(model, sequence) * sequence
        except PhotonError:
            pass  # Its layers are not all alike: what takes so long a step can wait for a whole one.
    rows = int(_PASS_FLOPS // max(flops, 1.0))
    return model or _trained(config, vocab_size), max(1, min(rows, _sequences(config)))


def _trained(config: RunConfig, vocab_size: int) -> "PreTrainedModel":
    """Return the model as it is trained: with what objective and strategy change about it."""
    model = trained_model(config, vocab_size, torch.device("cpu"))
    model.train()
    return model


def _with_fewer_layers(model: ModelSection, rows: int) -> ModelSection | None:
    """Return one layer of a model, or one of each part, with its share of the vocabulary.

    None: nobody knows how many layers there are.
    """
    architecture = dict(model.architecture or {})
    kind = str(architecture.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return None
    fewer, abbie = 1, model.abbie
    if abbie is not None:
        fewer, one_each = 3, {"head_blocks": 1, "body_blocks": 1, "tail_blocks": 1}
        abbie = abbie.model_copy(update=one_each)
    names = {"num_hidden_layers", CONFIG_MAPPING[kind].attribute_map.get("num_hidden_layers")}
    name = next((name for name in names if name in architecture), None)
    if name is None or not isinstance(layers := architecture[name], int) or layers <= fewer:
        return None
    return model.model_copy(
        update={
            "architecture": {**architecture, name: fewer},
            "abbie": abbie,
            "vocab_size": max(64, fewer * rows // layers),
        }
    )


def _step(config: RunConfig, model: "PreTrainedModel", sequences: int, *, bf16: bool) -> Callable[[], None]:
    objective, rows = objective_of(config), None
    batch: Mapping[str, torch.Tensor] = objective.sample(sequences, config.model.sequence_length)
    if strategy_of(config).local.restricts_rows:
        rows = torch.ones(model.config.vocab_size, dtype=torch.bool)

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = objective.loss(model, dict(batch), rows).value
        loss.backward()

    return step
