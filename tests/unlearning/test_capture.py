"""What is captured of a block, compared with the block's own parts."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from photon.config.abbie import AbbieSection
from photon.errors import PhotonError
from photon.models.pretrained import ABBIE
from photon.unlearning.capture import Batch, batches, captured, edited, sites_of, starts

from .models import SIZES, random_model, random_prompts

NORMS = {"gpt2": "ln_2", "opt": "final_layer_norm", "llama": "post_attention_layernorm"}
NORMS["qwen2"] = NORMS["llama"]


def last(model: PreTrainedModel, prompts: list[list[int]], batch_size: int) -> list[Tensor]:
    """Return the outputs of all blocks at each prompt's last token, block by block."""
    sites = sites_of(model)
    found = [
        captured(model, sites, one)
        for one in batches(prompts, starts(prompts, "last"), batch_size=batch_size)
    ]
    return [torch.cat([one[site.layer].outputs for one in found]) for site in sites]


@pytest.mark.parametrize("kind", NORMS)
def test_a_block_gives_what_was_before_its_mlp_and_the_projection_of_what_was_captured(kind: str) -> None:
    model, prompts = random_model(kind), random_prompts(5)
    sites = sites_of(model)
    assert [site.layer for site in sites] == [0, 1, 2]
    batch = next(batches(prompts, starts(prompts, "all")))
    befores: dict[int, Tensor] = {}
    for site in sites:
        norm = site.block.get_submodule(NORMS[kind])
        norm.register_forward_pre_hook(
            lambda _, given, layer=site.layer: befores.__setitem__(
                layer, given[0].reshape(*batch.chosen.shape, -1)[batch.chosen]
            )
        )
    found = captured(model, sites, batch)
    for site in sites:
        outputs, inputs = found[site.layer]
        assert len(outputs) == len(inputs) == sum(map(len, prompts))
        bias = getattr(site.projection, "bias", None)
        made = befores[site.layer] + inputs @ site.weight.T + (0 if bias is None else bias)
        assert torch.allclose(made, outputs, atol=1e-6, rtol=1e-6)
        assert model.get_parameter(site.name) is site.projection.weight


def test_padding_side_and_batch_size_change_nothing() -> None:
    model, prompts = random_model("llama"), random_prompts(7)
    one_by_one = last(model, prompts, 1)
    length = max(map(len, prompts))
    filled = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    chosen = torch.zeros_like(mask, dtype=torch.bool)
    chosen[:, -1] = True
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    sites = sites_of(model)
    from_left = captured(model, sites, Batch(torch.tensor(filled), chosen, mask, positions))
    for site, alone, together in zip(sites, one_by_one, last(model, prompts, 3), strict=True):
        assert torch.allclose(alone, together, atol=1e-5)
        assert torch.allclose(alone, from_left[site.layer].outputs, atol=1e-5)


def test_prompts_in_one_window_are_captured_as_if_they_were_alone() -> None:
    model, prompts = random_model("llama"), random_prompts(3)
    tokens = torch.cat([torch.tensor(prompt) for prompt in prompts])[None]
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None]
    ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1
    chosen = torch.zeros_like(tokens, dtype=torch.bool)
    chosen[0, ends] = True
    sites = sites_of(model)
    found = captured(model, sites, Batch(tokens, chosen, positions=positions))
    for site, alone in zip(sites, last(model, prompts, 1), strict=True):
        assert torch.allclose(found[site.layer].outputs, alone, atol=1e-5)


def test_the_passes_of_a_block_are_stacked() -> None:
    """AbbIE-C with a body of two blocks and two passes is a plain model with the blocks 0, 1, 0, 1."""
    plain = random_model("llama", num_hidden_layers=4)
    fields = plain.config.to_diff_dict() | {"num_hidden_layers": 2}
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    section = AbbieSection(head_blocks=0, body_blocks=2, tail_blocks=0, variant="C", train_iterations=2)
    config = ABBIE["llama"](**fields, **section.model_dump(exclude_none=True))
    from transformers import AutoModelForCausalLM

    iterated = AutoModelForCausalLM.from_config(config).eval()
    iterated.load_state_dict(
        {k: v for k, v in plain.state_dict().items() if ".2." not in k and ".3." not in k}
    )
    for site in (2, 3):
        plain.model.layers[site].load_state_dict(plain.model.layers[site - 2].state_dict())
    prompts = random_prompts(4)
    batch = next(batches(prompts, starts(prompts, "last")))
    twice = captured(iterated, sites_of(iterated), batch)
    once = captured(plain, sites_of(plain), batch)
    for layer in (0, 1):
        assert len(twice[layer].outputs) == 8
        for rows, first, second in zip(twice[layer], once[layer], once[layer + 2], strict=True):
            assert torch.allclose(rows, torch.cat([first, second]), atol=1e-5)


def test_what_is_added_changes_one_tensor_and_goes_again() -> None:
    for kind in ("gpt2", "llama"):
        model = random_model(kind)
        site = sites_of(model)[1]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        delta = torch.randn(site.weight.shape, generator=torch.Generator().manual_seed(0))
        rows = torch.randn((5, site.weight.shape[1]), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            plain = site.projection(rows)
            with edited([(site, delta)]):
                changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
                steered = site.projection(rows)
        assert changed == {site.name}
        assert torch.allclose(steered - plain, rows @ delta.T, atol=1e-5)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("mixtral", {}, "mixture of experts"),
        ("olmo2", {}, "is not added as it is"),
        ("granite", {"residual_multiplier": 0.5}, "is not added as it is"),
    ],
)
def test_a_model_without_such_a_projection_is_refused(kind: str, fields: dict[str, float], said: str) -> None:
    with pytest.raises(PhotonError, match=said) as caught:
        sites_of(random_model(kind, **fields))
    assert "\n" not in str(caught.value)
    assert "take a" in str(caught.value)


def test_a_granite_whose_residual_branches_count_once_is_taken() -> None:
    assert len(sites_of(random_model("granite", residual_multiplier=1.0))) == 3


def test_a_model_of_other_blocks_is_tried_out() -> None:
    """A mixer's output projection is added to the residual stream, too; attention is never looked at."""
    assert [site.name.rpartition(".")[0].rpartition(".")[2] for site in sites_of(random_model("mamba"))] == [
        "out_proj"
    ] * 3
    for kind in NORMS:
        assert not any("att" in site.name for site in sites_of(random_model(kind)))


def test_the_mode_and_the_hooks_are_as_before() -> None:
    model = random_model("gpt2")
    model.train()
    prompts = random_prompts(2)
    captured(model, sites_of(model), next(batches(prompts, starts(prompts, "last"))))
    assert model.training
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Module)
    )


def test_which_tokens_are_chosen() -> None:
    prompts, retained = [[1, 2, 3, 4], [1, 2], [7, 8]], [[1, 2, 5], [1, 9], [1, 2, 6, 7]]
    assert starts(prompts, "last") == [3, 1, 1]
    assert starts(prompts, "all") == [0, 0, 0]
    # The second is the beginning of a retained one: its last token is chosen, though it differs from none.
    assert starts(prompts, "from-first-difference", retained) == [2, 1, 0]
    batch = next(batches(prompts, [2, 1, 0]))
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [1, 2, 0, 0], [7, 8, 0, 0]]
    assert batch.chosen.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]]


def test_every_size_is_one_that_transformers_knows() -> None:
    assert set(NORMS) < set(SIZES)
