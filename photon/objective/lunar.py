"""LUNAR over a federation (2502.07218): forget some questions by one matrix, made of sums over all silos.

Three rounds, in each of which all silos answer, and no local step:

1. counts: how many prompts of each set there are, and how many silos have some. So whoever would be alone in
   a sum is known before anything of its text is summed.
2. sums: Σ a over the reference prompts and over those to be forgotten, for the unlearning vectors r of the
   candidate blocks; the upper triangle of HᵀH and Σ h over the prompts to be forgotten, for the gains g. All
   are of the model as it is, so they are of one round: no silo is in one of them and not in another.
3. scan: ΔW = c · r gᵀ has rank one, so a candidate (block, ridge, coefficient) is two vectors and a number.
   Each silo tries all of them on its own prompts, and counts what is answered and what is refused.

The server chooses by the sums of what was counted, and adds ΔW in float64.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from photon.data.questions import SETS, EncodedQuestion, unpack_questions
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.objective.base import Behind, Conclusion, Shapes
from photon.objective.probe import answers_to
from photon.objective.sft import SupervisedFineTuning
from photon.state.received import tensors_hash
from photon.state.unlearned import LONGEST, Unlearned
from photon.training.groups import StateGroups, Tensors
from photon.unlearning.capture import Batch, Site, batches, edited, sites_of, starts
from photon.unlearning.figures import deviation_score
from photon.unlearning.refusals import TEMPLATES
from photon.unlearning.scan import Choice, Found, choices, distance, middle_half
from photon.unlearning.solve import delta, gain
from photon.unlearning.statistics import GramSums, VectorSums, gram_sums, vector_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS, VECTORS, GRAMS, CANDIDATES, FIGURES = (
    f"shared/{name}" for name in ("counts", "vectors", "grams", "candidates", "figures")
)
#: The rounds.
COUNTING, SUMMING, SCANNING = 1, 2, 3
#: Less than this share of refusals is none.
LEAST = 0.5


class Lunar(SupervisedFineTuning):
    """Make a model refuse the questions that it is to forget; see the module.

    What it is measured by is the loss on the answers that are to stay.

    Parameters
    ----------
    asked_by
        Who asks that something be forgotten.
    reason
        Why, in their words.
    layers
        Blocks to choose among, from 0; None: the middle half.
    ridges
        λ to choose among.
    coefficients
        c to choose among.
    positions
        Which tokens of a prompt to be forgotten are steered: the ``"last"``, or ``"all"``. Of the prompts
        whose answers stay all are held. Where a prompt first differs from those of other silos nobody knows.
    answer_tokens
        Most tokens of an answer in the scan.
    questions
        Most questions of each set that a silo asks in the scan, evenly spaced; None: all.

    Raises
    ------
    ValueError
        If one is out of its range.
    """

    arrays: ClassVar[tuple[str, ...]] = ("tokens", "positions", "targets", "sets")
    trains: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    groups: ClassVar[tuple[str, ...]] = (COUNTS, VECTORS, GRAMS, FIGURES)
    rounds: ClassVar[int | None] = SCANNING
    needs_all: ClassVar[bool] = True

    def __init__(
        self,
        *,
        asked_by: str | None = None,
        reason: str = "",
        layers: list[int] | None = None,
        ridges: list[float] | None = None,
        coefficients: list[float] | None = None,
        positions: Literal["last", "all"] = "last",
        answer_tokens: int = 32,
        questions: int | None = None,
    ) -> None:
        if not asked_by or not asked_by.strip():
            raise ValueError("asked_by: name who asks that something be forgotten, as in asked_by='A. B.'")
        if max(len(asked_by), len(reason)) > LONGEST:
            raise ValueError(f"asked_by and reason have {LONGEST} characters at most")
        self.ridges = [1e-3, 1e-2] if ridges is None else ridges
        self.coefficients = [0.5, 1.0, 2.0] if coefficients is None else coefficients
        for name, values, fits in (
            ("layers", [0] if layers is None else layers, lambda value: value >= 0),
            ("ridges", self.ridges, lambda value: 0 <= value <= 1e6),
            ("coefficients", self.coefficients, lambda value: 0 < abs(value) <= 1e3),
        ):
            if not 1 <= len(values) <= 100 or len(set(values)) < len(values) or not all(map(fits, values)):
                raise ValueError(f"{name}={values}: give one value or more, each once and in its range")
        if answer_tokens < 1 or (questions is not None and questions < 1):
            raise ValueError("answer_tokens and questions are at least 1")
        self.asked_by, self.reason, self.layers, self.positions = asked_by, reason, layers, positions
        self.answer_tokens, self.questions = answer_tokens, questions

    # --- what travels ---------------------------------------------------------------------------------

    def _sites(self, model: nn.Module) -> dict[int, Site]:
        """Return the candidate blocks of a model, by name."""
        sites = sites_of(model)  # type: ignore[arg-type]
        layers = middle_half(len(sites)) if self.layers is None else self.layers
        for layer in layers:
            if layer >= len(sites):
                raise PhotonError(f"objective.layers: the model has blocks 0 to {len(sites) - 1}, no {layer}")
        return {layer: sites[layer] for layer in layers}

    def _choices(self, sites: Mapping[int, Site]) -> list[Choice]:
        return choices(list(sites), self.ridges, self.coefficients)

    def sums(self, model: "PreTrainedModel", server_round: int) -> Shapes:
        """Return the sums of a round; see `Objective.sums`."""
        sets, sites = len(SETS), self._sites(model)
        if server_round == COUNTING:
            return {
                COUNTS: {name: torch.Size([sets]) for name in ("prompts", "silos")} | {"all": torch.Size()}
            }
        if server_round == SCANNING:
            return {FIGURES: {"figures": torch.Size([1 + len(self._choices(sites)), sets, len(_SEEN)])}}
        vectors: dict[str, list[int]] = {}
        grams: dict[str, list[int]] = {}
        for layer, site in sites.items():
            outputs, inputs = site.weight.shape
            vectors |= {_of(layer, "reference"): [outputs], _of(layer, "forget"): [outputs]}
            grams |= {_of(layer, "upper"): [inputs * (inputs + 1) // 2], _of(layer, "forget"): [inputs]}
            vectors[_of(layer, "rows")] = grams[_of(layer, "rows")] = [2]
        return {
            group: {name: torch.Size(shape) for name, shape in of.items()}
            for group, of in ((VECTORS, vectors), (GRAMS, grams))
        }

    def brings(self, model: "PreTrainedModel", server_round: int) -> Shapes:
        """Return what requests of a round bring; see `Objective.brings`."""
        if server_round == COUNTING:
            return {}
        brought = dict(self.sums(model, COUNTING))
        if server_round == SCANNING:
            candidates = {}
            for layer, site in self._sites(model).items():
                outputs, inputs = site.weight.shape
                candidates[_of(layer, "vector")] = torch.Size([outputs])
                candidates[_of(layer, "gains")] = torch.Size([len(self.ridges), inputs])
            brought[CANDIDATES] = candidates
        return brought

    # --- at a silo ------------------------------------------------------------------------------------

    def behind(self, data: SiloData, received: StateGroups, server_round: int) -> Behind:
        """Return how many prompts of each set a silo has, and how many silos have some."""
        rows = {name: len(of) for name, of in zip(SETS, _questions(data), strict=True)}
        if COUNTS not in received:
            return Behind(rows)
        counts = received[COUNTS]
        silos = {name: round(float(count)) for name, count in zip(SETS, counts["silos"], strict=True)}
        return Behind(rows, silos, round(float(counts["all"])))

    def statistics(
        self, model: nn.Module, data: SiloData, received: StateGroups, *, server_round: int, seed: int
    ) -> StateGroups:
        """Return a silo's sums of a round; see `Objective.statistics`."""
        forget, retain, reference = _questions(data)
        if server_round == COUNTING:
            prompts = torch.tensor([len(of) for of in (forget, retain, reference)], dtype=torch.float64)
            one = torch.ones((), dtype=torch.float64)
            return {COUNTS: {"prompts": prompts, "silos": (prompts > 0).double(), "all": one}}
        sites = self._sites(model)
        if server_round == SCANNING:
            return {FIGURES: {"figures": self._scanned(model, sites, data, received[CANDIDATES])}}
        known: Any = model
        device = next(model.parameters()).device

        def rows(questions: Sequence[EncodedQuestion], positions: Literal["last", "all"]) -> list[Batch]:
            prompts = [one.prompt for one in questions]
            # One by one: what a prompt gives is then the same whatever others there are.
            return list(batches(prompts, starts(prompts, positions), batch_size=1, device=device))

        of_sites = list(sites.values())
        vectors = vector_sums(known, of_sites, rows(reference, "last"), rows(forget, "last"))
        grams = gram_sums(known, of_sites, rows(forget, self.positions), rows([*retain, *reference], "all"))
        return {VECTORS: _told(vectors, list(sites)), GRAMS: _told_grams(grams)}

    def _scanned(
        self, model: nn.Module, sites: Mapping[int, Site], data: SiloData, candidates: Tensors
    ) -> Tensor:
        """Return what a silo counts: of the model as it is, and with each candidate, (1 + n, sets, 3)."""
        asked = [_some(of, self.questions) for of in _questions(data)]
        before = _counted(model, asked, data, self.answer_tokens)
        found = [before]
        for choice in self._choices(sites):
            with edited([(sites[choice.layer], self._delta(candidates, choice))]):
                found.append(_counted(model, asked, data, self.answer_tokens))
        return torch.stack(found)

    def _delta(self, candidates: Tensors, choice: Choice) -> Tensor:
        gains = candidates[_of(choice.layer, "gains")][self.ridges.index(choice.ridge)]
        return delta(gains, candidates[_of(choice.layer, "vector")], choice.coefficient)

    # --- at the server --------------------------------------------------------------------------------

    def keep(self, sums: StateGroups, kept: StateGroups, server_round: int) -> StateGroups:
        """Return the counts, and with them the candidates once there are some; see `Objective.keep`.

        Raises
        ------
        PhotonError
            If a set has no prompt, or a system is singular.
        """
        if server_round == COUNTING:
            return sums
        if server_round == SCANNING:
            return {}
        vectors, grams = sums[VECTORS], sums[GRAMS]
        candidates = {}
        for name in vectors:
            if not name.endswith(".rows"):
                continue
            layer = name.removesuffix(".rows")
            reference, forget = vectors[name]
            of_vector = VectorSums(
                vectors[f"{layer}.reference"][None],
                vectors[f"{layer}.forget"][None],
                reference[None],
                forget[None],
            )
            of_gram = GramSums(grams[f"{layer}.upper"], grams[f"{layer}.forget"], grams[f"{layer}.rows"])
            candidates[f"{layer}.vector"] = of_vector.vectors()[0]
            candidates[f"{layer}.gains"] = torch.stack([gain(of_gram, ridge) for ridge in self.ridges])
        return {COUNTS: kept[COUNTS], CANDIDATES: candidates}

    def concluded(
        self,
        model: "PreTrainedModel",
        params: Tensors,
        sums: StateGroups,
        kept: StateGroups,
        server_round: int,
    ) -> Conclusion:
        """Return who has prompts, or what is chosen and what the model becomes; see `Objective.concluded`.

        Raises
        ------
        PhotonError
            If there is nothing to forget or to compare it with, or the model does not refuse.
        """
        if server_round == COUNTING:
            return self._told_apart(sums[COUNTS])
        if server_round == SUMMING:
            return Conclusion()
        sites = self._sites(model)
        before, *after = (_found(of) for of in sums[FIGURES]["figures"])
        candidates = list(zip(self._choices(sites), after, strict=True))
        _check_refuses(before, candidates)
        # Of those that are equally good the first.
        choice, found = min(candidates, key=lambda one: distance(before, one[1]))
        return self._changed(sites[choice.layer], params, kept, choice, (before, found))

    def _told_apart(self, counts: Tensors) -> Conclusion:
        prompts = {name: int(count) for name, count in zip(SETS, counts["prompts"], strict=True)}
        for name, count in prompts.items():
            if not count:
                raise PhotonError(f"unlearning: no silo has a question of the set {name}; one must have some")
        silos = {name: round(float(count)) for name, count in zip(SETS, counts["silos"], strict=True)}
        figures = {f"unlearning_prompts/{name}": float(count) for name, count in prompts.items()}
        return Conclusion(figures=figures, silos=silos)

    def _changed(
        self, site: Site, params: Tensors, kept: StateGroups, choice: Choice, found: tuple[Found, Found]
    ) -> Conclusion:
        weight = params[site.name]
        change = self._delta(kept[CANDIDATES], choice)
        if isinstance(site.projection, Conv1D):
            change = change.T
        # Summed in float64, and rounded once.
        new = (weight.double() + change).to(weight.dtype)
        told = dict(zip(("before", "after"), map(_flat, found), strict=True))
        return Conclusion(
            changed={site.name: new},
            figures={
                "unlearning/layer": float(choice.layer),
                "unlearning/ridge": choice.ridge,
                "unlearning/coefficient": choice.coefficient,
                **{
                    f"unlearning_{name.replace('/', '_')}/{when}": value
                    for when, of in told.items()
                    for name, value in of.items()
                },
            },
            unlearned=Unlearned(
                asked_by=self.asked_by,
                reason=self.reason,
                time=time.time(),
                weight=site.name,
                layer=choice.layer,
                ridge=choice.ridge,
                coefficient=choice.coefficient,
                positions=self.positions,
                prompts={name: int(n) for name, n in zip(SETS, kept[COUNTS]["prompts"], strict=True)},
                hash_before=tensors_hash({site.name: weight}),
                hash_after=tensors_hash({site.name: new}),
                **told,
            ),
        )


