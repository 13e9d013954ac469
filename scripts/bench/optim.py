"""A step of each local optimizer of Photon's own against torch's AdamW (foreach) on the same parameters.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench/optim.py

The parameters have the shapes of photon-125m with fewer layers and a smaller vocabulary. Ratios are those of
rates: 0.87 means that a step takes 1.15 times as long. LoRDO finds its bases anew once in --period
steps: every turn does it for the matrices that its share of the period comes to. RefreshedAdamW is told of a
sync in every turn in which a period ends: with --steps of a period, in each.

Photon lets waiting threads sleep, which has to be said before torch is imported. On a busy machine
threads that spin make every small operation slow, and an update in blocks has many of them.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from common import Report, at_least, interleave, parser
from torch import nn

from photon.optim import ADOPT, QHADOPT, LoRDO, MuonAdamW, QHAdamW, RefreshedAdamW
from photon.optim.orthogonal import BatchedMuon

REFERENCE = "AdamW, foreach"
Named = list[tuple[str, nn.Parameter]]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    optimizers: dict[str, Callable[[Named], torch.optim.Optimizer]] = {
        REFERENCE: lambda p: torch.optim.AdamW(p, weight_decay=0.0, foreach=True),
        "AdamW, fused": lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=True),
        "ADOPT": ADOPT,
        "QHAdamW": QHAdamW,
        "QHAdamW, two momenta": lambda p: QHAdamW(p, betas=(0.9, 0.999, 0.999), weights=(0.05, 0.9)),
        "QHADOPT": QHADOPT,
        "RefreshedAdamW": RefreshedAdamW,
        "MuonAdamW": MuonAdamW,
        "MuonAdamW, one by one (torch's)": one_by_one,
        "LoRDO": lambda p: LoRDO(p, rank=arguments.rank),
        "LoRDO, full-rank term off": lambda p: LoRDO(p, rank=arguments.rank, weight=1.0),
    }
    chosen = {name: make for name, make in optimizers.items() if name == REFERENCE or arguments.only in name}
    cases = {name: turn(make, arguments) for name, make in chosen.items()}
    count = sum(parameter.numel() for _, parameter in parameters(arguments))
    report = Report(arguments)
    report.rates(
        f"{count:,} parameters, rank {arguments.rank}, products {arguments.matmul_precision}, "
        f"{arguments.steps} steps a turn, {arguments.turns} turns, {arguments.threads} threads",
        dict.fromkeys(cases, count * arguments.steps / 1e6),
        "million parameters",
        interleave(cases, arguments.turns),
        digits=0,
    )
    report.close()


class OneByOne(BatchedMuon):
    """The same with the step of torch's Muon."""

    step = torch.optim.Muon.step


def one_by_one(named: Named) -> torch.optim.Optimizer:
    optimizer = MuonAdamW(named)
    # The groups have all settings.
    optimizer._muon = OneByOne(optimizer._muon.param_groups)
    optimizer._share()
    return optimizer


def turn(make: Callable[[Named], torch.optim.Optimizer], arguments: argparse.Namespace) -> Callable[[], None]:
    named = parameters(arguments)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(named)
    matrices = [one for name, one in named if "weight" in name and "embed" not in name]
    turns = itertools.count()

    def run() -> None:
        number = next(turns)
        for _ in range(arguments.steps):
            optimizer.step()
        if isinstance(optimizer, LoRDO):
            due = range(
                *(len(matrices) * arguments.steps * at // arguments.period for at in (number, number + 1))
            )
            chosen = [matrices[index % len(matrices)] for index in due]
            optimizer.refresh({one: one.grad for one in chosen if one.grad is not None})
        elif isinstance(optimizer, RefreshedAdamW) and (number + 1) * arguments.steps % arguments.period == 0:
            optimizer.refresh({one: one.grad for _, one in named if one.grad is not None})

    return run


def parameters(arguments: argparse.Namespace) -> Named:
    d = arguments.width
    shapes: dict[str, tuple[int, ...]] = {"embed": (arguments.vocabulary, d), "embed.positions": (2048, d)}
    for layer in range(arguments.layers):
        for name, shape in {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = (shape[1],)
        for name in ("norm1.scale", "norm1.bias", "norm2.scale", "norm2.bias"):
            shapes[f"{layer}.{name}"] = (d,)
    generator = torch.Generator().manual_seed(0)
    return [
        (name, nn.Parameter(0.02 * torch.randn(shape, generator=generator))) for name, shape in shapes.items()
    ]


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--width", type=int, default=768)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--rank", type=int, default=96, help="of LoRDO")
    made.add_argument("--period", type=int, default=32, help="steps from one refresh of LoRDO to the next")
    made.add_argument("--steps", type=int, default=4, help="steps a turn")
    made.add_argument("--turns", type=at_least(1), default=7)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument(
        "--matmul-precision", default="highest", choices=["highest", "high", "medium"], help="of products"
    )
    made.add_argument("--only", default="", help="optimizers with this in their name, and the reference")
    return made.parse_args()


if __name__ == "__main__":
    main()
