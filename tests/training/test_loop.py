import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from photon.errors import PhotonError
from photon.objective.causal_lm import CausalLM
from photon.training import loop
from photon.training.groups import read_optimizer, read_params, write_optimizer, write_params
from photon.training.loop import (
    LocalTrainer,
    TrainingDiverged,
    build_optimizer,
    enable_activation_checkpointing,
    state_group_names,
)
from photon.training.schedule import ConstantSchedule, CosineSchedule
from tests.training.tiny_lm import LENGTH, TinyLM, exact_batch_loss, exact_loss, stream

CPU = torch.device("cpu")
CONSTANT = ConstantSchedule()


def trainer(model, optimizer=None, schedule=CONSTANT, *, batch_size=4, micro=None, clip=None, **more):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    return LocalTrainer(
        model,
        optimizer,
        schedule,
        loss=more.pop("loss", CausalLM().loss),
        batch_size=batch_size,
        micro_batch_size=micro,
        clip_norm=clip,
        precision=more.pop("precision", "fp32"),
        device=CPU,
        **more,
    )


def cloned(params):
    return {name: tensor.clone() for name, tensor in params.items()}


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


def test_steps_equal_a_loop_written_out():
    ours, bare = TinyLM(dtype=torch.float64), TinyLM(dtype=torch.float64)
    result = trainer(
        ours,
        torch.optim.AdamW(ours.parameters(), lr=0.02),
        CosineSchedule(10, 2),
        clip=0.2,
        loss=exact_batch_loss,
    ).train(stream(), global_step=0, steps=5)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.02)
    cosine = [0.5, 1.0, 1.0, *(0.1 + 0.45 * (1 + math.cos(math.pi * i / 8)) for i in (1, 2))]
    batches, losses, norms = stream(), [], []
    for factor in cosine:
        optimizer.param_groups[0]["lr"] = 0.02 * factor
        ids = batches.next_batch(4)["tokens"]
        loss = exact_loss(bare, ids)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.2).item())
        optimizer.step()
        losses.append(loss.item())
    same(read_params(ours), read_params(bare), tolerance=1e-14)
    assert max(norms) > 0.2
    assert result.loss == pytest.approx(sum(losses) / 5, abs=1e-14)
    assert result.loss_last == pytest.approx(losses[-1], abs=1e-14)
    assert result.gradient_norm == pytest.approx(sum(norms) / 5, abs=1e-14)
    assert result.learning_rate == pytest.approx(0.02 * cosine[-1])
    assert (result.steps, result.tokens) == (5, 5 * 4 * LENGTH)
    assert result.seconds > 0


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_micro_batches_add_up_to_the_mean_gradient_of_the_batch(micro):
    whole, parts = TinyLM(dtype=torch.float64), TinyLM(dtype=torch.float64)
    one = trainer(whole, batch_size=6, loss=exact_batch_loss).train(stream(), global_step=0, steps=3)
    many = trainer(parts, batch_size=6, micro=micro, loss=exact_batch_loss).train(
        stream(), global_step=0, steps=3
    )
    same(read_params(whole), read_params(parts), tolerance=1e-14)
    assert many.loss == pytest.approx(one.loss, abs=1e-14)
    assert many.gradient_norm == pytest.approx(one.gradient_norm, abs=1e-14)


def test_micro_batch_must_divide_the_batch():
    with pytest.raises(PhotonError, match="micro_batch_size=4 does not divide batch_size=6"):
        trainer(TinyLM(), batch_size=6, micro=4)


def test_clip_bounds_the_update_and_reports_the_norm_before():
    model = TinyLM(dtype=torch.float64)
    before = cloned(read_params(model))
    result = trainer(model, torch.optim.SGD(model.parameters(), lr=1.0), clip=0.01).train(
        stream(), global_step=0, steps=1
    )
    update = torch.cat([(after - before[name]).flatten() for name, after in read_params(model).items()])
    assert result.gradient_norm > 0.1
    assert update.norm().item() == pytest.approx(0.01, rel=1e-4)


def test_gradients_below_the_clip_norm_are_left_alone():
    free, clipped = TinyLM(), TinyLM()
    trainer(free).train(stream(), global_step=0, steps=2)
    trainer(clipped, clip=1e6).train(stream(), global_step=0, steps=2)
    same(read_params(free), read_params(clipped))


