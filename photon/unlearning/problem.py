"""What is to be steered where, and the matrix that does it: one request on one machine."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from photon.errors import PhotonError
from photon.unlearning.capture import Batch, Positions, Site, batches, starts
from photon.unlearning.solve import Recipe, delta, gain, gain_of_rows, trained
from photon.unlearning.statistics import gram_sums, input_rows, vector_sums

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt."""


@dataclass(frozen=True)
class Method:
    """How a request is fulfilled.

    Attributes
    ----------
    solver
        ``"closed"``: the ridge's closed form; ``"adamw"``: the released code's training; ``"lora"``: the same
        of two factors of rank 8.
    positions
        Which tokens of the prompts to be forgotten are steered.
    retain
        ``"all"`` retained prompts, or an ``"equal"`` number of them and of those to be forgotten, drawn.
    recipe
        Of the training.
    batch_size
        Prompts at once.
    seed
        Of the draw.
    """

    solver: Literal["closed", "adamw", "lora"] = "closed"
    positions: Positions = "last"
    retain: Literal["all", "equal"] = "all"
    recipe: Recipe = field(default_factory=Recipe)
    batch_size: int = 16
    seed: int = 0


class Choice(NamedTuple):
    """Which matrix is changed, and how far.

    Attributes
    ----------
    layer
        Number of the block.
    ridge
        λ of the closed form; 0 where the matrix is trained.
    coefficient
        c.
    """

    layer: int
    ridge: float
    coefficient: float


class Edit(NamedTuple):
    """A change of a model.

    Attributes
    ----------
    choice
        What was chosen.
    site
        Where.
    vector
        The block's unlearning vector r, float64 of shape (d_model,).
    delta
        What is added to the projection's matrix, float64 of shape (d_model, d_ff).
    """

    choice: Choice
    site: Site
    vector: Tensor
    delta: Tensor


class Problem:
    """Rows, vectors and solutions of a request.

    The last token of each prompt to be forgotten (or more of them) is steered by c·r. All tokens of what is
    retained stay as they are: of the prompts of the retain set, of the reference set, which the model goes on
    refusing, and of earlier requests, which stay where these have steered them.

    Parameters
    ----------
    model
        The model, as it is before this request.
    sites
        The blocks to choose among.
    forget, retain, reference
        The prompts.
    method
        How.

    Raises
    ------
    PhotonError
        If forget or reference set are empty.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        forget: Prompts,
        retain: Prompts,
        reference: Prompts,
        method: Method,
    ) -> None:
        self.model, self.method = model, method
        self.sites = {site.layer: site for site in sites}
        if method.retain == "equal" and len(retain) > len(forget):
            retain = random.Random(method.seed).sample(list(retain), len(forget))
        kept = [*retain, *reference]
        self._steered = self._batches(forget, starts(forget, method.positions, kept))
        self._kept = self._batches(kept, starts(kept, "all"))
        last = [self._batches(some, starts(some, "last")) for some in (reference, forget)]
        vectors = vector_sums(model, sites, *last).vectors()
        self.vectors = {site.layer: vector for site, vector in zip(sites, vectors, strict=True)}
        self._gains: dict[tuple[int, float], Tensor] = {}
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums = None
        if method.solver == "closed":
            # The smaller system: of as many unknowns as there are rows, or as the matrix has columns.
            rows = sum(int(one.chosen.sum()) for one in (*self._steered, *self._kept))
            if rows >= min(site.weight.shape[1] for site in sites):
                self._sums = gram_sums(model, sites, self._steered, self._kept)

    def _batches(self, prompts: Prompts, chosen_from: Sequence[int]) -> list[Batch]:
        device = next(self.model.parameters()).device
        return list(batches(prompts, chosen_from, batch_size=self.method.batch_size, device=device))

    def _rows_of(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._rows:
            site = self.sites[layer]
            steered, kept = (input_rows(self.model, site, some) for some in (self._steered, self._kept))
            self._rows = {layer: (steered, kept)}
        return self._rows[layer]

    def _gain(self, layer: int, ridge: float) -> Tensor:
        if (layer, ridge) not in self._gains:
            found = (
                gain_of_rows(*self._rows_of(layer), ridge)
                if self._sums is None
                else gain(self._sums[layer], ridge)
            )
            self._gains[layer, ridge] = found
        return self._gains[layer, ridge]

    def edit(self, choice: Choice) -> Edit:
        """Return the change of a choice.

        Raises
        ------
        PhotonError
            If the system is singular, or the matrix that comes of it is not finite.
        """
        site, vector = self.sites[choice.layer], self.vectors[choice.layer]
        if self.method.solver == "closed":
            change = delta(self._gain(choice.layer, choice.ridge), vector, choice.coefficient)
        else:
            steered, kept = self._rows_of(choice.layer)
            change = trained(site.weight, steered, kept, choice.coefficient * vector, self.method.recipe)
        check_finite(site.weight.double().cpu() + change, site.weight.dtype, choice)
        return Edit(choice, site, vector, change)


def check_finite(matrix: Tensor, dtype: torch.dtype, choice: Choice) -> None:
    """Check that a changed matrix has its values in a type.

    Raises
    ------
    PhotonError
        If one is not finite there.
    """
    if not bool(torch.isfinite(matrix.to(dtype)).all()):
        raise PhotonError(
            f"unlearning: with ridge {choice.ridge:g} and coefficient {choice.coefficient:g} a value of "
            f"layer {choice.layer} is not finite in {str(dtype).removeprefix('torch.')}; take a smaller "
            "coefficient, or a larger ridge"
        )
