import copy
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from photon.config.abbie import AbbieSection
from photon.config.compose import compose
from photon.config.schema import ModelSection
from photon.errors import PhotonError
from photon.evaluation.iterations import angle_between
from photon.models.abbie import AbbieFields, body_of
from photon.models.bounded import bounded_model
from photon.models.build import build_model, parameter_count, self_contained, transformers_config
from photon.models.flops import flops_per_token, model_flops_per_token
from photon.models.loss import causal_loss
from photon.training.loop import enable_activation_checkpointing

VOCABULARY, LENGTH, LAYERS = 96, 12, 4
BLOCKS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": LAYERS, "n_embd": 32, "n_head": 4},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
MODES = [("C", "inter"), ("D", "inter"), ("D", "input"), ("D", "post")]
modes = pytest.mark.parametrize(("variant", "mode"), MODES)
shapes = pytest.mark.parametrize("shape", BLOCKS)


def section(shape: str = "gpt2", abbie: AbbieSection | None = None, **architecture: Any) -> ModelSection:
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if shape == "gpt2" else {}
    fields = BLOCKS[shape] | none | {"initializer_range": 0.2} | architecture
    update = {"architecture": fields, "sequence_length": 2 * LENGTH, "abbie": abbie}
    return compose(["model=tiny"]).model.model_copy(update=update)


def iterated(
    shape: str = "gpt2",
    variant: str = "D",
    mode: str = "inter",
    r: int = 2,
    parts: Sequence[int] = (1, 2, 1),
    **architecture: Any,
) -> Any:
    head, body, tail = parts
    abbie = AbbieSection.model_validate(
        {
            "head_blocks": head,
            "body_blocks": body,
            "tail_blocks": tail,
            "variant": variant,
            "residual_mode": mode,
            "train_iterations": r,
        }
    )
    return build_model(section(shape, abbie, **architecture), VOCABULARY, seed=0)


def plain(shape: str = "gpt2", **architecture: Any) -> Any:
    return build_model(section(shape, **architecture), VOCABULARY, seed=0)


