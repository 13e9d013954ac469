"""FedAnchor (2402.10191): labels for silos without any, from a few labelled texts at the aggregator.

The aggregator's own silo holds the labelled texts, the anchors. It trains a classifier c and a projection a
on the hidden states f of a language model,

    L = CE(c(f(x)), y) + λ · L_lc(z, y),   z(x) = a(f(x)) / ‖a(f(x))‖,

and its anchors' z go to the silos. Each of them labels its own texts once a round, keeps those that it is
sure of, and trains the classifier on variants of them:

    L = CE(c(f(strong(x))), ŷ) + w · [ λ CE(c(x_mix), ŷ) + (1 − λ) CE(c(x_mix), ŷ_m) ],

x_mix = λ e(x) + (1 − λ) e(x_m) of the embeddings, x_m any of its texts, λ ~ Beta(α, α).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from photon.data.silo_data import SiloData
from photon.errors import PhotonError, RefusedError
from photon.models.heads import (
    ANCHOR_HEAD,
    CLASS_HEAD,
    add_heads,
    embedded,
    head_of,
    is_of_head,
    pooled,
    without_heads,
)
from photon.objective.augment import drop_tokens, mixing_share, real, shuffle_spans
from photon.objective.base import Evaluation, Objective, Shapes, Work
from photon.objective.contrastive import Contrastive, label_contrastive_loss
from photon.objective.perplexity import batches_of, reading
from photon.objective.pseudo_labels import (
    Anchors,
    Confidence,
    Score,
    class_scores,
    labelled,
    selected,
)
from photon.training.groups import StateGroups, Tensors
from photon.training.hooks import Batch, Loss
from photon.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The anchors as they travel: ``vectors`` and ``labels``, −1 where a row has no anchor.
ANCHORS = "shared/anchors"
#: Where labels come from: the anchors, the classifier (as in SemiFL), or the texts' own.
Labels = Literal["anchors", "classifier", "own"]
#: Texts of a forward pass without gradients.
_PASS = 64
_NONE = -1


@dataclass(frozen=True)
class _Given:
    """What a silo's texts were given: labels, how sure they are, and which are trained on."""

    labels: Tensor
    chosen: Tensor
    figures: dict[str, float]


