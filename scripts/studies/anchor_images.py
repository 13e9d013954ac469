"""The part of the study of anchors that is on images: the same losses and labels around a small network."""

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from image_task import Images, deal, read_images
from results import Result, Runs
from torch import Tensor, nn
from torch.nn import functional

from photon.models.heads import projection
from photon.objective.anchor import mixture_loss
from photon.objective.augment import mixing_share
from photon.objective.contrastive import label_contrastive_loss
from photon.objective.pseudo_labels import Anchors, class_scores, labelled, selected

CLIENTS, COHORT, UNLABELLED, ALPHA = 10, 3, 4000, 0.3
ROUNDS, BATCH, RATE, TAU = 8, 32, 0.03, 0.1
#: Epochs of the server before the first round, and in each.
FIRST, EPOCHS = 20, 2
COVERAGE = 0.5
#: Labelled images of each class.
ANCHORS = (25,)
METHODS = ("anchors alone", "SemiFL", "FedAnchor", "full supervision")
CLASSES = 10


class Net(nn.Module):
    """Three convolutions, each at half of the size, with a classifier and a projection."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 1, 1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
        self.backbone = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, 64), nn.ReLU())
        self.classes, self.anchors = nn.Linear(64, CLASSES), projection(64, 32, 2)


@dataclass(frozen=True)
class Task:
    """The images of a seed: the anchors, the silos' own with labels that nobody trains on, and a test set."""

    anchors: Images
    silos: list[Images]
    test: Images


def run_missing(runs: Runs, data: Path, work: Path, seed: int) -> None:
    torch.set_num_threads(1)
    images = read_images(data / "cifar10-jpeg-12k", 2)
    for count in ANCHORS:
        for method in METHODS:
            name = f"images-{method.replace(' ', '-')}-anchors{count}-seed{seed}"
            runs.once(name, partial(train, method, count, seed, images))


def task_of(images: dict[str, Images], count: int, seed: int) -> Task:
    draw = np.random.default_rng(seed)
    labels = images["train"].labels.numpy()
    own = np.concatenate([draw.permutation(np.flatnonzero(labels == one))[:count] for one in range(CLASSES)])
    rest = draw.permutation(np.setdiff1d(np.arange(len(labels)), own))[:UNLABELLED]
    pool = images["train"][torch.from_numpy(rest)]
    silos = [pool[one] for one in deal(pool.labels.numpy(), CLIENTS, ALPHA, draw)]
    return Task(images["train"][torch.from_numpy(own)], silos, images["test"])


def weak(images: Tensor) -> Tensor:
    """Return images that are mirrored, or not, and moved by up to two pixels."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    padded = functional.pad(mirrored, (2, 2, 2, 2))
    down, right = (int(torch.randint(5, ())) for _ in range(2))
    return padded[:, :, down : down + images.shape[2], right : right + images.shape[3]]


def strong(images: Tensor) -> Tensor:
    """Return weak variants with other brightness and contrast, and a square of six pixels left out."""
    found = weak(images) * (0.6 + 0.8 * torch.rand(len(images), 1, 1, 1))
    found = found + 0.3 * torch.randn(len(images), 3, 1, 1)
    top, left = (int(torch.randint(images.shape[2] - 5, ())) for _ in range(2))
    found[:, :, top : top + 6, left : left + 6] = 0
    return found


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def optimizer_of(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)


def on_server(net: Net, anchors: Images, epochs: int, weight: float) -> None:
    optimizer = optimizer_of(list(net.parameters()))
    for _ in range(epochs):
        for batch in torch.randperm(len(anchors)).split(BATCH):
            own = anchors[batch]
            into = net.backbone(weak(own.images))
            loss = functional.cross_entropy(net.classes(into), own.labels)
            if weight:
                loss = loss + weight * label_contrastive_loss(net.anchors(into), own.labels, TAU)
            step(optimizer, loss)


def latent(net: Net, images: Tensor) -> Tensor:
    return functional.normalize(net.anchors(net.backbone(images)), dim=1)


@torch.no_grad()
def given(net: Net, silo: Images, method: str, anchors: Images) -> tuple[Tensor, Tensor]:
    """Return a silo's labels, and which of its images are trained on."""
    if method == "full supervision":
        return silo.labels, torch.arange(len(silo))
    if method == "SemiFL":
        found, sure = labelled(net.classes(net.backbone(silo.images)), "softmax", 1.0)
    else:
        shown = Anchors(latent(net, anchors.images), anchors.labels).means(CLASSES)
        found, sure = labelled(class_scores(latent(net, silo.images), shown, CLASSES, "mean"), "softmax", TAU)
    return found, selected(sure, None, COVERAGE)


def on_client(net: Net, silo: Images, labels: Tensor, chosen: Tensor) -> None:
    optimizer = optimizer_of([*net.backbone.parameters(), *net.classes.parameters()])
    others = torch.randint(len(silo), (len(chosen),))
    order = torch.randperm(len(silo)) % len(chosen)
    for batch in order.split(BATCH):
        one, other, share = chosen[batch], others[batch], mixing_share(0.75)
        fixed = net.classes(net.backbone(strong(silo.images[one])))
        mixed = share * silo.images[one] + (1 - share) * silo.images[other]
        loss = functional.cross_entropy(fixed, labels[one])
        loss = loss + mixture_loss(net.classes(net.backbone(mixed)), labels[one], labels[other], share)
        step(optimizer, loss)


def train(method: str, count: int, seed: int, images: dict[str, Images]) -> Result:
    """Do the rounds of one run."""
    torch.manual_seed(seed)
    task, net = task_of(images, count, seed), Net()
    weight = 0.0 if method == "SemiFL" else 1.0
    on_server(net, task.anchors, FIRST, weight)
    draw, rounds = np.random.default_rng(seed + 1000), []
    for _ in range(ROUNDS):
        replies, right, covered = [], [], []
        cohort: list[int] = []
        if method != "anchors alone":
            cohort = draw.choice(CLIENTS, COHORT, replace=False).tolist()
        for silo in (task.silos[one] for one in cohort):
            mine = copy.deepcopy(net)
            labels, chosen = given(mine, silo, method, task.anchors)
            right.append(float((labels[chosen] == silo.labels[chosen]).float().mean()))
            covered.append(len(chosen) / len(silo))
            on_client(mine, silo, labels, chosen)
            replies.append(mine.state_dict())
        if replies:
            mean = {name: torch.stack([one[name] for one in replies]).mean(0) for name in replies[0]}
            net.load_state_dict(mean)
        # All methods are compared at the same place of a round.
        on_server(net, task.anchors, EPOCHS, weight)
        rounds.append(
            {
                "accuracy": accuracy(net, task.test),
                "right": round(sum(right) / len(right), 4) if right else None,
                "coverage": round(sum(covered) / len(covered), 4) if covered else 0.0,
            }
        )
    return {
        "part": "images",
        "method": method,
        "place": METHODS.index(method),
        "anchors": count,
        "seed": seed,
        "rounds": rounds,
        "figure": rounds[-1]["accuracy"],
    }


@torch.no_grad()
def accuracy(net: Net, test: Images) -> float:
    found = net.classes(net.backbone(test.images)).argmax(1)
    return round(float((found == test.labels).float().mean()), 4)
