"""The policy: from embeddings of drafts to a logit for each pair of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from photon.errors import PhotonError, printable
from photon.files.atomic import write_bytes
from photon.orchestration.method import EncoderSection, Method, PolicySection, method_of

#: Key of a policy's settings in the header of its file.
_HEADER = "photon_policy"
#: Bytes of a policy's file, at most: one layer of width 4096 has less.
_MOST_BYTES = 2 << 30


class Policy(nn.Module):
    """One transformer encoder layer with one head and no positions, and Λ = κ H Hᵀ + b.

    The paper's κ is 1, and it has no b.

    Which agent is which it cannot know: a permutation of the drafts permutes the logits.

    Parameters
    ----------
    section
        Its settings.
    size
        d, the numbers of an embedding.
    seed
        Of its first weights.
    """

    def __init__(self, section: PolicySection, size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.section, self.size = section, size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layer = nn.TransformerEncoderLayer(
                size, 1, section.feedforward * size, section.dropout, batch_first=True
            )
            if section.logits == "asymmetric":
                self.query = nn.Linear(size, size, bias=False)
                self.key = nn.Linear(size, size, bias=False)
        # A number that is not trained is one of the settings.
        if section.learn_scale:
            self.scale = nn.Parameter(torch.tensor(section.scale(size)))
        if section.logit_bias is not None:
            self.bias = nn.Parameter(torch.tensor(section.logit_bias))

    def twin(self) -> "Policy":
        """Return another policy with the same parameters."""
        made = Policy(self.section, self.size)
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits Λ.

        Parameters
        ----------
        embeddings
            Shape (B, N, d); any N.

        Returns
        -------
        Tensor
            Shape (B, N, N): of the edge from the first to the second.
        """
        hidden = self.layer(embeddings)
        left, right = hidden, hidden
        if self.section.logits == "asymmetric":
            left, right = self.query(hidden), self.key(hidden)
        scale = self.scale if self.section.learn_scale else self.section.scale(self.size)
        logits: Tensor = scale * left @ right.mT
        return logits if self.section.logit_bias is None else logits + self.bias


@dataclass(frozen=True)
class Trained:
    """A policy that was trained, and the settings that it was trained with."""

    policy: Policy
    method: Method


def save_policy(path: Path, policy: Policy, method: Method) -> None:
    """Write a policy with its settings into a safetensors file, atomically."""
    header = {"size": policy.size, "method": method.model_dump(mode="json")}
    tensors = {name: tensor.detach().contiguous() for name, tensor in policy.state_dict().items()}
    write_bytes(path, save(tensors, metadata={_HEADER: json.dumps(header)}))


def load_policy(path: Path) -> Trained:
    """Read a policy, ready for use; nothing in the file is run.

    Raises
    ------
    PhotonError
        If it cannot be read, is no policy, or has other tensors than its settings say.
    """
    shown = printable(path)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise PhotonError(f"{shown}: no policy has more than {_MOST_BYTES} bytes")
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            if header is None:
                raise PhotonError(
                    f"{shown}: has weights, but not of a policy; `photon orchestrate train` makes one"
                )
            method, size = _settings(header, shown)
            policy = Policy(method.policy, size)
            wanted = {name: tensor.shape for name, tensor in policy.state_dict().items()}
            shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != wanted:
                odd = min(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
                raise PhotonError(f"{shown}: {printable(odd)} is not as the policy's settings say")
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise PhotonError(f"{shown}: cannot read the policy ({why})") from None
    if odd_names := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise PhotonError(f"{shown}: {odd_names[0]} has values that are not finite; train it anew")
    policy.load_state_dict(tensors)
    return Trained(policy.eval(), method)


def _settings(header: str, shown: str) -> tuple[Method, int]:
    try:
        values: Any = json.loads(header)
        size = values["size"]
        method = method_of(values["method"], shown)
        # The bounds on what an encoder may give are its own.
        EncoderSection(size=size)
    except (ValueError, KeyError, TypeError, RecursionError, ValidationError):
        raise PhotonError(f"{shown}: the policy's settings cannot be read; train it anew") from None
    return method, size