def tokens(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


def blocks(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def states(model: Any, r: int) -> list[Tensor]:
    """Return h_0, …, h_r of each token."""
    found: list[Tensor] = []
    hook = model.base_model.carry.register_forward_hook(
        lambda _, given, after: found.extend([given[1], after] if not found else [after])
    )
    model.config.iterations = r
    with torch.no_grad():
        model(tokens())
    hook.remove()
    return found


# --- the paper's exact tests --------------------------------------------------------------------------------


@pytest.mark.few(3)
@modes
@shapes
def test_one_iteration_is_the_plain_model(shape: str, variant: str, mode: str) -> None:
    model, other = iterated(shape, variant, mode), plain(shape)
    assert all(
        torch.equal(mine, its)
        for mine, its in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    model.config.iterations = 1
    equal = torch.equal(model(tokens()).logits, other(tokens()).logits)
    assert equal == (mode != "post")


@pytest.mark.few(2)
@modes
@shapes
def test_parameters_depend_neither_on_iterations_nor_on_the_variant(
    shape: str, variant: str, mode: str
) -> None:
    own = {name: tensor.shape for name, tensor in plain(shape).state_dict().items()}
    for r in (1, 2, 5):
        model = iterated(shape, variant, mode, r)
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == own
        assert parameter_count(model) == parameter_count(plain(shape))
    model.load_state_dict(plain(shape).state_dict())


def unrolled(shape: str, model: Any) -> tuple[Any, list[tuple[int, int]]]:
    """Return a plain model that has the body twice, and which of its blocks come from which."""
    origins = [0, 1, 2, 1, 2, 3]
    long = plain(shape, **{"n_layer" if shape == "gpt2" else "num_hidden_layers": len(origins)})
    long.load_state_dict(model.state_dict(), strict=False)
    for own, origin in zip(blocks(long), origins, strict=True):
        own.load_state_dict(blocks(model)[origin].state_dict())
    return long, list(enumerate(origins))


@shapes
def test_c_with_two_iterations_is_the_plain_model_with_the_body_twice(shape: str) -> None:
    model = iterated(shape, "C")
    assert torch.equal(model(tokens()).logits, unrolled(shape, model)[0](tokens()).logits)


def by_hand(model: Any, long: list[nn.Module], variant: str, mode: str, ids: Tensor) -> Tensor:
    """Return GPT-2's logits over untied blocks, written out for two iterations of two blocks."""
    inner = model.transformer
    first = long[0](inner.wte(ids) + inner.wpe(torch.arange(ids.shape[1])))
    one = long[2](long[1](first))
    if variant == "D" and mode == "post":
        one = one + first
    two = long[4](long[3](one + first if mode == "input" else one))
    if variant == "D" and mode != "input":
        two = two + one
    return model.lm_head(inner.ln_f(long[5](two)))


@modes
def test_the_bodys_gradient_is_the_sum_over_untied_copies(variant: str, mode: str) -> None:
    model = iterated("gpt2", variant, mode).double()
    long = [copy.deepcopy(blocks(model)[origin]) for origin in (0, 1, 2, 1, 2, 3)]
    logits = by_hand(model, long, variant, mode, tokens())
    mine = model(tokens()).logits
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-12)
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (mine * weights).sum().backward()
    (logits * weights).sum().backward()
    for index in (1, 2):
        pairs = zip(long[index].parameters(), long[index + 2].parameters(), strict=True)
        sums = [one.grad + other.grad for one, other in pairs]
        for found, wanted in zip(blocks(model)[index].parameters(), sums, strict=True):
            assert float(wanted.abs().max()) > 1e-3
            torch.testing.assert_close(found.grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.few(6)
@modes
@shapes
@pytest.mark.parametrize("r", [1, 2, 4])
def test_no_token_sees_a_later_one(shape: str, variant: str, mode: str, r: int) -> None:
    model = iterated(shape, variant, mode, r)
    ids = tokens()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.few(6)
@modes
@shapes
@pytest.mark.parametrize("r", [1, 2, 4])
def test_decoding_with_a_slot_for_each_iteration_is_the_full_pass(
    shape: str, variant: str, mode: str, r: int
) -> None:
    model = iterated(shape, variant, mode).eval()
    model.config.iterations = r
    ids, cache, parts = tokens(), DynamicCache(config=model.config), []
    with torch.no_grad():
        for step in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            parts.append(model(step, past_key_values=cache, use_cache=True).logits)
        full = model(ids).logits
    assert len(cache.layers) == LAYERS + 2 * (r - 1)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-5 * float(full.abs().max()))


@pytest.mark.few(2)
@shapes
@pytest.mark.parametrize("r", [1, 2, 4, 8])
def test_text_is_generated_alike_with_and_without_a_cache(shape: str, r: int) -> None:
    model = iterated(shape).eval()
    model.config.iterations = r
    # The second row is padded on the left, as a batch of prompts is.
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :4] = 0
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        with_cache, without = (
            model.generate(
                tokens(), attention_mask=mask, max_new_tokens=10, pad_token_id=0, use_cache=cached, **options
            )
            for cached in (True, False)
        )
        assert with_cache.shape == (2, LENGTH + 10)
        assert torch.equal(with_cache, without)


@modes
def test_prenorm_law_of_lengths_and_angles(variant: str, mode: str) -> None:
    model = iterated("gpt2", variant, mode, parts=(1, 2, 1), initializer_range=0.1).double()
    found = states(model, 12)
    lengths = [float(state.norm(dim=-1).mean()) for state in found]
    angles = [float(angle_between(*pair).mean()) for pair in pairwise(found)]
    ratios = [after / before for before, after in pairwise(angles)]
    if variant == "D" and mode in ("inter", "post"):
        assert all(after / before == pytest.approx(2, rel=0.02) for before, after in pairwise(lengths[6:]))
        assert all(0.4 <= ratio <= 0.6 for ratio in ratios[5:])
    elif variant == "C":
        assert all(ratio >= 0.7 for ratio in ratios[5:])


@pytest.mark.few(3)
@modes
@shapes
def test_recomputed_activations_give_the_same_gradients(shape: str, variant: str, mode: str) -> None:
    gradients = []
    for recomputed in (False, True):
        model = iterated(shape, variant, mode, 3).train()
        if recomputed:
            enable_activation_checkpointing(model)
        causal_loss(model, tokens()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


# --- caches ---------------------------------------------------------------------------------------


def test_a_cache_of_other_iterations_is_refused() -> None:
    model = iterated().eval()
    filled = model(tokens(), use_cache=True).past_key_values
    model.config.iterations = 4
    with pytest.raises(ValueError, match="another number of iterations than 4"):
        model(tokens()[:, :1], past_key_values=filled)
    with pytest.raises(ValueError, match="use a DynamicCache"):
        model(tokens(), past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_every_state_can_be_had() -> None:
    model = iterated(r=3)
    output = model(tokens(), output_hidden_states=True)
    # The embeddings, and what each block made whenever it was applied.
    assert len(output.hidden_states) == 1 + 1 + 3 * 2 + 1
    with pytest.raises(ValueError, match="no use for encoder_hidden_states"):
        model(tokens(), encoder_hidden_states=torch.zeros(2, 3, 32))


# --- from the configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "other"), [("tiny", "tiny"), ("350m", "photon-350m")])
def test_presets_have_the_parameters_of_the_plain_model(name: str, other: str) -> None:
    shape, wanted = (compose([f"model={one}"]).model for one in (f"abbie-{name}", other))
    counts = [parameter_count(build_model(one, 500, seed=0, device="meta")) for one in (shape, wanted)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "count"), [("abbie-200m", 204_830_720), ("abbie-350m", 355_985_408)])
def test_sizes_and_budgets_of_the_presets(name: str, count: int) -> None:
    model = compose([f"model={name}"]).model
    assert parameter_count(build_model(model, 500, seed=0, device="meta")) == count
    recipe = model.recipe
    assert recipe.steps == math.ceil(20 * count / (recipe.batch_size * model.sequence_length))


def test_a_floating_point_operation_counts_as_often_as_it_is_done() -> None:
    for r in (1, 2, 8):
        model = iterated(r=r, parts=(1, 2, 1))
        block = parameter_count(blocks(model)[1])
        wanted = flops_per_token(
            parameter_count(model) + 2 * (r - 1) * block, LAYERS + 2 * (r - 1), 32, LENGTH
        )
        assert model_flops_per_token(model, LENGTH) == wanted
    assert model_flops_per_token(iterated(r=1), LENGTH) == model_flops_per_token(plain(), LENGTH)
    assert body_of(plain()) == []


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ((1, 2, 2), {}, r"model.architecture: gpt2 refuses it .*1 \+ 2 \+ 2 blocks, and the model has 4"),
        ((4, 1, 0), {}, r"4 \+ 1 \+ 0 blocks"),
        ((1, 2, 1), {"add_cross_attention": True}, "no cross-attention"),
    ],
)
def test_blocks_that_do_not_add_up_are_refused(
    parts: Sequence[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        iterated(parts=parts, **options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.abbie.body_blocks=0"], "model.abbie.body_blocks.*greater than or equal to 1"),
        (["model.abbie.train_iterations=65"], "model.abbie.train_iterations.*less than or equal to 64"),
        (["model.abbie.variant=E"], "model.abbie.variant"),
        (["model.abbie.residual_mode=none"], "model.abbie.residual_mode"),
        (["+model.abbie.iterations=2"], "model.abbie.iterations"),
        (["+model.architecture.variant=C"], r"model.architecture.variant: set model.abbie.variant instead"),
        (["model.architecture.model_type=opt"], "blocks of opt; those of gpt2 and llama can iterate"),
        (["model.architecture.model_type=abbie_gpt2"], "give the type of its blocks, and model.abbie"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        transformers_config(compose(["model=abbie-tiny", *overrides]).model, VOCABULARY)


def test_any_blocks_of_gpt2_and_llama_can_iterate() -> None:
    keys = "{head_blocks: 10, body_blocks: 10, tail_blocks: 10, train_iterations: 4}"
    model = compose(["model=llama-135m", f"model.abbie={keys}"]).model
    config = transformers_config(model, VOCABULARY)
    assert (config.model_type, config.passes, config.variant) == ("abbie_llama", 4, "D")


@pytest.mark.parametrize("iterations", [0, 65, -1])
def test_iterations_have_bounds_where_they_are_set_later(iterations: int) -> None:
    model = iterated()
    model.config.iterations = iterations
    with pytest.raises(ValueError, match="expected 1 to 64"):
        model(tokens())


def test_blocks_are_thirds_where_nobody_has_divided_them() -> None:
    kind: Any = type(iterated().config)
    config: AbbieFields = kind(n_layer=13)
    assert (config.head_blocks, config.body_blocks, config.tail_blocks) == (4, 5, 4)
    for fields in ({"variant": "X"}, {"residual_mode": "X"}, {"train_iterations": 0}, {"iterations": 65}):
        with pytest.raises(ValueError, match="AbbIE"):
            kind(**fields)


@shapes
def test_a_saved_model_is_read_as_what_it_is(shape: str, tmp_path: Path) -> None:
    model = iterated(shape, "D", "input", 3, (1, 1, 2))
    model.config.iterations = 7
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoConfig"].startswith("abbie.")
    update = {"warm_start": str(tmp_path), "sequence_length": 2 * LENGTH}
    warm = compose(["model=custom"]).model.model_copy(update=update)
    loaded = build_model(warm, VOCABULARY, seed=1)
    # A run has its own number of iterations.
    assert (loaded.config.passes, loaded.config.residual_mode) == (3, "input")
    for one, other in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    sent = self_contained(warm, VOCABULARY)
    assert sent.abbie is not None
    assert sent.architecture is not None
    assert sent.architecture["model_type"] == shape
    assert (sent.abbie.head_blocks, sent.abbie.body_blocks, sent.abbie.tail_blocks) == (1, 1, 2)
    assert not set(sent.architecture) & {*AbbieSection.model_fields, "iterations", "auto_map"}
    assert self_contained(sent, VOCABULARY) == sent
    rebuilt = build_model(sent, VOCABULARY, seed=1)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens()).logits, loaded(tokens()).logits)


def test_a_plain_models_weights_can_begin_to_iterate(tmp_path: Path) -> None:
    model = plain()
    model.save_pretrained(tmp_path)
    abbie = AbbieSection(head_blocks=1, body_blocks=2, tail_blocks=1)
    update = {"warm_start": str(tmp_path), "sequence_length": 2 * LENGTH, "abbie": abbie}
    warm = build_model(compose(["model=custom"]).model.model_copy(update=update), VOCABULARY, seed=1)
    assert warm.config.passes == 2
    warm.config.iterations = 1
    assert torch.equal(warm(tokens()).logits, model(tokens()).logits)


def test_what_is_built_of_it_is_bounded() -> None:
    with pytest.raises(PhotonError, match=r"more than .* parameters"), bounded_model(1000):
        iterated()


@pytest.mark.slow
@shapes
def test_a_compiled_model_gives_the_same_gradients(shape: str) -> None:
    gradients = []
    for compiled in (False, True):
        model = iterated(shape, r=3)
        causal_loss(torch.compile(model) if compiled else model, tokens()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
