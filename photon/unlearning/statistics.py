"""LUNAR's sums over prompts. Those of several silos add up to those of all their prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from photon.errors import PhotonError
from photon.unlearning.capture import Batch, Site, captured


@dataclass(frozen=True)
class VectorSums:
    """What the unlearning vectors of some blocks are made of, all in float64.

    Attributes
    ----------
    reference, forget
        Sum of a block's outputs at the last token of each prompt, of shape (blocks, d_model).
    reference_rows, forget_rows
        How many rows these sums are over, of shape (blocks,): a block that is applied r times has r times as
        many.
    """

    reference: Tensor
    forget: Tensor
    reference_rows: Tensor
    forget_rows: Tensor

    def __add__(self, other: "VectorSums") -> "VectorSums":
        return VectorSums(
            self.reference + other.reference,
            self.forget + other.forget,
            self.reference_rows + other.reference_rows,
            self.forget_rows + other.forget_rows,
        )

    def vectors(self) -> Tensor:
        """Return r = mean over the reference prompts − mean over those to be forgotten, (blocks, d_model).

        Raises
        ------
        PhotonError
            If there is no prompt of one kind.
        """
        for kind, rows in (("reference", self.reference_rows), ("forget", self.forget_rows)):
            if not bool((rows > 0).all()):
                raise PhotonError(f"unlearning: the {kind} set has no prompt; there must be one at least")
        reference = self.reference / self.reference_rows[:, None]
        return reference - self.forget / self.forget_rows[:, None]


@dataclass(frozen=True)
class GramSums:
    """What the closed form of one block is made of, all in float64.

    With E = c·r on the rows to be forgotten and 0 on all others, HᵀE = (Σ h over the former)(c·r)ᵀ.

    Attributes
    ----------
    upper
        The upper triangle of HᵀH row by row, over the rows of both kinds, of shape (d_ff (d_ff + 1) / 2,).
    forget
        Σ h over the rows to be forgotten, of shape (d_ff,).
    rows
        How many rows are to be forgotten, and how many are retained, of shape (2,).
    """

    upper: Tensor
    forget: Tensor
    rows: Tensor

    def __add__(self, other: "GramSums") -> "GramSums":
        return GramSums(self.upper + other.upper, self.forget + other.forget, self.rows + other.rows)

    def gram(self) -> Tensor:
        """Return HᵀH, of shape (d_ff, d_ff)."""
        size = len(self.forget)
        gram = self.upper.new_empty(size, size)
        start = 0
        for row in range(size):
            values = self.upper[start : start + size - row]
            gram[row, row:] = values
            gram[row:, row] = values
            start += size - row
        return gram


def vector_sums(
    model: PreTrainedModel, sites: Sequence[Site], reference: Iterable[Batch], forget: Iterable[Batch]
) -> VectorSums:
    """Return the sums for the unlearning vectors of some blocks.

    Parameters
    ----------
    model
        The model.
    sites
        The blocks.
    reference, forget
        Prompts to which the model says that it does not know, and those that are to be forgotten. Of each the
        last token is chosen.
    """
    sums, rows = [], []
    for kind in (reference, forget):
        total = torch.zeros((len(sites), model.config.hidden_size), dtype=torch.float64)
        count = torch.zeros(len(sites), dtype=torch.float64)
        for batch in kind:
            found = captured(model, sites, batch)
            for index, site in enumerate(sites):
                outputs = found[site.layer].outputs
                total[index] += outputs.double().sum(0).cpu()
                count[index] += len(outputs)
        sums.append(total)
        rows.append(count)
    return VectorSums(*sums, *rows)


def gram_sums(
    model: PreTrainedModel, sites: Sequence[Site], forget: Iterable[Batch], retain: Iterable[Batch]
) -> dict[int, GramSums]:
    """Return the sums for the closed form of some blocks, by the block's number.

    Parameters
    ----------
    model
        The model.
    sites
        The blocks.
    forget, retain
        Rows that are to be steered, and rows that are to stay as they are.
    """
    sizes = {site.layer: site.weight.shape[1] for site in sites}
    grams = {layer: torch.zeros((size, size), dtype=torch.float64) for layer, size in sizes.items()}
    sums = {layer: torch.zeros(size, dtype=torch.float64) for layer, size in sizes.items()}
    rows = {layer: torch.zeros(2, dtype=torch.float64) for layer in sizes}
    for kind, prompts in enumerate((forget, retain)):
        for batch in prompts:
            for layer, found in captured(model, sites, batch).items():
                inputs = found.inputs.double()
                grams[layer] += (inputs.T @ inputs).cpu()
                rows[layer][kind] += len(inputs)
                if kind == 0:
                    sums[layer] += inputs.sum(0).cpu()
    return {layer: GramSums(upper_triangle(grams[layer]), sums[layer], rows[layer]) for layer in sizes}


def upper_triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a square matrix row by row, of shape (n (n + 1) / 2,)."""
    return torch.cat([matrix[row, row:] for row in range(len(matrix))])


def input_rows(model: PreTrainedModel, site: Site, prompts: Iterable[Batch]) -> Tensor:
    """Return h of one block for the chosen tokens of some prompts, float64 of shape (rows, d_ff)."""
    found = [captured(model, [site], batch)[site.layer].inputs.double().cpu() for batch in prompts]
    return torch.cat(found) if found else torch.zeros((0, site.weight.shape[1]), dtype=torch.float64)
