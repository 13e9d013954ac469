"""What only a GPU can show: equal numbers across devices, low precision, memory that runs out, compiling.

Each test compares with the CPU or with a run that differs in one thing.
"""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from photon.data.loader import BatchStream
from photon.link.records import decode_groups, encode_groups
from photon.objective.causal_lm import CausalLM
from photon.objective.perplexity import evaluate_windows
from photon.training.batch_probe import find_micro_batch_size
from photon.training.groups import read_optimizer, read_params, write_optimizer, write_params
from photon.training.loop import LocalTrainer, build_optimizer, enable_activation_checkpointing
from photon.training.precision import resolve_precision
from photon.training.schedule import ConstantSchedule

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
VOCABULARY, LENGTH = 64, 32
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}


def gpt2(device, seed=0):
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))
    return model.to(device)


def windows(count=64):
    """Counting upwards from random starts, which a small model learns within a few steps."""
    starts = np.random.default_rng(0).integers(0, VOCABULARY, size=(count, 1))
    return ((starts + np.arange(LENGTH)) % VOCABULARY).astype(np.uint16)


def stream(position=0):
    return BatchStream({"tokens": [windows()]}, seed=1, position=position)


def trainer(model, device, optimizer=None, *, precision="fp32", micro=None, **more):
    return LocalTrainer(
        model,
        optimizer or build_optimizer(ADAMW, model),
        ConstantSchedule(),
        loss=CausalLM().loss,
        batch_size=8,
        micro_batch_size=micro,
        clip_norm=1.0,
        precision=precision,
        device=device,
        **more,
    )


def on_cpu(tensors):
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].cpu(), b[name].cpu(), rtol=0, atol=tolerance)


def test_auto_takes_bf16_where_the_gpu_has_it():
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_precision("auto", GPU) == ("bf16" if has_bf16 else "fp16")


@pytest.mark.parametrize("micro", [None, 2])
def test_fp32_trains_as_on_the_cpu(micro):
    here, there = gpt2(CPU), gpt2(GPU)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9}
    expected = trainer(here, CPU, build_optimizer(sgd, here), micro=micro).train(
        stream(), global_step=0, steps=5
    )
    result = trainer(there, GPU, build_optimizer(sgd, there), micro=micro).train(
        stream(), global_step=0, steps=5
    )
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    close(read_params(there), read_params(here), tolerance=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_keeps_float32(precision):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    seen, model = set(), gpt2(GPU)
    model.lm_head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    result = trainer(model, GPU, precision=precision).train(stream(), global_step=0, steps=60)
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    reference = trainer(gpt2(GPU), GPU).train(stream(), global_step=0, steps=60)
    assert reference.loss_last < 0.5 * np.log(VOCABULARY)
    assert result.loss_last == pytest.approx(reference.loss_last, abs=0.2)


def test_losses_are_reported_for_every_step_in_order():
    seen = []
    result = trainer(gpt2(GPU), GPU).train(
        stream(), global_step=7, steps=4, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert [step for step, _ in seen] == [7, 8, 9, 10]
    assert seen[-1][1] == result.loss_last


def test_the_probe_recovers_from_a_full_gpu():
    free, _ = torch.cuda.mem_get_info()
    each = (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) // 6
    tried = []

    def step(sequences):
        tried.append(sequences)
        blocks = [torch.empty(each, dtype=torch.uint8, device=GPU) for _ in range(sequences)]
        del blocks

    # A sixth of the memory a sequence: sixteen and eight cannot fit, four do.
    assert find_micro_batch_size(step, 16) == 4
    assert {16, 8, 4} <= set(tried)
    torch.cuda.empty_cache()
    result = trainer(gpt2(GPU), GPU).train(stream(), global_step=0, steps=1)
    assert np.isfinite(result.loss)


def test_adamw_runs_fused_and_a_silo_goes_on_from_its_saved_state():
    """Through the CPU, as the silo's store keeps it; equal kernels on equal numbers give equal bits."""
    whole = gpt2(GPU)
    local = trainer(whole, GPU)
    assert local.optimizer.defaults["fused"] is True
    batches = stream()
    local.train(batches, global_step=0, steps=3)
    groups, scalars = read_optimizer(whole, local.optimizer)
    assert scalars == {"step": 3.0}
    saved = {group: on_cpu(tensors) for group, tensors in groups.items()}
    params = on_cpu(read_params(whole))
    local.train(batches, global_step=3, steps=3)

    second = gpt2(GPU, seed=5)
    optimizer = build_optimizer(ADAMW, second)
    write_params(second, params)
    write_optimizer(second, optimizer, saved, scalars)
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cuda"}
    trainer(second, GPU, optimizer).train(stream(24), global_step=3, steps=3)
    # Embedding gradients are summed by atomic additions, whose order torch does not fix.
    close(read_params(second), read_params(whole), tolerance=1e-6)


def test_optimizer_state_round_trip_keeps_every_bit():
    model = gpt2(GPU)
    local = trainer(model, GPU)
    local.train(stream(), global_step=0, steps=2)
    groups, scalars = read_optimizer(model, local.optimizer)
    saved = {group: on_cpu(tensors) for group, tensors in groups.items()}
    other = gpt2(GPU, seed=5)
    optimizer = build_optimizer(ADAMW, other)
    write_optimizer(other, optimizer, saved, scalars)
    restored, restored_scalars = read_optimizer(other, optimizer)
    assert restored_scalars == scalars
    for group, tensors in saved.items():
        assert {tensor.device.type for tensor in restored[group].values()} == {"cuda"}
        close(restored[group], tensors, tolerance=0)


def test_parameters_travel_over_the_link_and_back_on_the_cpu():
    model, other = gpt2(GPU), gpt2(GPU, seed=5)
    arrived = decode_groups(encode_groups({"params": read_params(model)}))["params"]
    assert {tensor.device.type for tensor in arrived.values()} == {"cpu"}
    write_params(other, arrived)
    close(read_params(other), read_params(model), tolerance=0)
    assert {parameter.device.type for parameter in other.parameters()} == {"cuda"}


def test_activation_checkpointing_gives_the_same_gradients():
    plain, saving = gpt2(GPU), gpt2(GPU)
    enable_activation_checkpointing(saving)
    expected = trainer(plain, GPU).train(stream(), global_step=0, steps=1)
    result = trainer(saving, GPU).train(stream(), global_step=0, steps=1)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    close({name: parameter.grad for name, parameter in saving.named_parameters()}, gradients, tolerance=1e-6)


@pytest.mark.slow
def test_compiled_model_gives_the_same_numbers_and_names():
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.05}
    plain, compiled = gpt2(GPU), gpt2(GPU)
    expected = trainer(plain, GPU, build_optimizer(sgd, plain), micro=4).train(
        stream(), global_step=0, steps=3
    )
    result = trainer(compiled, GPU, build_optimizer(sgd, compiled), micro=4, compile_mode="default").train(
        stream(), global_step=0, steps=3
    )
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    close(read_params(compiled), read_params(plain), tolerance=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_gives_the_loss_of_the_cpu(precision):
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    expected = evaluate_windows(gpt2(CPU), windows(), batch_size=4, device=CPU, precision="fp32")
    score = evaluate_windows(gpt2(GPU), windows(), batch_size=4, device=GPU, precision=precision)
    assert score.tokens == expected.tokens == 64 * (LENGTH - 1)
    assert score.loss == pytest.approx(expected.loss, rel=1e-5 if precision == "fp32" else 1e-2)
