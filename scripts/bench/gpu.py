"""What a GPU makes of a training step: tokens a second, share of its peak, memory, and where the time goes.

    python scripts/bench/gpu.py            # all four models, in less than 9 minutes
    python scripts/bench/gpu.py --tiny     # small models like them, on whatever there is: a CPU will do

Each model is trained as a silo trains it, by the same loop: forward and backward pass, clipping, AdamW,
random text, the largest micro-batch that fits. Each result is a line of --lines, which says what it was
measured on, and all lines are the table of --page. One model after another has its share of --minutes; one
that does not fit, or fails, has a line that says so.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from photon.config.compose import compose
from photon.data.loader import BatchStream
from photon.errors import PhotonError
from photon.models.build import build_model, parameter_count
from photon.models.flops import mfu, model_flops_per_token
from photon.models.head import fuse_head
from photon.objective.causal_lm import CausalLM
from photon.training.batch_probe import find_micro_batch_size
from photon.training.hardware import DTYPES, device_facts, resolve_device
from photon.training.loop import LocalTrainer, build_optimizer, enable_activation_checkpointing
from photon.training.precision import Precision, resolve_precision
from photon.training.schedule import ConstantSchedule

ROOT = Path(__file__).parents[2]
MODELS = ["photon-125m", "photon-1.3b", "llama-720m", "abbie-350m"]
#: Small ones of the same kinds.
TINY = {
    "photon-125m": ["model=tiny"],
    "photon-1.3b": ["model=tiny", "model.architecture.n_layer=6"],
    "llama-720m": [
        "model=llama-720m",
        "model.sequence_length=64",
        "model.vocab_size=512",
        *(
            f"model.architecture.{key}={value}"
            for key, value in {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            }.items()
        ),
    ],
    "abbie-350m": ["model=abbie-tiny"],
}
#: Tokens of the one sequence that is compared with the CPU.
COMPARED = 64
BEGIN, END = "<!-- gpu: made by scripts/bench/gpu.py -->", "<!-- gpu: end -->"


@dataclass
class Line:
    """What was measured of a model, and on what; ``failed`` says why there is nothing else."""

    model: str
    tiny: bool
    machine: str
    torch: str
    parameters: int = 0
    sequence_length: int = 0
    micro_batch: int = 0
    compiled: bool = False
    checkpointing: bool = False
    tokens_per_second: float = 0.0
    peak_flops: float | None = None
    mfu: float | None = None
    memory_gib: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    differs_from_cpu: dict[str, float] = field(default_factory=dict)
    failed: str | None = None


def main() -> None:
    arguments = parse_arguments()
    device = resolve_device("auto")
    if device.type != "cuda" and not arguments.tiny:
        raise SystemExit("this machine has no CUDA device; --tiny runs small models on its CPU")
    precision = resolve_precision("auto", device)
    until, models = time.monotonic() + 60 * arguments.minutes, list(arguments.models)
    for number, model in enumerate(models):
        share = (until - time.monotonic()) / (len(models) - number)
        line = measured(model, device, precision, share, arguments)
        with arguments.lines.open("a") as lines:
            lines.write(json.dumps(asdict(line)) + "\n")
        print(row(line), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(arguments.lines, arguments.page)


def measured(
    name: str, device: torch.device, precision: Precision, share: float, arguments: argparse.Namespace
) -> Line:
    """Return the line of a model, in about ``share`` seconds."""
    machine, peak = device_facts(device, precision)
    if device.type == "cpu":
        machine = f"{machine}, {platform.machine()}"
    line = Line(name, arguments.tiny, machine, str(torch.__version__), peak_flops=peak)
    line.compiled, line.checkpointing = not arguments.no_compile, arguments.checkpointing
    try:
        measure(line, device, precision, share)
    except (PhotonError, RuntimeError) as error:
        line.failed = " ".join(str(error).split())[:200]
    return line


def measure(line: Line, device: torch.device, precision: Precision, share: float) -> None:
    ends = time.monotonic() + share
    config = compose(TINY[line.model] if line.tiny else [f"model={line.model}"])
    vocabulary, line.sequence_length = config.model.vocab_size or 512, config.model.sequence_length
    model = build_model(config.model, vocabulary, seed=0)
    line.parameters = parameter_count(model)
    per_token = model_flops_per_token(model, line.sequence_length)
    expected = one_sequence(model, torch.device("cpu"), "fp32")
    torch.nn.Module.to(model, device)
    fuse_head(model, device)
    found = one_sequence(model, device, precision)
    line.differs_from_cpu = {key: abs(found[key] / expected[key] - 1) for key in expected}
    if line.checkpointing:
        enable_activation_checkpointing(model)
    optimizer = build_optimizer(config.optimizer.as_mapping(), model)
    step = step_of(model, device, precision, line.sequence_length)
    batch = config.model.recipe.local_batch_size
    # Gradients and moments take their room before activations are given the rest.
    step(1)
    optimizer.step()
    line.micro_batch = find_micro_batch_size(step, batch)
    trainer = LocalTrainer(
        model,
        optimizer,
        ConstantSchedule(),
        loss=CausalLM().loss,
        batch_size=line.micro_batch,
        micro_batch_size=None,
        clip_norm=config.training.clip_norm,
        precision=precision,
        device=device,
        compile_mode="default" if line.compiled else None,
    )
    drawn = np.random.default_rng(0).integers(0, vocabulary, (4 * batch, line.sequence_length + 1))
    stream = BatchStream({"tokens": [drawn.astype(np.uint16)]}, seed=0, tokens=line.sequence_length)
    trainer.train(stream, global_step=0, steps=3)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    line.seconds = breakdown(trainer, stream, device)
    result = trainer.train(stream, global_step=3, steps=2)
    steps = max(2, min(200, int(0.6 * (ends - time.monotonic()) * result.steps / result.seconds)))
    if not line.tiny:
        result = trainer.train(stream, global_step=5, steps=steps)
    line.tokens_per_second = result.tokens / result.seconds
    line.mfu = mfu(line.tokens_per_second, per_token, line.peak_flops)
    if device.type == "cuda":
        line.memory_gib = torch.cuda.max_memory_allocated() / 2**30


def one_sequence(model: torch.nn.Module, device: torch.device, precision: Precision) -> dict[str, float]:
    """Return the loss of one short sequence, and the norm of its gradient."""
    tokens = (torch.arange(COMPARED, device=device) * 7 % 97)[None]
    model.train()
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        loss = CausalLM().loss(model, {"tokens": tokens}, None).value
    loss.backward()
    norm = torch.nn.utils.get_total_norm([one.grad for one in model.parameters() if one.grad is not None])
    model.zero_grad(set_to_none=True)
    return {"loss": loss.item(), "gradient norm": norm.item()}


def step_of(
    model: torch.nn.Module, device: torch.device, precision: Precision, length: int
) -> Callable[[int], None]:
    def step(sequences: int) -> None:
        batch = {"tokens": torch.zeros((sequences, length + 1), dtype=torch.int64, device=device)}
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
            loss = CausalLM().loss(model, batch, None).value
        loss.backward()

    return step


def breakdown(trainer: LocalTrainer, stream: BatchStream, device: torch.device) -> dict[str, float]:
    """Return seconds of the parts of a step, each waited for: the median of three."""
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "clip and optimizer": []}
    for _ in range(3):
        tokens = stream.next_batch(trainer.batch_size)["tokens"].to(device)
        times = [waited(device)]
        with trainer._autocast():
            loss = trainer.loss(trainer._forward, {"tokens": tokens}, None).value
        times.append(waited(device))
        loss.backward()
        times.append(waited(device))
        trainer._update(trainer._gradient_norm())
        times.append(waited(device))
        trainer.optimizer.zero_grad(set_to_none=True)
        for name, begin, end in zip(parts, times, times[1:], strict=False):
            parts[name].append(end - begin)
    return {name: sorted(seconds)[1] for name, seconds in parts.items()}


def waited(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show(lines: Path, page: Path) -> None:
    """Write the table of all lines between its two marks on the page."""
    found = [Line(**json.loads(line)) for line in lines.read_text().splitlines()]
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page}: has no place for the table; give it the lines {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


def table(lines: Sequence[Line]) -> str:
    heads = ["model", "on", "tokens / s", "MFU", "GiB", "micro-batch", "forward, backward, optimizer: ms"]
    heads.append("loss, gradient norm: differ from the CPU in fp32 by")
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, lines)])


def row(line: Line) -> str:
    cells: list[Any] = [f"{line.model}{', tiny' if line.tiny else ''}", f"{line.machine}, torch {line.torch}"]
    if line.failed is not None:
        return "| " + " | ".join([*cells, f"failed: {line.failed}".replace("|", "/"), *[""] * 5]) + " |"
    cells += [
        f"{line.tokens_per_second:,.0f}",
        "–" if line.mfu is None else f"{100 * line.mfu:.1f} %",
        "–" if line.memory_gib is None else f"{line.memory_gib:.1f}",
        f"{line.micro_batch} × {line.sequence_length}"
        + (", compiled" if line.compiled else "")
        + (", checkpointing" if line.checkpointing else ""),
        ", ".join(f"{1000 * seconds:,.0f}" for seconds in line.seconds.values()),
        ", ".join(f"{100 * share:.2g} %" for share in line.differs_from_cpu.values()),
    ]
    return "| " + " | ".join(cells) + " |"


def parse_arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    made.add_argument("--tiny", action="store_true", help="small models of the same kinds")
    made.add_argument("--minutes", type=float, default=8.0, help="for all models together, about")
    made.add_argument("--no-compile", action="store_true", help="without torch.compile")
    made.add_argument("--checkpointing", action="store_true", help="recompute activations")
    made.add_argument("--lines", type=Path, default=ROOT / "docs" / "results" / "gpu.jsonl")
    made.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    return made.parse_args()


if __name__ == "__main__":
    main()
