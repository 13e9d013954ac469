"""Validation loss of a model on all of a prepared corpus."""

import math
from functools import partial
from typing import TYPE_CHECKING

import torch

from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.models.pretrained import positions_of
from photon.objective.perplexity import Score, evaluate_windows
from photon.training.step_probe import measure_gains

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from photon.training.precision import Precision


def evaluate_data(
    model: "PreTrainedModel",
    data: PreparedData,
    *,
    batch_size: int,
    device: torch.device | str,
    precision: "Precision",
    limit: int | None = None,
) -> dict[str, Score]:
    """Return the score of every silo's validation split, by silo name.

    Parameters are those of :func:`evaluate_windows`; ``limit`` counts for each silo.

    Raises
    ------
    PhotonError
        If the model takes shorter sequences, or knows fewer tokens, than the data has.
    """
    config, manifest = model.config, data.manifest
    positions = positions_of(config)
    if positions is not None and positions < manifest.sequence_length:
        raise PhotonError(
            f"{data.path}: its sequences of {manifest.sequence_length} tokens are longer than the model's "
            f"{positions}; prepare the text with --sequence-length {positions}"
        )
    if config.vocab_size < manifest.vocab_size:
        raise PhotonError(
            f"{data.path}: has {manifest.vocab_size} different tokens, the model knows {config.vocab_size}; "
            "prepare the text with the model's tokenizer"
        )
    scores = {}
    for silo in data.silo_names:
        arrays = data.arrays(silo, "validation")
        if "pairs" in arrays:
            # Of answers that were rejected nobody wants them likely.
            arrays["targets"] = arrays["targets"] * (arrays.pop("pairs") % 2 == 1)
        arrays.pop("sets", None)
        scores[silo] = evaluate_windows(
            model,
            arrays.pop("tokens"),
            batch_size=batch_size,
            device=device,
            precision=precision,
            limit=limit,
            beside=arrays,
        )
    return scores


def overall(scores: dict[str, Score]) -> Score:
    """Return the score of all silos' text together."""
    return Score(
        math.fsum(score.nll for score in scores.values()), sum(score.tokens for score in scores.values())
    )


def bf16_gain(model: "PreTrainedModel", tokens: int) -> float:
    """Return how much faster a model on the CPU reads so many tokens in bf16 than in fp32."""
    ids, was_training = torch.zeros((1, tokens), dtype=torch.int64), model.training

    def read(*, bf16: bool) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model(input_ids=ids)

    model.eval()
    try:
        return measure_gains({"fp32": partial(read, bf16=False), "bf16": partial(read, bf16=True)})["bf16"]
    finally:
        model.train(was_training)