#: What is counted of the questions of a set: those asked, those refused, and Σ ROUGE-1 recall.
_SEEN = ("asked", "refused", "rouge1")


def _of(layer: int, name: str) -> str:
    return f"layer-{layer}.{name}"


def _questions(data: SiloData) -> list[list[EncodedQuestion]]:
    """Return a participant's questions, by set in the order of `SETS`."""
    found: list[list[EncodedQuestion]] = [[] for _ in SETS]
    for arrays in data.arrays("train"):
        for one in unpack_questions(arrays):
            found[one.set - 1].append(one)
    return found


def _some(questions: list[EncodedQuestion], limit: int | None) -> list[EncodedQuestion]:
    if limit is None or limit >= len(questions):
        return questions
    return [questions[index * len(questions) // limit] for index in range(limit)]


def _counted(
    model: nn.Module, asked: Sequence[Sequence[EncodedQuestion]], data: SiloData, most: int
) -> Tensor:
    """Return what a model says to the questions of each set, (sets, 3)."""
    reference = [data.tokenizer.tokenizer.decode(one.answer) for one in asked[-1] if one.answer]
    templates = list(dict.fromkeys([*reference, *TEMPLATES]))
    rows = []
    for questions in asked:
        answers = answers_to(model, questions, data.tokenizer, most, templates)
        rows.append([len(answers), sum(a.refused for a in answers), math.fsum(a.rouge1 for a in answers)])
    return torch.tensor(rows, dtype=torch.float64)


def _found(counted: Tensor) -> dict[str, dict[str, float]]:
    """Return the figures of what was counted, as `photon.unlearning.scan` names them."""
    found = {}
    for name, (asked, refused, rouge) in zip(("forget", "retain", "unknown"), counted.tolist(), strict=True):
        found[name] = {"refused": refused / max(1.0, asked), "rouge1": rouge / max(1.0, asked)}
    return found


def _flat(found: Found) -> dict[str, float]:
    flat = {f"{name}/{figure}": value for name, of in found.items() for figure, value in of.items()}
    del flat["unknown/rouge1"]
    return {**flat, "deviation_score": deviation_score(flat["forget/rouge1"], flat["retain/rouge1"])}


def _check_refuses(before: Found, candidates: Sequence[tuple[Choice, Found]]) -> None:
    """Check that the model refuses what it does not know, and with some candidate what is to be forgotten.

    Where one candidate alone was asked for, it is taken whatever comes of it.
    """
    if (refused := before["unknown"]["refused"]) < LEAST:
        raise PhotonError(
            f"unlearning: the model refuses {refused:.0%} of the reference questions, so there is no "
            "direction of refusal; tune it on such questions answered with a refusal first"
        )
    best, found = max(candidates, key=lambda one: one[1]["forget"]["refused"])
    refused = found["forget"]["refused"]
    if refused < LEAST and len(candidates) > 1:
        raise PhotonError(
            f"unlearning: of {len(candidates)} candidates none refuses more than {refused:.0%} of what is to "
            f"be forgotten (layer {best.layer}, ridge {best.ridge:g}, coefficient {best.coefficient:g}; "
            f"recall {found['forget']['rouge1']:.2f} there, {found['retain']['rouge1']:.2f} on what stays); "
            "try other objective.layers, ridges and coefficients, or name one of each"
        )


def _told(sums: VectorSums, layers: Sequence[int]) -> dict[str, Tensor]:
    told: dict[str, Tensor] = {}
    for place, layer in enumerate(layers):
        told[_of(layer, "reference")] = sums.reference[place]
        told[_of(layer, "forget")] = sums.forget[place]
        told[_of(layer, "rows")] = torch.stack([sums.reference_rows[place], sums.forget_rows[place]])
    return told


def _told_grams(sums: Mapping[int, GramSums]) -> dict[str, Tensor]:
    told: dict[str, Tensor] = {}
    for layer, of in sums.items():
        told |= {_of(layer, "upper"): of.upper, _of(layer, "forget"): of.forget, _of(layer, "rows"): of.rows}
    return told
