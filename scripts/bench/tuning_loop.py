"""The local loop on conversations against the one on text: same model, optimizer, shapes and windows.

    python scripts/bench/tuning_loop.py                     # a small GPT-2
    python scripts/bench/tuning_loop.py --vocabulary 8192   # one whose head is most of the work

Tokens are those that are read, whether they are answers or not. In one case the assistant says half of them,
in blocks as long as the questions; in the other all of them.
"""

import argparse
import copy
from collections.abc import Callable

import numpy as np
import torch
from common import Report, interleave
from local_loop import ADAMW, CLIP, arguments_of, build_model
from transformers import GPT2LMHeadModel

from photon.data.loader import BatchStream
from photon.objective.base import Objective
from photon.objective.causal_lm import CausalLM
from photon.objective.sft import SupervisedFineTuning
from photon.training.loop import LocalTrainer, build_optimizer
from photon.training.schedule import CosineSchedule


def main() -> None:
    made = arguments_of(__doc__)
    made.add_argument("--conversation", type=int, default=32, help="tokens of each conversation")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build_model(arguments)
    shape = 512, arguments.sequence_length
    windows = np.random.default_rng(0).integers(0, arguments.vocabulary, shape, dtype=np.uint16)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.uint16) % arguments.conversation, shape)
    half = (positions >= arguments.conversation // 2).astype(np.uint8)
    tuning, chats = SupervisedFineTuning(), {"tokens": windows, "positions": positions}
    cases = {
        "text": loop(copy.deepcopy(model), CausalLM(), {"tokens": windows}, arguments),
        "half are answers": loop(copy.deepcopy(model), tuning, {**chats, "targets": half}, arguments),
        "all are answers": loop(
            copy.deepcopy(model), tuning, {**chats, "targets": np.ones_like(half)}, arguments
        ),
    }
    report = Report(arguments)
    title = (
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, batch "
        f"{arguments.batch_size} x {arguments.sequence_length}, conversations of {arguments.conversation}, "
        f"{arguments.steps} steps a run, {arguments.pairs} turns, {arguments.threads} threads"
    )
    tokens = arguments.steps * arguments.batch_size * arguments.sequence_length
    report.rates(title, dict.fromkeys(cases, tokens), "tokens", interleave(cases, arguments.pairs), digits=0)
    report.close()


def loop(
    model: GPT2LMHeadModel,
    objective: Objective,
    arrays: dict[str, np.ndarray],
    arguments: argparse.Namespace,
) -> Callable[[], None]:
    trainer = LocalTrainer(
        model,
        build_optimizer(ADAMW, model),
        CosineSchedule(100_000, 100),
        loss=objective.loss,
        count=objective.count,
        batch_size=arguments.batch_size,
        micro_batch_size=None,
        clip_norm=CLIP,
        precision="fp32",
        device=torch.device("cpu"),
    )
    stream = BatchStream({name: [array] for name, array in arrays.items()}, seed=0)

    def run() -> None:
        trainer.train(stream, global_step=stream.position // arguments.batch_size, steps=arguments.steps)

    return run


if __name__ == "__main__":
    main()
