"""The batch probe must see the memory that training takes, and leave nothing behind."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from photon.silo import runtime
from photon.silo.runtime import Runtime
from photon.training.groups import read_optimizer, read_params
from tests.conftest import SMALL, composed


def config():
    return composed(*SMALL, "data.path=none", "model.sequence_length=8")


def made_runtime(precision="fp32"):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    return Runtime(model, optimizer, lambda step: 1.0, torch.device("cpu"), precision, {})


def stepped(made):
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    made.optimizer.zero_grad()
    return made


def snapshot(made):
    groups, scalars = read_optimizer(made.model, made.optimizer)
    everything = {"params": read_params(made.model), **groups}
    tensors = {
        f"{group}/{name}": t.clone() for group, named in everything.items() for name, t in named.items()
    }
    return tensors, scalars


@pytest.mark.parametrize(
    "prepare", [made_runtime, lambda: stepped(made_runtime())], ids=["fresh", "restored"]
)
def test_the_probe_holds_gradients_and_optimizer_state_and_leaves_nothing(monkeypatch, prepare):
    made, held = prepare(), []

    def find(step, batch_size):
        for size in (1, 2):
            step(size)
            held.append({key for state in made.optimizer.state.values() for key in state})
            assert len(made.optimizer.state) == len(list(made.model.parameters()))
            assert all(parameter.grad is not None for parameter in made.model.parameters())
        return batch_size

    monkeypatch.setattr(runtime, "find_micro_batch_size", find)
    tensors, scalars = snapshot(made)
    assert runtime._probe_micro_batch(made, config(), 4) == 4
    assert held == [{"step", "exp_avg", "exp_avg_sq"}] * 2
    after, scalars_after = snapshot(made)
    assert scalars_after == scalars
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_failed_probe_leaves_nothing_either(monkeypatch):
    made = made_runtime()

    def find(step, batch_size):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(runtime, "find_micro_batch_size", find)
    with pytest.raises(RuntimeError, match="shapes"):
        runtime._probe_micro_batch(made, config(), 4)
    assert not made.optimizer.state
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_probe_runs_in_the_format_of_the_training(precision, dtype):
    made, seen = made_runtime(precision), []
    made.model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert runtime._probe_micro_batch(made, config(), 2) == 2
    assert set(seen) == {dtype}
