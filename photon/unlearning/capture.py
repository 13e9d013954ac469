"""What passes through a block: its output, and what enters the last projection of its MLP.

    output = before + W h (+ bias),   so whatever is added to W h is added to the output, and to nothing else.

Two hooks see all that is needed, whatever the block is made of. Of a model that applies some blocks several
times (AbbIE), the rows of all passes are stacked.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from photon.errors import PhotonError
from photon.models.experts import experts_of

#: Which tokens of a prompt are steered.
Positions = Literal["last", "all", "from-first-difference"]


@dataclass(frozen=True)
class Site:
    """A block of a model, and the projection by which its MLP writes to the residual stream.

    Attributes
    ----------
    layer
        Number of the block, from 0.
    name
        Name of the projection's weight among the model's parameters.
    block, projection
        The modules.
    """

    layer: int
    name: str
    block: nn.Module
    projection: nn.Module

    @property
    def weight(self) -> Tensor:
        """W, of shape (d_model, d_ff): a view of the parameter, which GPT-2 has the other way round."""
        weight: Any = self.projection.weight
        return weight.detach().T if isinstance(self.projection, Conv1D) else weight.detach()

    def add(self, delta: Tensor) -> None:
        """Add ``delta`` of shape (d_model, d_ff) to W, summed in float64 and rounded once."""
        # The transpose of a view writes where the view lies.
        self.weight.copy_(self.weight.double() + delta.to(self.weight.device, torch.float64))


class Batch(NamedTuple):
    """Token ids, and which of them count.

    Attributes
    ----------
    tokens, chosen
        int64 and bool, of shape (rows, tokens).
    attention_mask, positions
        Where rows are filled up from the left, or hold several texts: as transformers takes them, of the same
        shape. Rows that are filled up from the right need neither: what comes later is not seen.
    """

    tokens: Tensor
    chosen: Tensor
    attention_mask: Tensor | None = None
    positions: Tensor | None = None


class Rows(NamedTuple):
    """What was captured of a block for the chosen tokens; those of a block's next pass come after them.

    Attributes
    ----------
    outputs
        Its output, of shape (rows, d_model).
    inputs
        What enters the projection, h, of shape (rows, d_ff).
    """

    outputs: Tensor
    inputs: Tensor


def sites_of(model: PreTrainedModel) -> list[Site]:
    """Return the blocks of a model in order.

    They are tried out: what is added to what the projection gives must be added to what the block gives. Of a
    model that has shapes alone, on the device meta, that is left to others.

    Raises
    ------
    PhotonError
        If the model is a mixture of experts, or one of its blocks has no such projection.
    """
    kind = model.config.model_type
    if experts_of(model.config) is not None:
        raise PhotonError(
            f"unlearning: a {kind} of this configuration is a mixture of experts, so no single matrix writes "
            "what a block has found; take a dense model"
        )
    count, width = model.config.num_hidden_layers, model.config.hidden_size
    lists = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    prefix, blocks = next(lists, ("", nn.ModuleList()))
    found = []
    for layer, block in enumerate(blocks):
        # The MLP's last linear map is the last one of the block that is not within the attention.
        named = [
            (name, module)
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and "att" not in name and _outputs(module) == width
        ]
        if not named:
            raise PhotonError(
                f"unlearning: block {layer} of a {kind} has no linear map outside its attention that gives "
                f"{width} values; take a model such as gpt2 or llama"
            )
        name, projection = named[-1]
        found.append(Site(layer, f"{prefix}.{layer}.{name}.weight", block, projection))
    if not found:
        raise PhotonError(f"unlearning: a {kind} has no list of {count} blocks; take gpt2 or llama")
    if model.device.type != "meta":
        _check_adds(model, found)
    return found


def _outputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1 if isinstance(module, Conv1D) else 0])


def _check_adds(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Check that what a projection gives is added to what its block gives, as it is."""
    device = next(model.parameters()).device
    shift = torch.linspace(-1.0, 1.0, model.config.hidden_size, device=device)
    errors: dict[int, float] = {}
    trying = False

    def compare(site: Site, given: Any, named: Any, output: Any) -> None:
        nonlocal trying
        if trying or site.layer in errors:
            return
        trying = True
        handle = site.projection.register_forward_hook(lambda _, __, made: made + shift.to(made.dtype))
        try:
            before, after = _state(output).float(), _state(site.block(*given, **named)).float()
            # Of values that are large, the last digits are lost.
            errors[site.layer] = float(((after - before - shift).abs() / (1 + 0.01 * before.abs())).max())
        finally:
            handle.remove()
            trying = False

    handles = [
        site.block.register_forward_hook(
            lambda _, given, named, output, site=site: compare(site, given, named, output), with_kwargs=True
        )
        for site in sites
    ]
    tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
    _run(model, Batch(tokens, tokens.bool()), handles)
    for site in sites:
        if not errors.get(site.layer, 1.0) < 1e-3:
            raise PhotonError(
                f"unlearning: what {site.name} gives is not added as it is to what block {site.layer} of a "
                f"{model.config.model_type} gives; take a model such as gpt2 or llama"
            )


