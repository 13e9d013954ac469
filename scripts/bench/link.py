"""The link's codecs: GB of float32 a CPU second and core, both ways, their ratio and their error.

    OMP_NUM_THREADS=1 python scripts/bench/link.py
    OMP_NUM_THREADS=1 python scripts/bench/link.py --only int8 --turns 9

The tensor is drawn from a normal distribution, as large as a weight matrix of 2048 x 2048; for "bitmask" 95 %
of it are zeros. From some 32 MiB on every result comes in memory whose pages the kernel has to clear first. A
plain copy to memory that is there already is the reference. Encoding and decoding are the codecs alone: the
SHA-256 that every payload gets and is checked by is a case of its own. Folding adds a decoded update to a
mean that is there.
"""

import argparse
import hashlib
from collections.abc import Callable

import torch
from common import Report, at_least, interleave, parser, spread, timed

from photon.link.codecs import (
    E3M0,
    Bitmask,
    Cast,
    Float8,
    Int,
    PowerSGD,
    RandomK,
    Sign,
    TopK,
    TopKTiles,
    TwoBit,
    Zstd,
)
from photon.link.encoding import Codec, SparseTensor, generator
from photon.strategy.fold import WeightedMean

PIPELINES: dict[str, list[Codec]] = {
    "cast bf16": [Cast("bfloat16")],
    "cast fp16": [Cast("float16")],
    "fp8 e4m3": [Float8("float8_e4m3fn")],
    "fp8 e5m2": [Float8("float8_e5m2")],
    "int8": [Int(8)],
    "int8, stochastic": [Int(8, rounding="stochastic")],
    "int4": [Int(4, block=128)],
    "e3m0": [E3M0(block=64)],
    "sign": [Sign()],
    "topk, bf16": [TopK(), Cast("bfloat16")],
    "sparseloco": [TopKTiles(), TwoBit()],
    "top64of4096": [TopK(), TwoBit()],
    "top1of32": [TopK(k=1, chunk=32), TwoBit()],
    "1 of 28, sign": [TopK(k=1, chunk=28), Sign()],
    "1 of 8, sign": [TopK(k=1, chunk=8), Sign()],
    "random-k 1/32": [RandomK(scaled=False)],
    "bitmask, 5 %": [Bitmask()],
    "powersgd, rank 8": [PowerSGD(rank=8)],
    "zstd of float32": [Zstd(level=1, width=4)],
    "bf16, zstd": [Cast("bfloat16"), Zstd(level=1, width=2)],
    "bitmask, zstd, 5 %": [Bitmask(), Zstd(level=1)],
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    report = Report(arguments)
    rows = 4096
    columns = int(arguments.size_mb * 2**20 / 4 / rows)
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 1e-3
    sparse = torch.where(dense.abs() < 1.96e-3, 0.0, dense)
    chosen = {name: pipeline for name, pipeline in PIPELINES.items() if arguments.only in name}
    inputs = {name: sparse if "bitmask" in name else dense for name in chosen}
    pipelines = {name: Pipeline(pipeline, inputs[name]) for name, pipeline in chosen.items()}
    target = torch.empty_like(dense)
    gigabytes = dense.nbytes / 1e9
    copy: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(dense)}
    for title, cases in (
        ("encode", copy | {name: pipeline.encode for name, pipeline in pipelines.items()}),
        ("decode", copy | {name: pipeline.decode for name, pipeline in pipelines.items()}),
        ("fold the decoded update", copy | {name: folding(pipeline) for name, pipeline in pipelines.items()}),
    ):
        report.rates(
            f"{title}, {arguments.size_mb} MiB of float32, one thread",
            dict.fromkeys(cases, gigabytes),
            "GB",
            interleave(cases, arguments.turns),
            digits=2,
        )
    digest = [timed(lambda: hashlib.sha256(dense.numpy().data)) for _ in range(arguments.turns)]
    report.say(f"SHA-256: {spread([gigabytes / one.cpu for one in digest])} GB of payload / CPU second")
    report.table(
        "What arrives",
        ["codecs", "bits a value", "ratio", "relative error"],
        [
            [name, f"{pipeline.bits:.4f}", f"{32 / pipeline.bits:.1f}", f"{pipeline.error:.4f}"]
            for name, pipeline in pipelines.items()
        ],
    )
    report.close()


class Pipeline:
    """A pipeline of codecs at work on one tensor, without hash and header."""

    def __init__(self, codecs: list[Codec], tensor: torch.Tensor) -> None:
        self._codecs, self._tensor, self._draw = codecs, tensor, generator("bench")
        self._stages = self.encode()
        sides = sum(side.nbytes for _, side, _, _ in self._stages)
        # A codec of bytes takes the sides before it along.
        if codecs[-1].on_bytes:
            sides = 0
        self.bits = 8 * (self._stages[-1][0].nbytes + sides) / tensor.numel()
        decoded = self.decode()
        decoded = decoded.dense() if isinstance(decoded, SparseTensor) else decoded
        self.error = float((decoded - tensor).norm() / tensor.norm())

    def encode(self) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], torch.dtype]]:
        values = self._tensor
        stages: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...], torch.dtype]] = []
        for codec in self._codecs:
            if codec.on_bytes:
                sides = [side for _, side, _, _ in stages]
                values = torch.cat([*sides, values.reshape(-1).view(torch.uint8)])
            before, side = values, torch.empty(0, dtype=torch.uint8)
            encoded = codec.encode(values, self._draw)
            values = encoded.values
            if encoded.side is not None:
                side = encoded.side
            stages.append((values, side, tuple(before.shape), before.dtype))
        return stages

    def decode(self) -> torch.Tensor | SparseTensor:
        values: torch.Tensor | SparseTensor = self._stages[-1][0]
        for number in reversed(range(len(self._codecs))):
            codec, (_, side, shape, dtype) = self._codecs[number], self._stages[number]
            assert isinstance(values, torch.Tensor)
            values = codec.decode(values, side, shape, dtype)
            if codec.on_bytes:
                assert isinstance(values, torch.Tensor)
                own = self._stages[number - 1][0] if number else self._tensor
                sides = sum(stage[1].nbytes for stage in self._stages[:number])
                values = values[sides:].clone().view(own.dtype).reshape(own.shape)
        return values


def folding(pipeline: Pipeline) -> Callable[[], None]:
    update, mean = pipeline.decode(), WeightedMean()
    mean.add({"params": {"w": update}}, 1.0)
    return lambda: mean.add({"params": {"w": update}}, 1.0)


def parse_arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--size-mb", type=int, default=16, help="MiB of the tensor")
    made.add_argument("--turns", type=at_least(1), default=5)
    made.add_argument("--only", default="", help="codecs with this in their name")
    return made.parse_args()


if __name__ == "__main__":
    main()
