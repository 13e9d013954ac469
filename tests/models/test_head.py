"""The head works out the same loss and gradients some tokens at a time, and never has all logits at once."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, LlamaConfig, PhiConfig

from photon.data.loader import BatchStream
from photon.models import head as head_module
from photon.models.abbie import AbbieLlamaConfig, AbbieLlamaForCausalLM
from photon.models.head import fuse_head, fused_head
from photon.models.loss import causal_loss, causal_losses
from photon.objective.causal_lm import CausalLM
from photon.training.loop import LocalTrainer, build_optimizer
from photon.training.schedule import ConstantSchedule

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "use_cache": False,
}
OFF = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS = {
    "tied": GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **OFF
    ),
    "untied": LlamaConfig(**SIZES),
    "with a bias": PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "scaled": CohereConfig(**SIZES, logit_scale=0.3),
    "capped": Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.2),
}
FUSED = ["tied", "untied", "with a bias", "iterated"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "iterated":
        return AbbieLlamaForCausalLM(AbbieLlamaConfig(**SIZES)).train()
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).train()
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            if one.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    """On a CPU, too, seven tokens at a time: no part of a row, and the last part is a smaller one."""
    monkeypatch.setattr(head_module, "FUSED_ON", {"cuda", "cpu"})
    monkeypatch.setattr(head_module, "_LOGITS", 7 * 96)


def tokens(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def half(like: torch.Tensor) -> torch.Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(2)) < 0.4


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    expected, found = gradients(one), gradients(other)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_loss_and_gradients_are_those_of_whole_logits(name, restricted, chosen):
    whole, fused = build(name), build(name)
    fuse_head(fused, CPU)
    assert fused_head(fused) is not None
    given = tokens()
    targets = half(given) if chosen else None
    rows = torch.arange(96) < 91 if restricted else None
    losses = [causal_losses(model, given, rows, targets=targets).total for model in (whole, fused)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for loss in losses:
        (0.7 * loss).backward()
    same(whole, fused)


def test_no_targets_at_all_are_a_loss_of_zero():
    model = build("tied")
    fuse_head(model, CPU)
    loss = causal_losses(model, tokens(), targets=torch.zeros_like(tokens(), dtype=torch.bool)).total
    loss.backward()
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", ["scaled", "capped"])
def test_a_model_that_changes_its_logits_keeps_its_own_head(name):
    model = build(name)
    expected = causal_loss(model, tokens())
    fuse_head(model, CPU)
    assert fused_head(model) is None
    assert causal_loss(model, tokens()) == expected


def test_logits_are_as_ever_outside_of_the_loss():
    whole, fused = build("untied"), build("untied")
    fuse_head(fused, CPU)
    causal_loss(fused, tokens())
    assert torch.equal(fused(input_ids=tokens()).logits, whole(input_ids=tokens()).logits)
    assert fused.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FUSED)
def test_head_and_loss_are_in_the_compiled_graph(name):
    whole, fused = build(name), build(name)
    fuse_head(fused, CPU)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        given = (tokens() + seed) % 90
        one, other = causal_loss(whole, given), causal_loss(compiled, given)
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
        one.backward()
        other.backward()
    same(whole, fused, 2e-6)


def test_logits_never_stand_whole():
    """The largest tensor that is made is one of seven tokens' logits, not of all 33."""
    model = build("untied")
    fuse_head(model, CPU)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.ndim >= 2 and made.shape[-1] == 96:
                Largest.rows = max(Largest.rows, made.numel() // 96)
            return made

    with Largest():
        causal_loss(model, tokens()).backward()
    assert Largest.rows == max(7, SIZES["hidden_size"])
    Largest.rows = 0
    with Largest():
        causal_loss(build("untied"), tokens()).backward()
    assert Largest.rows == 33


def test_bf16_is_as_near_to_float32_as_whole_logits():
    exact = build("untied")
    causal_loss(exact, tokens()).backward()
    errors = []
    for fuse in (False, True):
        model = build("untied")
        if fuse:
            fuse_head(model, CPU)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = causal_loss(model, tokens())
        loss.backward()
        expected = gradients(exact)
        errors.append(
            sum(((one - expected[name]) ** 2).sum() for name, one in gradients(model).items()).sqrt().item()
        )
    assert errors[1] < 1.3 * errors[0] + 1e-6


@pytest.mark.parametrize("micro", [None, 2])
def test_a_run_of_steps_ends_alike(monkeypatch, micro):
    """Whole runs of the loop, with micro-batches of unequal numbers of targets."""

    class Some(CausalLM):
        def count(self, batch):
            return (batch["tokens"][:, 1:] < 50).sum()

        def loss(self, model, batch, rows):
            return self._of(causal_losses(model, batch["tokens"], rows, targets=batch["tokens"] < 50))

    windows = np.random.default_rng(0).integers(1, 90, (32, 12)).astype(np.uint16)
    ends = []
    for kinds in (set(), {"cpu"}):
        monkeypatch.setattr(head_module, "FUSED_ON", kinds)
        model = build("tied")
        fuse_head(model, CPU)
        sgd = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.05}, model)
        trainer = LocalTrainer(
            model,
            sgd,
            ConstantSchedule(),
            loss=Some().loss,
            count=Some().count,
            batch_size=8,
            micro_batch_size=micro,
            clip_norm=1.0,
            precision="fp32",
            device=CPU,
        )
        result = trainer.train(BatchStream({"tokens": [windows]}, seed=1), global_step=0, steps=3)
        assert (fused_head(model) is not None) == bool(kinds)
        ends.append((result.loss, [parameter.detach() for parameter in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_on_a_cpu_logits_stay_whole(monkeypatch):
    monkeypatch.undo()
    model = build("untied")
    fuse_head(model, CPU)
    assert fused_head(model) is None
    fuse_head(model, torch.device("cuda"))
    assert fused_head(model) is not None