def _state(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state.detach()


def _run(model: PreTrainedModel, batch: Batch, handles: Sequence[Any]) -> None:
    """Run a model without its head, in evaluation mode; then remove the hooks."""
    was_training = model.training
    model.eval()
    others = {"attention_mask": batch.attention_mask, "position_ids": batch.positions}
    given = {name: tensor for name, tensor in others.items() if tensor is not None}
    blocks: Any = model.base_model
    try:
        with torch.no_grad():
            blocks(input_ids=batch.tokens, use_cache=False, **given)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def captured(model: PreTrainedModel, sites: Sequence[Site], batch: Batch) -> dict[int, Rows]:
    """Return what passes through some blocks for the chosen tokens of a batch, by the block's number.

    The model runs once, in evaluation mode and without gradients. A block that is applied r times gives r
    times as many rows.
    """
    outputs: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    inputs: dict[int, list[Tensor]] = {site.layer: [] for site in sites}
    handles: list[Any] = []
    for site in sites:
        handles += [
            site.block.register_forward_hook(
                lambda _, __, output, layer=site.layer: outputs[layer].append(_state(output)[batch.chosen])
            ),
            site.projection.register_forward_pre_hook(
                lambda _, given, layer=site.layer: inputs[layer].append(
                    # Some models lay the rows of a batch one after the other.
                    given[0].detach().reshape(*batch.chosen.shape, -1)[batch.chosen]
                )
            ),
        ]
    _run(model, batch, handles)
    return {layer: Rows(torch.cat(outputs[layer]), torch.cat(inputs[layer])) for layer in outputs}


def starts(
    prompts: Sequence[Sequence[int]], positions: Positions, retained: Sequence[Sequence[int]] = ()
) -> list[int]:
    """Return, for each prompt, the index of the token from which on its tokens are chosen.

    Parameters
    ----------
    prompts
        Token ids of each.
    positions
        ``"last"``: the last token alone; ``"all"``; ``"from-first-difference"``: from the first token at
        which a prompt differs from every retained one, and its last token in any case. Before that a
        retained prompt has the very same rows.
    retained
        Prompts whose answers stay.
    """
    if positions == "from-first-difference":
        return [
            min(len(one) - 1, max((_common(one, other) for other in retained), default=0)) for one in prompts
        ]
    return [len(one) - 1 if positions == "last" else 0 for one in prompts]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the beginning that two prompts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def batches(
    prompts: Sequence[Sequence[int]],
    chosen_from: Sequence[int],
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield prompts in batches, filled up from the right; their tokens from an index on are chosen.

    Parameters
    ----------
    prompts
        Token ids of each.
    chosen_from
        Of each prompt, as `starts` returns it.
    batch_size
        Most prompts in a batch.
    device
        Where the batches are.
    """
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        tokens = torch.zeros((len(some), max(map(len, some))), dtype=torch.int64)
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (prompt, start) in enumerate(zip(some, chosen_from[first:], strict=False)):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
            chosen[row, start : len(prompt)] = True
        yield Batch(tokens.to(device), chosen.to(device))


@contextmanager
def edited(edits: Sequence[tuple[Site, Tensor]]) -> Iterator[None]:
    """Add each ΔW, of shape (d_model, d_ff), to its W in this block; afterwards W has its bits again."""
    before = [site.weight.clone() for site, _ in edits]
    try:
        for site, delta in edits:
            site.add(delta)
        yield
    finally:
        for (site, _), weight in zip(edits, before, strict=True):
            site.weight.copy_(weight)