class AnchorLabels(Objective):
    """Learn to label texts from anchors; see the module.

    Parameters
    ----------
    classes
        Names of the classes. Labels of prepared data are told by name.
    labels
        Where a silo's labels come from: ``"anchors"``; ``"classifier"``, as in SemiFL; ``"own"``: those that
        its texts have, which is full supervision.
    contrastive, tau, lambda_lc
        The contrastive loss: its form, τ, and its weight; 0: there is none.
    backbone_in_contrastive
        Whether its gradient reaches the language model, or stops at the projection.
    proj_dim, proj_layers
        Of the projection a.
    score, neighbours
        How a text is like a class, as of `photon.objective.pseudo_labels.class_scores`.
    confidence, score_tau
        How sure a label is, as of `labelled`; null: τ, or 1 for the classifier.
    threshold
        Least confidence of a label that is trained on; above 1 none is. null:
    coverage
        the share of a silo's texts that is trained on, the surest ones.
    send
        What travels: ``"all"`` anchors or ``"means"`` of classes.
    max_anchors
        Most anchors that may travel.
    anchor_dtype
        In which format they do.
    server_order
        Whether the aggregator's silo trains ``"before"`` the others or ``"after"`` them in each round.
    mix_loss_weight, alpha
        w and α of the mixtures.
    token_dropout, span
        The strong variant: the share of tokens that is left out, and tokens of a span of those that are put
        in another order; 0: neither.
    """

    arrays = ("tokens", "lengths", "labels")
    shards = False
    from_server_silo = True

    def __init__(
        self,
        *,
        classes: list[str],
        labels: Labels = "anchors",
        contrastive: Contrastive = "supcon",
        tau: float = 0.1,
        lambda_lc: float = 1.0,
        backbone_in_contrastive: bool = True,
        proj_dim: int = 128,
        proj_layers: int = 2,
        score: Score = "mean",
        neighbours: int = 5,
        confidence: Confidence = "softmax",
        score_tau: float | None = None,
        threshold: float | None = 0.95,
        coverage: float | None = None,
        send: Literal["all", "means"] = "all",
        max_anchors: int = 1024,
        anchor_dtype: Literal["float32", "float16"] = "float32",
        server_order: Literal["before", "after"] = "before",
        mix_loss_weight: float = 1.0,
        alpha: float = 0.75,
        token_dropout: float = 0.1,
        span: int = 8,
    ) -> None:
        _check_classes(classes)
        for name, value, least in (
            ("lambda_lc", lambda_lc, 0),
            ("proj_dim", proj_dim, 1),
            ("proj_layers", proj_layers, 1),
            ("neighbours", neighbours, 1),
            ("max_anchors", max_anchors, len(classes)),
            ("mix_loss_weight", mix_loss_weight, 0),
            ("alpha", alpha, 0),
            ("span", span, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value:g}: must be at least {least}")
        for name, value in (("tau", tau), ("score_tau", 1.0 if score_tau is None else score_tau)):
            if not value > 0:
                raise ValueError(f"{name}={value:g}: must be above 0")
        if not 0 <= token_dropout < 1:
            raise ValueError(f"token_dropout={token_dropout:g}: must be from 0 to below 1")
        if (threshold is None) == (coverage is None):
            raise ValueError("threshold and coverage: set one of them, and the other to null")
        if coverage is not None and not 0 <= coverage <= 1:
            raise ValueError(f"coverage={coverage:g}: a share from 0 to 1")
        if send == "means" and score != "mean":
            raise ValueError(f"send=means: score={score} looks at each anchor; set send=all")
        self.classes = list(classes)
        self.labels, self.send = labels, send
        self.server_order, self.needs_server_silo = server_order, labels != "own"
        self.contrastive, self.tau, self.lambda_lc = contrastive, tau, lambda_lc
        self.backbone_in_contrastive = backbone_in_contrastive
        self.proj_dim, self.proj_layers = proj_dim, proj_layers
        self.score, self.neighbours, self.confidence = score, neighbours, confidence
        self.score_tau = score_tau or (tau if labels == "anchors" else 1.0)
        self.threshold, self.coverage = threshold, coverage
        self.max_anchors, self.anchor_dtype = max_anchors, getattr(torch, anchor_dtype)
        self.mix_loss_weight, self.alpha = mix_loss_weight, alpha
        self.token_dropout, self.span = token_dropout, span

    # --- the model ------------------------------------------------------------------------------------

    def build(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the model with both heads."""
        return add_heads(model, classes=len(self.classes), dimension=self.proj_dim, layers=self.proj_layers)

    def plain(self, params: Tensors) -> Tensors:
        """Return the parameters without those of the heads."""
        return without_heads(params)

    def still(self, params: Collection[str], *, own: bool) -> frozenset[str]:
        """Return the projection's parameters for a silo: the aggregator's own trains them alone."""
        return frozenset(() if own else (name for name in params if is_of_head(name, ANCHOR_HEAD)))

    # --- what a silo trains on ------------------------------------------------------------------------

    def check_silo(self, data: SiloData, *, own: bool) -> None:
        """Check that the anchors are what the run can use, before it starts.

        Raises
        ------
        PhotonError
            If the aggregator's silo has a label that is none of the classes, a class without an anchor, or
            too many anchors.
        """
        if not own:
            return
        silo = ", ".join(data.members)
        known = self._known(data)
        counts = np.bincount(known[known >= 0], minlength=len(self.classes))
        unknown = sorted({data.classes[i] for i in np.unique(_labels(data)) if i >= 0} - set(self.classes))
        if unknown:
            raise PhotonError(
                f"{silo}: its label {unknown[0]!r} is none of objective.classes ({', '.join(self.classes)}); "
                "add it there, or leave these texts out"
            )
        if missing := [name for name, count in zip(self.classes, counts, strict=True) if not count]:
            raise PhotonError(
                f"{silo}: has no anchor of the class {missing[0]!r}, so nothing could be labelled with it; "
                "give it one, or remove the class from objective.classes"
            )
        if self.send == "all" and self.labels == "anchors" and counts.sum() > self.max_anchors:
            raise PhotonError(
                f"{silo}: has {counts.sum():,} anchors, and objective.max_anchors={self.max_anchors:,}; "
                "raise that, or set objective.send=means"
            )

    def prepare(
        self,
        model: nn.Module,
        data: SiloData,
        received: StateGroups,
        *,
        server_round: int,
        seed: int,
        own: bool,
    ) -> Work:
        """Give labels to a silo's texts, and choose those that it is sure of; see `Objective.prepare`."""
        truth = torch.from_numpy(self._known(data))
        if own:
            anchors = torch.nonzero(truth >= 0)[:, 0]
            return Work(anchors, {"labels": truth[anchors, None]}, {"anchors": float(len(anchors))})
        given = self._given(model, data, received, truth)
        if not len(given.chosen):
            return Work(given.chosen, figures=given.figures)
        draws = torch.Generator().manual_seed(seed)
        able = torch.nonzero(given.labels >= 0)[:, 0]
        others = able[torch.randint(len(able), (len(given.chosen),), generator=draws)]
        tokens, lengths = _texts(data)
        arrays = {
            "pseudo": given.labels[given.chosen, None],
            "mix_tokens": torch.from_numpy(tokens[others.numpy()].astype(np.int64)),
            "mix_lengths": torch.from_numpy(lengths[others.numpy()].astype(np.int64)),
            "mix_pseudo": given.labels[others, None],
        }
        return Work(given.chosen, arrays, given.figures)

    def _given(self, model: nn.Module, data: SiloData, received: StateGroups, truth: Tensor) -> _Given:
        if self.labels == "own":
            chosen = torch.nonzero(truth >= 0)[:, 0]
            return _Given(truth, chosen, {"coverage": len(chosen) / len(truth)})
        if self.labels == "anchors" and ANCHORS not in received:
            # The aggregator's silo has not trained yet.
            return _Given(torch.full_like(truth, _NONE), torch.empty(0, dtype=torch.int64), {"coverage": 0.0})
        scores = self._scores(model, data, received)
        best, sure = labelled(scores, self.confidence, self.score_tau)
        chosen = selected(sure, self.threshold, self.coverage)
        figures = {"coverage": len(chosen) / len(truth), "confidence": float(sure.mean())}
        if bool((known := truth >= 0).any()):
            right = best == truth
            figures["pseudo_label_accuracy_all"] = float(right[known].float().mean())
            if bool(known[chosen].any()):
                figures["pseudo_label_accuracy"] = float(right[chosen][known[chosen]].float().mean())
        return _Given(best, chosen, figures)

    def _scores(self, model: nn.Module, data: SiloData, received: StateGroups) -> Tensor:
        """Return how much each text is like each class, (texts, classes), on the CPU."""
        if self.labels == "classifier":
            head = head_of(model, CLASS_HEAD)
            return torch.cat([head(states).float().cpu() for states in _states(model, data)])
        anchors = self.read_anchors(received[ANCHORS])
        if self.score == "mean":
            anchors = anchors.means(len(self.classes))
        latent = torch.cat([self._latent(model, states).cpu() for states in _states(model, data)])
        return class_scores(latent, anchors, len(self.classes), self.score, self.neighbours)

    @staticmethod
    def _latent(model: nn.Module, states: Tensor) -> Tensor:
        projected: Tensor = head_of(model, ANCHOR_HEAD)(states)
        return nn.functional.normalize(projected.float(), dim=1)

    def _known(self, data: SiloData) -> np.ndarray:
        """Return the class of each training text by its number in ``classes``; −1: none, or another one."""
        return self._numbered(_labels(data), data.classes)

    def _numbered(self, labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
        # The last entry is that of −1.
        numbers = [self.classes.index(name) if name in self.classes else _NONE for name in names]
        return np.array([*numbers, _NONE], dtype=np.int64)[labels]

    # --- the anchors ----------------------------------------------------------------------------------

    def shares(self, params: Mapping[str, torch.Size]) -> Shapes:
        """Return the shape of the anchors, where silos need them."""
        if self.labels != "anchors":
            return {}
        rows = self.max_anchors if self.send == "all" else len(self.classes)
        return {ANCHORS: {"vectors": torch.Size([rows, self.proj_dim]), "labels": torch.Size([rows])}}

    def share(self, model: nn.Module, data: SiloData) -> StateGroups:
        """Return the anchors as the model places them now."""
        if self.labels != "anchors":
            return {}
        known = torch.from_numpy(self._known(data))
        latent = torch.cat([self._latent(model, states).cpu() for states in _states(model, data)])
        anchors = Anchors(latent[known >= 0], known[known >= 0])
        if self.send == "means":
            anchors = anchors.means(len(self.classes))
        shape = self.shares({})[ANCHORS]["vectors"]
        vectors = torch.zeros(shape, dtype=self.anchor_dtype)
        labels = torch.full(shape[:1], float(_NONE))
        vectors[: len(anchors.vectors)] = anchors.vectors.to(self.anchor_dtype)
        labels[: len(anchors.labels)] = anchors.labels.float()
        return {ANCHORS: {"vectors": vectors, "labels": labels}}

    def read_anchors(self, tensors: Tensors) -> Anchors:
        """Return anchors that came, which have the shapes of `shares`.

        Raises
        ------
        PhotonError
            If they are not anchors of this run's classes.
        """
        vectors, labels = tensors["vectors"].cpu().float(), tensors["labels"].cpu().float()
        if not (torch.isfinite(vectors).all() and torch.isfinite(labels).all()):
            raise PhotonError("objective: an anchor that came holds a value that is not finite")
        if bool(((labels != labels.round()) | (labels < _NONE) | (labels >= len(self.classes))).any()):
            raise PhotonError(f"objective: an anchor that came has none of the {len(self.classes)} labels")
        there = labels >= 0
        if not bool(there.any()):
            raise PhotonError("objective: no anchor came")
        if float(vectors[there].norm(dim=1).max()) > 1.01:
            raise PhotonError("objective: an anchor that came is longer than 1")
        return Anchors(vectors[there], labels[there].long())

    # --- the loss -------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch, rows: Tensor | None) -> Loss:
        """Return the loss of a batch of anchors, or of texts that were given labels."""
        if rows is not None:
            raise PhotonError("objective: a classifier reads all of the vocabulary")
        return self._loss_of_texts(model, batch) if "pseudo" in batch else self._loss_of_anchors(model, batch)

    def _loss_of_anchors(self, model: nn.Module, batch: Batch) -> Loss:
        tokens, labels = batch["tokens"], batch["labels"][:, 0]
        states = pooled(model, real(tokens, batch["lengths"]), tokens=tokens)
        logits = head_of(model, CLASS_HEAD)(states).float()
        entropy = nn.functional.cross_entropy(logits, labels)
        with torch.no_grad():
            figures = {"train_accuracy": (logits.argmax(1) == labels).float().mean()}
        if not self.lambda_lc:
            return Loss(entropy, figures)
        into = states if self.backbone_in_contrastive else states.detach()
        latent = head_of(model, ANCHOR_HEAD)(into)
        contrastive = label_contrastive_loss(latent, labels, self.tau, self.contrastive)
        figures["contrastive_loss"] = contrastive.detach()
        return Loss(entropy + self.lambda_lc * contrastive, figures)

    def _loss_of_texts(self, model: nn.Module, batch: Batch) -> Loss:
        tokens, lengths, labels = batch["tokens"], batch["lengths"], batch["pseudo"][:, 0]
        head, entropy = head_of(model, CLASS_HEAD), nn.functional.cross_entropy
        mask = real(tokens, lengths)
        strong = shuffle_spans(tokens, lengths, self.span)
        states = pooled(model, drop_tokens(mask, self.token_dropout), tokens=strong)
        fixed = entropy(head(states).float(), labels)
        if not self.mix_loss_weight:
            return Loss(fixed)
        share = mixing_share(self.alpha)
        # What fills a row counts for nothing in the mixture.
        first, second = share * mask, (1 - share) * real(batch["mix_tokens"], batch["mix_lengths"])
        vectors = first[..., None] * embedded(model, tokens)
        vectors = vectors + second[..., None] * embedded(model, batch["mix_tokens"])
        logits = head(pooled(model, first + second, vectors=vectors)).float()
        mixed = mixture_loss(logits, labels, batch["mix_pseudo"][:, 0], share)
        return Loss(fixed + self.mix_loss_weight * mixed, {"mix_loss": mixed.detach()})

    def evaluate(
        self,
        model: "PreTrainedModel",
        data: SiloData,
        rows: Tensor | None,
        *,
        batch_size: int,
        device: torch.device,
        precision: Precision,
        limit: int | None,
    ) -> Evaluation:
        """Return the summed cross-entropy of the classifier, and how often it is right.

        Raises
        ------
        RefusedError
            If no validation text has a label of the run's.
        """
        loss, right, count = 0.0, 0.0, 0
        with reading(model, device, precision):
            for arrays in data.arrays("validation"):
                truth = self._numbered(arrays["labels"], data.classes)
                of_labelled = {name: array[truth[:, 0] >= 0] for name, array in arrays.items()}
                of_labelled["labels"] = truth[truth[:, 0] >= 0]
                for batch in batches_of(
                    of_labelled, model, batch_size=batch_size, device=device, limit=limit
                ):
                    mask = real(batch["tokens"], batch["lengths"])
                    logits = head_of(model, CLASS_HEAD)(pooled(model, mask, tokens=batch["tokens"])).float()
                    labels = batch["labels"][:, 0]
                    loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                    right += float((logits.argmax(1) == labels).sum())
                    count += len(labels)
        if not count:
            raise RefusedError(f"{', '.join(data.members)} has no validation text with a label of the run's")
        return Evaluation({"loss": loss, "accuracy": right}, count)

    def classify(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return the classifier's logits of texts of one length, (texts, classes)."""
        states = pooled(model, torch.ones_like(tokens), tokens=tokens)
        logits: Tensor = head_of(model, CLASS_HEAD)(states).float()
        return logits

    def sample(self, size: int, sequence_length: int) -> Batch:
        """Return a batch of texts that were given labels, which takes the most memory."""
        tokens = torch.zeros((size, sequence_length), dtype=torch.int64)
        lengths = torch.full((size, 1), sequence_length)
        labels = torch.zeros((size, 1), dtype=torch.int64)
        texts = {"tokens": tokens, "lengths": lengths, "labels": labels, "pseudo": labels}
        return {**texts, "mix_tokens": tokens, "mix_lengths": lengths, "mix_pseudo": labels}


def mixture_loss(logits: Tensor, labels: Tensor, others: Tensor, share: float) -> Tensor:
    """Return λ CE(logits, labels) + (1 − λ) CE(logits, others) of mixtures λ x + (1 − λ) x_m.

    Parameters
    ----------
    logits
        Of the mixtures, (n, classes).
    labels, others
        Classes of x and of x_m, (n,).
    share
        λ.
    """
    entropy = nn.functional.cross_entropy
    return share * entropy(logits, labels) + (1 - share) * entropy(logits, others)


def _check_classes(classes: Sequence[str]) -> None:
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ValueError("classes: name two or more, each once")


def _texts(data: SiloData) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens, and lengths of the training texts of all members one after the other."""
    arrays = data.arrays("train")
    return tuple(_joined([one[name] for one in arrays]) for name in ("tokens", "lengths"))  # type: ignore[return-value]


def _labels(data: SiloData) -> np.ndarray:
    """Return the labels of the training texts, by their number in the data's own classes."""
    return _joined([one["labels"] for one in data.arrays("train")])[:, 0]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _states(model: nn.Module, data: SiloData) -> Iterator[Tensor]:
    """Yield the pooled hidden states of the training texts, some at a time, on the model's device."""
    tokens, lengths = _texts(data)
    device = next(model.parameters()).device
    for start in range(0, len(tokens), _PASS):
        part = slice(start, start + _PASS)
        some = torch.from_numpy(tokens[part].astype(np.int64)).to(device)
        of_some = torch.from_numpy(lengths[part].astype(np.int64)).to(device)
        yield pooled(model, real(some, of_some), tokens=some)
