"""The local loop against a bare PyTorch loop: same model, optimizer, clipping and batches.

    python scripts/bench/local_loop.py                    # against the loop that one writes with transformers
    python scripts/bench/local_loop.py --compare overhead # against a bare loop with Photon's own loss
    python scripts/bench/local_loop.py --compare fused    # fused against foreach AdamW, in bare loops

The bare loop has its batches ready in memory and records nothing; Photon's reads them from a window stream,
sets the learning rate, checks every loss and gradient norm, and reports.
"""

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
from common import Report, at_least, interleave, parser
from transformers import GPT2Config, GPT2LMHeadModel

from photon.data.loader import BatchStream
from photon.models.loss import causal_loss
from photon.objective.causal_lm import CausalLM
from photon.training.loop import LocalTrainer, build_optimizer
from photon.training.schedule import CosineSchedule

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}
CLIP = 1.0


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build_model(arguments)
    windows = np.random.default_rng(0).integers(
        0, arguments.vocabulary, (512, arguments.sequence_length), dtype=np.uint16
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = arguments.steps * arguments.batch_size * arguments.sequence_length
    report = Report(arguments)
    title = (
        f"{parameters:,} parameters, batch {arguments.batch_size} x {arguments.sequence_length}, "
        f"{arguments.steps} steps a run, {arguments.pairs} pairs, {arguments.threads} threads"
    )
    cases: dict[str, Callable[[], None]]
    if arguments.compare == "fused":
        cases = {
            name: bare_loop(copy.deepcopy(model), {**ADAMW, name: True}, windows, arguments)
            for name in ("foreach", "fused")
        }
    else:
        loss = causal_loss if arguments.compare == "overhead" else transformers_loss
        cases = {
            "bare loop": bare_loop(copy.deepcopy(model), ADAMW, windows, arguments, loss),
            "Photon": photon_loop(copy.deepcopy(model), windows, arguments),
        }
    timings = interleave(cases, arguments.pairs)
    report.rates(title, dict.fromkeys(cases, tokens), "tokens", timings, digits=0)
    report.close()


def transformers_loss(model: GPT2LMHeadModel, batch: torch.Tensor) -> torch.Tensor:
    return model(input_ids=batch, labels=batch).loss


def bare_loop(
    model: GPT2LMHeadModel,
    config: dict,
    windows: np.ndarray,
    arguments: argparse.Namespace,
    loss_function: Callable[[GPT2LMHeadModel, torch.Tensor], torch.Tensor] = transformers_loss,
) -> Callable[[], None]:
    optimizer = build_optimizer(config, model)
    size = arguments.batch_size
    batches = [
        torch.from_numpy(windows[size * step : size * (step + 1)].astype(np.int64))
        for step in range(min(arguments.steps, len(windows) // size))
    ]
    model.train()

    def run() -> None:
        for step in range(arguments.steps):
            batch = batches[step % len(batches)]
            loss = loss_function(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()

    return run


def photon_loop(
    model: GPT2LMHeadModel, windows: np.ndarray, arguments: argparse.Namespace
) -> Callable[[], None]:
    trainer = LocalTrainer(
        model,
        build_optimizer(ADAMW, model),
        CosineSchedule(100_000, 100),
        loss=CausalLM().loss,
        batch_size=arguments.batch_size,
        micro_batch_size=None,
        clip_norm=CLIP,
        precision="fp32",
        device=torch.device("cpu"),
    )
    stream = BatchStream({"tokens": [windows]}, seed=0)

    def run() -> None:
        trainer.train(stream, global_step=stream.position // arguments.batch_size, steps=arguments.steps)

    return run


def build_model(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=arguments.vocabulary,
            n_positions=arguments.sequence_length,
            n_embd=arguments.width,
            n_layer=arguments.layers,
            n_head=max(1, arguments.width // 64),
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def parse_arguments() -> argparse.Namespace:
    made = arguments_of(__doc__)
    made.add_argument("--compare", choices=["bare", "overhead", "fused"], default="bare")
    return made.parse_args()


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    made = parser(description)
    made.add_argument("--width", type=int, default=128)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--vocabulary", type=int, default=2048)
    made.add_argument("--sequence-length", type=int, default=128)
    made.add_argument("--batch-size", type=int, default=8)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--pairs", type=at_least(1), default=12)
    made.add_argument("--threads", type=int, default=1)
    return made


if __name__ == "__main__":
    main()