def test_a_round_in_two_parts_is_the_round():
    """Parameters, optimizer state, data position and step are all there is to hand over."""
    schedule = CosineSchedule(12, 3)
    whole = TinyLM()
    trainer(whole, torch.optim.AdamW(whole.parameters(), lr=0.05), schedule, clip=1.0).train(
        stream(), global_step=0, steps=8
    )
    first = TinyLM()
    first_optimizer = torch.optim.AdamW(first.parameters(), lr=0.05)
    batches = stream()
    trainer(first, first_optimizer, schedule, clip=1.0).train(batches, global_step=0, steps=3)
    assert batches.position == 12

    second = TinyLM(seed=5)
    second_optimizer = torch.optim.AdamW(second.parameters(), lr=0.05)
    write_params(second, cloned(read_params(first)))
    write_optimizer(second, second_optimizer, *read_optimizer(first, first_optimizer))
    trainer(second, second_optimizer, schedule, clip=1.0).train(stream(12), global_step=3, steps=5)
    same(read_params(second), read_params(whole))


def test_a_silo_that_skipped_rounds_sits_at_the_same_point_of_the_schedule():
    schedule = CosineSchedule(100, 10)
    rates = []
    for rounds in ([0, 1, 2, 3], [0, 3]):
        model = TinyLM()
        local = trainer(model, schedule=schedule)
        for number in rounds:
            result = local.train(stream(), global_step=20 * number, steps=20)
        rates.append(result.learning_rate)
    assert rates[0] == rates[1] == pytest.approx(0.1 * schedule(79))


def test_a_second_trainer_takes_the_same_peak():
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    trainer(model, optimizer, CosineSchedule(10, 4)).train(stream(), global_step=0, steps=1)
    result = trainer(model, optimizer).train(stream(), global_step=1, steps=1)
    assert result.learning_rate == 0.4


def test_each_parameter_group_keeps_its_own_peak():
    model = TinyLM()
    optimizer = torch.optim.SGD(
        [{"params": [model.mix], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}], lr=9.0
    )
    trainer(model, optimizer, CosineSchedule(10, 4)).train(stream(), global_step=1, steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_divergence_names_the_step_and_leaves_the_parameters():
    model = TinyLM()
    calls = []

    def poison(step, loss):
        calls.append(step)
        if step == 11:
            model.bias.data[0] = math.nan

    local = trainer(model)
    with pytest.raises(TrainingDiverged, match="at local step 12"):
        local.train(stream(), global_step=10, steps=5, on_step=poison)
    assert calls == [10, 11]
    assert torch.isfinite(model.mix).all()


def test_a_non_finite_gradient_is_divergence_too():
    model = TinyLM()
    model.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDiverged, match="gradient norm"):
        trainer(model).train(stream(), global_step=0, steps=1)


