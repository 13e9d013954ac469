"""What a silo sends: its trained parameters, or their update with what earlier rounds have lost.

    Δ = θ_received − θ_trained,   a = Δ + β e,   sent = encode(a),   e ← a − decode(sent)

θ_received is what the silo decoded, so a codec that rounds on the way down takes nothing from the update.
e, the residual, is zero at first and part of the silo's state: it counts for the rounds that the server has
accepted, and a reply that was lost leaves no trace in it. β is ``link.error_decay``: with 1 nothing is lost
for ever; below that, what is small in every round fades (SparseLoCo, 2508.15706).
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from photon.config.schema import LinkSection
from photon.link.encoding import (
    Codec,
    Encoding,
    Packed,
    PackedGroups,
    SparseTensor,
    generator,
    pack,
    unpack,
)
from photon.link.pipelines import change_pipeline, uplink_pipelines
from photon.link.records import Groups
from photon.state.tensors import StateGroups

#: Group of the error-feedback state that holds what codecs have lost; other groups are named after codecs.
RESIDUAL = "residual"
#: Group of the error-feedback state that holds the parameters that a silo has decoded.
REFERENCE = "reference"


def encode_reply(
    groups: Groups,
    received: Mapping[str, torch.Tensor],
    link: LinkSection,
    feedback: Groups,
    *,
    seed: str,
) -> tuple[PackedGroups, StateGroups]:
    """Encode what a silo has trained.

    Parameters
    ----------
    groups
        Trained state groups.
    received
        The parameters that training started from.
    feedback
        What this function returned in the last accepted round; empty at first.
    seed
        All that distinguishes this reply from others, for codecs that draw.

    Returns
    -------
    tuple
        What travels, and the error-feedback state for the next round.
    """
    pipelines = uplink_pipelines(link)
    reply: dict[str, dict[str, Packed]] = {}
    due = groups.get("params", {})
    # What parameters have lost that are not due now waits for their turn.
    kept: StateGroups = {
        key: {name: t for name, t in tensors.items() if name not in due} for key, tensors in feedback.items()
    }
    for group, tensors in groups.items():
        reply[group] = {}
        for name, tensor in tensors.items():
            draw = generator(f"{seed}/{group}/{name}")
            if group != "params":
                reply[group][name], _ = pack(tensor, pipelines.of(group, name), draw)
                continue
            seen = {key: of_codec[name] for key, of_codec in feedback.items() if name in of_codec}
            reply[group][name], remembered = _encode(
                tensor, received[name], link, pipelines.of(group, name), draw, seen
            )
            for key, value in remembered.items():
                kept.setdefault(key, {})[name] = value
    return reply, kept


def _encode(
    trained: torch.Tensor,
    received: torch.Tensor,
    link: LinkSection,
    codecs: Sequence[Codec],
    draw: np.random.Generator,
    feedback: Mapping[str, torch.Tensor],
) -> tuple[Packed, dict[str, torch.Tensor]]:
    """Encode one parameter; return what travels and what to remember."""
    if link.uplink_payload == "parameters":
        return pack(trained, codecs, draw, feedback)
    update = received - trained.to(received.device)
    if link.error_feedback and RESIDUAL in feedback:
        update.add_(feedback[RESIDUAL], alpha=link.error_decay)
    packed, remembered = pack(update, codecs, draw, feedback)
    if link.error_feedback and packed.encoding:
        remembered[RESIDUAL] = subtract(update, unpack(packed, "the update"))
    return packed, remembered


def encode_change(
    params: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    link: LinkSection,
    *,
    seed: str,
) -> tuple[dict[str, Packed], dict[str, torch.Tensor]]:
    """Encode what brings silos from one reference to the next.

    The reference is what silos have decoded so far. What codecs lose stays in params − reference, and so in
    the next change. What has not changed stays as it is, whatever the codecs.

    Returns
    -------
    tuple
        The encoded change, and the reference after it.
    """
    codecs = change_pipeline(link)
    change: dict[str, Packed] = {}
    after: dict[str, torch.Tensor] = {}
    for name, tensor in params.items():
        change[name], _ = pack(tensor - reference[name], codecs, generator(f"{seed}/{name}"))
        decoded = unpack(change[name], name)
        # Silos add the dense change, too: both sides get the same bits.
        after[name] = reference[name] + (decoded.dense() if isinstance(decoded, SparseTensor) else decoded)
    return change, after


def subtract(tensor: torch.Tensor, other: torch.Tensor | SparseTensor) -> torch.Tensor:
    """Return ``tensor − other``; ``tensor`` is used up."""
    if isinstance(other, SparseTensor):
        flat = tensor.view(-1)
        flat[other.indices] -= other.values
        return tensor
    return tensor.sub_(other)


def encodings_of(reply: PackedGroups) -> str:
    """Return the encodings of an encoded reply as JSON text."""
    return json.dumps(
        {
            group: {name: packed.encoding.model_dump() for name, packed in tensors.items() if packed.encoding}
            for group, tensors in reply.items()
        }
    )


def with_encodings(payloads: Groups, encodings: str) -> PackedGroups:
    """Return the encoded reply that a silo has kept; a group without tensors is in ``encodings`` alone."""
    return {
        group: {
            name: Packed(data, Encoding.model_validate(coded[name]) if name in coded else None)
            for name, data in payloads.get(group, {}).items()
        }
        for group, coded in json.loads(encodings).items()
    }
