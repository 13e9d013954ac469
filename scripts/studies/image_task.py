"""The task that SparsyFed was measured on: CIFAR-10, dealt out by label, and a ResNet-18 of any width."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Images:
    """Images, float32 of shape (n, 3, side, side) in [-1, 1], and their labels, int64 of shape (n,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Any) -> "Images":
        return Images(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator["Images"]:
        for start in range(0, len(self), size):
            yield self[start : start + size]


def read_images(folder: Path, shrink: int) -> dict[str, Images]:
    """Return the images under train/ and test/ of the archive in ``folder``, labels in alphabetical order.

    A pixel is the mean of a square of ``shrink`` × ``shrink``.
    """
    (archive,) = folder.glob("*.tar.gz")
    found: dict[str, list[tuple[str, np.ndarray[Any, np.dtype[np.uint8]]]]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is not None:
                part, label, _ = member.name.rsplit("/", 2)
                pixels = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                found[part].append((label, pixels))
    labels = sorted({label for label, _ in found["train"]})
    images = {}
    for part, own in found.items():
        stacked = torch.from_numpy(np.stack([one for _, one in own])).permute(0, 3, 1, 2) / 255
        images[part] = Images(
            (functional.avg_pool2d(stacked, shrink) - 0.5) / 0.5,
            torch.tensor([labels.index(label) for label, _ in own]),
        )
    return images


def deal(
    labels: "np.ndarray[Any, np.dtype[np.int64]]", clients: int, alpha: float, draw: np.random.Generator
) -> list[list[int]]:
    """Deal images out: equally many to each silo, of labels in shares drawn from Dirichlet(``alpha``).

    A label that is used up is drawn no more; a silo whose labels all are takes what there is.
    """
    pools = [draw.permutation(np.flatnonzero(labels == label)).tolist() for label in range(labels.max() + 1)]
    dealt: list[list[int]] = []
    for _ in range(clients):
        shares = draw.dirichlet([alpha] * len(pools))
        own = []
        for _ in range(len(labels) // clients):
            there = np.array([bool(pool) for pool in pools])
            left = shares * there if (shares * there).sum() > 0 else there
            own.append(pools[draw.choice(len(pools), p=left / left.sum())].pop())
        dealt.append(own)
    return dealt


class Block(nn.Module):
    """Two 3 × 3 convolutions with BatchNorm, and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.around = nn.Sequential()
        if stride > 1:
            self.around = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(around(x) + convolutions(x))."""
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.around(x) + self.norm2(self.conv2(inner)))


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 × 32: a 3 × 3 stem of stride 1, and ``width`` channels, at first."""

    def __init__(self, width: int, labels: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            *(
                Block(width << max(0, stage - (half == 0)), width << stage, 1 + (stage > 0 and half == 0))
                for stage in range(4)
                for half in range(2)
            )
        )
        self.head = nn.Linear(width << 3, labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # The paper's: truncated at two deviations, with a deviation of fan_in^(-1/2) after that.
                deviation = module.weight[0].numel() ** -0.5 / 0.87962566
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, float32 of shape (n, labels)."""
        x = self.blocks(functional.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))