def test_on_step_reports_every_step_in_order():
    seen = []
    result = trainer(TinyLM()).train(
        stream(), global_step=7, steps=3, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert [step for step, _ in seen] == [7, 8, 9]
    assert sum(loss for _, loss in seen) / 3 == pytest.approx(result.loss)


def fed_record(losses, norms, on_step=None):
    """A record as a GPU feeds it: never asked for a number while steps are under way."""
    record = loop._Record(10, on_step, wait=False)
    for loss, norm in zip(losses, norms, strict=True):
        record.add({"loss": torch.tensor(loss)}, torch.tensor(norm))
    return record


def test_a_gpu_reports_one_step_late_and_the_last_at_the_end():
    seen = []
    record = fed_record([3.0, 2.0, 1.0], [1.0] * 3, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == [(10, 3.0), (11, 2.0)]
    assert record.finish(skipped_steps_are_normal=False) == ([3.0, 2.0, 1.0], [1.0] * 3)
    assert seen[-1] == (12, 1.0)


def test_a_gpu_names_the_first_diverged_step_at_the_end():
    with pytest.raises(TrainingDiverged, match="at local step 11"):
        fed_record([3.0, math.nan, math.nan], [1.0] * 3).finish(skipped_steps_are_normal=False)


def test_steps_that_the_fp16_scaler_skips_are_no_divergence():
    norms = [math.inf, 2.0, 4.0]
    assert fed_record([3.0] * 3, norms).finish(skipped_steps_are_normal=True)[1] == [2.0, 2.0, 4.0]
    with pytest.raises(TrainingDiverged, match="at local step 10"):
        fed_record([3.0] * 3, norms).finish(skipped_steps_are_normal=False)
    with pytest.raises(TrainingDiverged, match="gradient norm inf"):
        fed_record([3.0], [math.inf]).finish(skipped_steps_are_normal=True)


def test_no_steps_are_refused():
    with pytest.raises(PhotonError, match="0 local steps"):
        trainer(TinyLM()).train(stream(), global_step=0, steps=0)


def gpt2(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def test_transformers_model_with_activation_checkpointing_gives_the_same_numbers():
    plain, saving = gpt2(), gpt2()
    enable_activation_checkpointing(saving)
    assert saving.is_gradient_checkpointing
    expected = trainer(plain).train(stream(), global_step=0, steps=2)
    result = trainer(saving).train(stream(), global_step=0, steps=2)
    assert result.loss == expected.loss
    same(read_params(plain), read_params(saving))


@pytest.mark.slow
def test_compiled_model_gives_the_same_numbers_and_names():
    plain, compiled = gpt2(), gpt2()
    expected = trainer(plain, batch_size=4, micro=2).train(stream(), global_step=0, steps=3)
    result = trainer(compiled, batch_size=4, micro=2, compile_mode="default").train(
        stream(), global_step=0, steps=3
    )
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    same(read_params(plain), read_params(compiled), tolerance=1e-5)


def test_model_without_activation_checkpointing_is_refused():
    with pytest.raises(PhotonError, match="TinyLM has no activation checkpointing"):
        enable_activation_checkpointing(TinyLM())


def test_bf16_computes_low_and_keeps_high():
    seen = []
    model = gpt2()
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    result = trainer(model, precision="bf16").train(stream(), global_step=0, steps=1)
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = trainer(gpt2()).train(stream(), global_step=0, steps=1)
    assert result.loss == pytest.approx(expected.loss, rel=0.01)


def test_build_optimizer_is_fused_unless_told_otherwise():
    model = TinyLM()
    config = {"_target_": "torch.optim.AdamW", "lr": 0.01, "betas": [0.9, 0.95]}
    fused = build_optimizer(config, model)
    assert fused.defaults["fused"] is True
    assert tuple(fused.defaults["betas"]) == (0.9, 0.95)
    assert build_optimizer({**config, "fused": False}, model).defaults["fused"] is False
    assert not build_optimizer({**config, "foreach": True}, model).defaults["fused"]
    assert "fused" not in build_optimizer({"_target_": "torch.optim.Adafactor"}, model).defaults


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "NAdam", "RMSprop"])
def test_every_default_can_step(name):
    model = TinyLM()
    optimizer = build_optimizer({"_target_": f"torch.optim.{name}", "lr": 0.01}, model)
    before = cloned(read_params(model))
    trainer(model, optimizer).train(stream(), global_step=0, steps=1)
    assert not torch.equal(model.mix, before["mix"])


def test_frozen_parameters_are_not_optimized():
    model = TinyLM()
    model.bias.requires_grad_(False)
    optimizer = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1}, model)
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torch.optim.AdamW", "weight_decai": 0.1}, "optimizer.weight_decai: .*'weight_decay'"),
        ({"_target_": "torch.optim.AdamV"}, "cannot import 'torch.optim.AdamV'"),
        ({"_target_": "os.system"}, "os.system is not a torch.optim.Optimizer"),
        ({"_target_": "torch.optim.AdamW", "lr": -1.0}, "Invalid learning rate"),
        ({"_target_": "torch.optim.Muon"}, "2D parameters"),
    ],
)
def test_impossible_optimizers_are_refused(config, message):
    with pytest.raises(PhotonError, match=message):
        build_optimizer(config, TinyLM())


def test_optimizers_learn_the_names_of_their_parameters():
    model = TinyLM()
    lordo = build_optimizer({"_target_": "photon.optim.LoRDO", "rank": 2}, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    lordo.step()
    projected = [name for name, one in model.named_parameters() if "basis" in lordo.state[one]]
    assert projected == ["mix"]


@pytest.mark.parametrize("projection", ["global", "local"])
def test_state_groups_of_an_optimizer_with_factored_states_are_found_without_memory(projection):
    section = {"_target_": "photon.optim.LoRDO", "projection": projection}
    assert state_group_names(section) == ["basis", "exp_avg", "exp_avg_sq"]
