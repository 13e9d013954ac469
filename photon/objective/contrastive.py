"""The label contrastive loss of FedAnchor (2402.10191): alike where labels are, and apart elsewhere."""

from typing import Literal

import torch
from torch import Tensor

#: ``supcon``: the mean over positives is outside the logarithm; ``log_of_sum``: inside.
Contrastive = Literal["supcon", "log_of_sum"]


def label_contrastive_loss(
    latent: Tensor, labels: Tensor, tau: float, form: Contrastive = "supcon"
) -> Tensor:
    """Return the label contrastive loss of a batch.

    With s_ij = z_i · z_j / τ, where z are the rows at length 1, and P(i) the others of i's label:

        supcon:      −mean_i (1/|P(i)|) Σ_{p∈P(i)} log [ exp(s_ip) / Σ_{j≠i} exp(s_ij) ]
        log_of_sum:  −mean_i log [ Σ_{p∈P(i)} exp(s_ip) / Σ_{j≠i} exp(s_ij) ]

    over those i that have a P(i). Without any it is 0.

    Parameters
    ----------
    latent
        Projections of the batch, (n, dimension), of any length.
    labels
        Whole numbers, (n,).
    tau
        τ, above 0.

    Returns
    -------
    Tensor
        float32 scalar.
    """
    unit = torch.nn.functional.normalize(latent.float(), dim=1)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = (labels[:, None] == labels[None, :]) & others
    similar = (unit @ unit.T) / tau
    counts = positives.sum(1)
    anchors = counts > 0
    # Rows without a positive have no finite logarithm, and a gradient through it would be NaN: they go first.
    similar, positives, others = similar[anchors], positives[anchors], others[anchors]
    if not len(similar):
        return unit.sum() * 0.0
    everything = similar.masked_fill(~others, -torch.inf).logsumexp(1)
    if form == "log_of_sum":
        return (everything - similar.masked_fill(~positives, -torch.inf).logsumexp(1)).mean()
    alike = torch.where(positives, similar, 0.0).sum(1) / counts[anchors]
    return (everything - alike).mean()
