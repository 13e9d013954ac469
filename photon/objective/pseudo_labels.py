"""Labels that a model gives to texts without any: by their likeness to anchors, or by its own classifier."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: How a text is like a class: by the mean of its anchors, by the closest one, or by the nearest of all.
Score = Literal["mean", "max", "knn"]
#: What says how sure a label is: its share of a softmax, its score, or how far that is from the second.
Confidence = Literal["softmax", "raw", "margin"]


@dataclass(frozen=True)
class Anchors:
    """What a silo is told of the labelled texts.

    Attributes
    ----------
    vectors
        z of each anchor at length 1, or the mean of each class's, float32 of shape (n, dimension). A mean is
        not brought to length 1 again: its product with z(u) is then the mean of the anchors' products.
    labels
        Class of each row, int64 of shape (n,).
    """

    vectors: Tensor
    labels: Tensor

    def means(self, classes: int) -> "Anchors":
        """Return the mean vector of each class that has an anchor, in the order of the classes."""
        there = torch.unique(self.labels)
        if len(there) and int(there[-1]) >= classes:
            raise ValueError(f"label {int(there[-1])} of {classes} classes")
        means = [self.vectors[self.labels == label].mean(0) for label in there]
        empty = self.vectors.new_zeros((0, self.vectors.shape[1]))
        return Anchors(torch.stack(means) if means else empty, there)


def class_scores(latent: Tensor, anchors: Anchors, classes: int, score: Score, neighbours: int = 5) -> Tensor:
    """Return how much each text is like each class.

    Parameters
    ----------
    latent
        z of the texts at length 1, (n, dimension).
    neighbours
        Of ``knn``: how many of the nearest anchors are looked at. A class's score is the sum of the
        similarities of its own among them, over their number.

    Returns
    -------
    Tensor
        float32, (n, classes); −∞ for a class without an anchor.
    """
    similar = latent.float() @ anchors.vectors.float().T
    owns = torch.nn.functional.one_hot(anchors.labels, classes).T.bool()  # (classes, anchors)
    counts = owns.sum(1)
    if score == "max":
        scores = torch.where(owns[None], similar[:, None, :], -torch.inf).amax(2)
    elif score == "knn":
        most = min(neighbours, len(anchors.labels))
        nearest = similar.topk(most, dim=1).indices
        kept = torch.zeros_like(similar).scatter_(1, nearest, 1.0)
        scores = (similar * kept) @ owns.T.float() / most
    else:
        scores = similar @ owns.T.float() / counts.clamp_min(1)
    return scores.masked_fill(counts == 0, -torch.inf)


def labelled(scores: Tensor, confidence: Confidence, tau: float) -> tuple[Tensor, Tensor]:
    """Return the class of each text, and how sure that is.

    Parameters
    ----------
    scores
        Of `class_scores`, or the logits of a classifier, (n, classes).
    tau
        Of ``softmax``: what scores are divided by.

    Returns
    -------
    tuple of Tensor
        Classes, int64, and confidences, float32, both (n,).
    """
    best = scores.argmax(1)
    if confidence == "softmax":
        return best, (scores.float() / tau).softmax(1).gather(1, best[:, None])[:, 0]
    first = scores.gather(1, best[:, None])[:, 0].float()
    if confidence == "raw":
        return best, first
    others = scores.float().scatter(1, best[:, None], -torch.inf).amax(1)
    return best, first - others


def selected(sure: Tensor, threshold: float | None, coverage: float | None) -> Tensor:
    """Return which texts are sure enough, their indices in order, int64.

    Parameters
    ----------
    sure
        Confidences, (n,).
    threshold
        Least confidence; or else
    coverage
        the share of the texts to take, the surest ones. Of equally sure ones the first.
    """
    if threshold is not None:
        return torch.nonzero(sure >= threshold)[:, 0]
    if coverage is None:
        raise ValueError("neither a threshold nor a coverage")
    count = round(coverage * len(sure))
    return torch.sort(sure, descending=True, stable=True).indices[:count].sort().values
