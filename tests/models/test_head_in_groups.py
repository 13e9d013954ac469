"""Two processes of one silo, with replicas or shards, work out head and loss as one process does."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from transformers import GPT2Config, LlamaConfig, AutoModelForCausalLM
from photon.config.compose import compose
from photon.data.loader import BatchStream
from photon.models import head
from photon.objective.causal_lm import CausalLM
from photon.training.collectives import GroupTrainer, gather, place_model
from photon.training.groups import read_params
from photon.training.loop import LocalTrainer, build_optimizer
from photon.training.schedule import ConstantSchedule

kind, parallel, rank, store = sys.argv[1:5]
CPU = torch.device("cpu")
SGD = {"_target_": "torch.optim.SGD", "lr": 0.05}
if kind == "tied":
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.0,
                        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False)
else:
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, bos_token_id=0, eos_token_id=0, use_cache=False)
windows = np.random.default_rng(0).integers(1, 90, (32, 12)).astype(np.uint16)
stream = lambda: BatchStream({"tokens": [windows]}, seed=1)
made = lambda: (torch.manual_seed(0), AutoModelForCausalLM.from_config(config))[1]
one = made()
given = dict(loss=CausalLM().loss, batch_size=8, precision="fp32", device=CPU)
alone = LocalTrainer(one, build_optimizer(SGD, one), ConstantSchedule(), micro_batch_size=2, clip_norm=1.0,
                     **given)
expected = alone.train(stream(), global_step=0, steps=3)
head.FUSED_ON.add("cpu")
head._LOGITS = 7 * 96
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
training = compose(["training.micro_batch_size=2", "training.clip_norm=1.0",
                    f"training.parallel={parallel}"]).training
whole = made()
head.fuse_head(whole, CPU)
whole = place_model(whole, training, "fp32", CPU)
group = GroupTrainer(whole, build_optimizer(SGD, whole), ConstantSchedule(), count=CausalLM().count,
                     training=training, transition=None, **given)
assert head.fused_head(group._forward) is not None
found = group.train(stream(), global_step=0, steps=3)
trained = gather({"params": read_params(whole)})["params"]
if rank == "0":
    assert abs(found.loss / expected.loss - 1) < 1e-5, (found.loss, expected.loss)
    for name, tensor in read_params(one).items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_group_trains_as_one_process_with_whole_logits(kind: str, parallel: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), kind, parallel]
    members = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [member.communicate(timeout=300)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], said
