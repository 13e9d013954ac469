"""Shards whose blocks are compiled, gathered ahead and worked on in bfloat16 train as one process does."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from photon.config.compose import compose
from photon.data.loader import BatchStream
from photon.models.residual import narrow_residual
from photon.objective.causal_lm import CausalLM
from photon.silo import runtime
from photon.training.collectives import GroupTrainer, gather, place_model
from photon.training.groups import read_params
from photon.training.loop import LocalTrainer, build_optimizer
from photon.training.schedule import ConstantSchedule

kind, precision, rank, store, *overrides = sys.argv[1:]
CPU = torch.device("cpu")
SGD = {"_target_": "torch.optim.SGD", "lr": 0.05}
model = ["model.architecture.n_layer=3", "model.architecture.n_embd=30", "model.architecture.n_head=2"]
if kind == "abbie":
    model += ["model.abbie={head_blocks: 1, body_blocks: 1, tail_blocks: 1, train_iterations: 3}"]
config = compose([*model, "model.sequence_length=12", "model.recipe.warmup_steps=1", "model.vocab_size=96",
                  "training.parallel=fsdp", "training.micro_batch_size=2", "training.clip_norm=1.0",
                  *overrides])
windows = np.random.default_rng(0).integers(1, 90, (32, 12)).astype(np.uint16)
stream = lambda: BatchStream({"tokens": [windows]}, seed=1)

def made():
    whole = runtime.trained_model(config, 96, CPU)
    if config.training.narrows(precision):
        narrow_residual(whole)
    return whole

one = made()
before = {name: tensor.clone() for name, tensor in read_params(one).items()}
given = dict(loss=CausalLM().loss, batch_size=8, precision=precision, device=CPU)
alone = LocalTrainer(one, build_optimizer(SGD, one), ConstantSchedule(), micro_batch_size=2, clip_norm=1.0,
                     **given)
expected = alone.train(stream(), global_step=0, steps=3)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
whole = place_model(made(), config.training, precision, CPU)
kinds = {f"FSDP{name}" for name in whole._no_split_modules}
blocks = [one for one in whole.modules() if type(one).__name__ in kinds]
assert len(blocks) == 3
assert all((one._compiled_call_impl is not None) == config.training.compile for one in blocks)
seen = set()
blocks[1].mlp.register_forward_pre_hook(lambda module, given: seen.add(module.c_fc.weight.dtype))
group = GroupTrainer(whole, build_optimizer(SGD, whole), ConstantSchedule(), count=CausalLM().count,
                     training=config.training, transition=None, **given)
found = group.train(stream(), global_step=0, steps=3)
narrow = config.training.residual == "bf16"
assert seen == {torch.bfloat16 if narrow else torch.float32} or config.training.compile, seen
trained = gather({"params": read_params(whole)})["params"]
assert all(one.dtype == torch.float32 for one in trained.values())
if rank == "0":
    # In bfloat16 a sum has three digits, and in which order it was added up shows.
    assert abs(found.loss / expected.loss - 1) < (1e-3 if narrow else 1e-5), (found.loss, expected.loss)
    for name, tensor in read_params(one).items():
        if not narrow:
            torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
            continue
        ours, theirs = (now - before[name] for now in (trained[name], tensor))
        # A key's bias changes no softmax: its gradient is rounding alone.
        if not name.endswith("c_attn.bias"):
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99, name
dist.barrier()
"""

NARROW = ["training.precision=bf16", "training.residual=bf16"]


def slow(kind: str, precision: str, *overrides: str):
    return pytest.param(kind, precision, overrides, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "precision", "overrides"),
    [
        slow("gpt2", "bf16", *NARROW),
        slow("gpt2", "fp32"),
        slow("abbie", "bf16", *NARROW, "training.activation_checkpointing=true"),
        slow("gpt2", "fp32", "training.compile=true"),
        slow("gpt2", "fp32", "training.compile=true", "training.activation_checkpointing=true"),
        slow("gpt2", "bf16", "training.compile=true", *NARROW),
        slow("gpt2", "fp32", "training.compile=true", "training.compile_mode=max-autotune-no-cudagraphs"),
    ],
)
def test_two_processes_train_as_one(kind: str, precision: str, overrides: list[str], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), kind, precision]
    members = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *overrides], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [member.communicate(timeout=400)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said
