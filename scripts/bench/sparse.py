"""What sparse layers cost: a training step, and the bytes that autograd keeps for the way back.

    python scripts/bench/sparse.py                     # the quickstart's model at 95 % sparsity
    python scripts/bench/sparse.py --sparsity 0.99 --batch-size 32

Every case has the same weights, of which all but the largest are zero, and the same batch; it takes a forward
and a backward pass and a step of AdamW. The bytes count each storage that autograd saved
once, without parameters.
"""

import argparse
import copy
from collections.abc import Callable

import torch
from common import Report, at_least, interleave, parser
from transformers import GPT2Config, GPT2LMHeadModel

from photon.models.loss import causal_loss
from photon.models.sparse import SparseTraining, masks_of, prunable_names, prune
from photon.training.groups import read_params, write_params


def main() -> None:
    """Time the cases in turn."""
    arguments = read_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=arguments.layers,
            n_embd=arguments.width,
            n_head=4,
            vocab_size=8192,
            n_positions=arguments.sequence_length,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    batch = torch.randint(8192, (arguments.batch_size, arguments.sequence_length))
    target = arguments.sparsity
    methods = {
        "dense": None,
        "fixed support (FLASH)": SparseTraining(target, method="fixed-support"),
        "W = sign(v)|v|^1.25": SparseTraining(target, beta=1.25),
        "and pruned activations (SparsyFed)": SparseTraining(target, beta=1.25, activations="measured"),
        "layer and activations pruned (ZeroFL)": SparseTraining(
            target, method="layer-topk", activations="constant"
        ),
    }
    report = Report(arguments)
    cases: dict[str, Callable[[], None]] = {}
    kept = {}
    for name, sparse in methods.items():
        own = copy.deepcopy(model)
        if sparse is not None:
            names = prunable_names(own, ())
            sparse.attach(own)
            masks = masks_of(read_params(own), names, target, "global")
            write_params(own, prune({"params": read_params(own)}, masks)["params"])
        cases[name] = step_of(own.train(), batch)
        kept[name] = saved_bytes(own, batch)
    timings = interleave(cases, arguments.pairs)
    tokens = batch.numel()
    report.rates(
        f"{target:.1%} sparse, batch {arguments.batch_size} x {arguments.sequence_length}, one thread",
        dict.fromkeys(cases, tokens),
        "tokens",
        timings,
        digits=0,
    )
    report.table(
        "Kept for the way back",
        ["case", "MB", "of dense"],
        [[name, f"{size / 1e6:.1f}", f"{size / kept['dense']:.2f}"] for name, size in kept.items()],
        raw=[kept],
    )
    report.close()


def step_of(model: GPT2LMHeadModel, batch: torch.Tensor) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        causal_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: GPT2LMHeadModel, batch: torch.Tensor) -> int:
    """Return the bytes that one forward pass keeps."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_loss(model, batch)
    return sum(sizes.values())


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    options = parser(__doc__)
    options.add_argument("--sparsity", type=float, default=0.95, help="share of the weights that are zero")
    options.add_argument("--layers", type=int, default=4, help="blocks of the model")
    options.add_argument("--width", type=int, default=128, help="width of the model")
    options.add_argument("--batch-size", type=int, default=8, help="sequences of the batch")
    options.add_argument("--sequence-length", type=int, default=128, help="tokens of a sequence")
    options.add_argument("--pairs", type=at_least(1), default=7, help="timings of every case")
    return options.parse_args()


if __name__ == "__main__":
    main()
