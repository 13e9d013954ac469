import copy

import pytest
import torch
from torch import nn

from photon.models.flops import flops_per_token
from photon.optim import MuonAdamW, orthogonal
from photon.optim.orthogonal import BatchedMuon, orthogonalised
from tests.optim.helpers import largest_difference, parameters, set_gradients, trajectory


def test_is_torchs_muon_on_hidden_matrices_and_torchs_adamw_on_the_rest(monkeypatch):
    # As torch's own, on a machine without bfloat16, too.
    monkeypatch.setattr("photon.optim.orthogonal.product_format", lambda device: torch.bfloat16)
    ours = trajectory(lambda p: MuonAdamW(p, 0.01, betas=(0.9, 0.95)), 8)
    named = parameters()
    matrices = [parameter for name, parameter in named if name in ("hidden", "tall")]
    others = [parameter for name, parameter in named if name not in ("hidden", "tall")]
    muon = torch.optim.Muon(matrices, 0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(8):
        set_gradients(named, step)
        muon.step()
        adamw.step()
    # AdamW rounds a little differently fused.
    assert largest_difference(ours, [parameter.detach() for _, parameter in named]) < 1e-6


def test_without_names_every_matrix_is_muons():
    named = parameters()
    optimizer = MuonAdamW([parameter for _, parameter in named], 0.01)
    set_gradients(named, 0)
    optimizer.step()
    with_buffer = [name for name, p in named if "momentum_buffer" in optimizer.state[p]]
    assert with_buffer == ["embed", "hidden", "tall"]


def test_a_group_keeps_its_learning_rate_in_both_parts():
    named = parameters()
    optimizer = MuonAdamW([{"params": named[:3], "lr": 0.5}, {"params": named[3:]}], 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.01, 0.5, 0.01]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


#: Several of one shape, one that stands, and one alone.
SHAPES = [(24, 32), (24, 32), (40, 12), (24, 32), (40, 12), (16, 16)]


def matrices(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


@pytest.mark.parametrize(("products", "share"), [(torch.bfloat16, 0.02), (torch.float32, 0.05)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"nesterov": False, "weight_decay": 0.0}, {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.7}],
)
def test_a_batch_is_what_torch_does_one_by_one(monkeypatch, settings, products, share):
    """To a share of the largest change: torch multiplies in bfloat16, whose last bit is 0.8 % of a value."""
    monkeypatch.setattr(orthogonal, "product_format", lambda device: products)
    # Batches of at most two matrices, so that one shape has several.
    monkeypatch.setitem(orthogonal._TOGETHER, "cpu", 2 * 24 * 32)
    one_by_one, together = matrices(), matrices()
    torchs = torch.optim.Muon(one_by_one, lr=0.02, **settings)
    ours = BatchedMuon(together, lr=0.02, **settings)
    for step in range(3):
        for number, (one, other) in enumerate(zip(one_by_one, together, strict=True)):
            generator = torch.Generator().manual_seed(100 * step + number)
            one.grad = torch.randn(one.shape, generator=generator)
            # One has no gradient in one step.
            other.grad = one.grad.clone()
            if (step, number) == (1, 3):
                one.grad = other.grad = None
        torchs.step()
        ours.step()
        for one, other, old in zip(one_by_one, together, matrices(), strict=True):
            assert (one - other).abs().max() <= share * (one - old).abs().max()
    for one, other in zip(one_by_one, together, strict=True):
        assert torch.equal(torchs.state[one]["momentum_buffer"], ours.state[other]["momentum_buffer"])


def test_what_comes_out_is_nearly_orthogonal():
    drawn = torch.randn(5, 24, 64, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(drawn.clone(), (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The singular vectors are those of the matrix: U Vᵀ is what it is nearest to.
    u, _, v = torch.linalg.svd(drawn, full_matrices=False)
    overlap = ((u @ v) * found).sum((1, 2)) / (found.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert overlap.min() > 0.98


def test_matrices_do_not_see_each_other():
    drawn = torch.randn(5, 24, 64, generator=torch.Generator().manual_seed(0))
    drawn[1] *= 1e4
    drawn[2] = 0
    given = ((3.4445, -4.7750, 2.0315),)
    found = orthogonalised(drawn.clone(), *given, steps=5, eps=1e-7)
    alone = [orthogonalised(one[None].clone(), *given, steps=5, eps=1e-7)[0] for one in drawn]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert not found[2].any()


def test_a_matrix_without_a_gradient_stays_and_a_gradient_of_zero_only_decays():
    one, other = matrices()[:2]
    ours = BatchedMuon([one, other], lr=0.1, weight_decay=0.5)
    before = copy.deepcopy([one.detach(), other.detach()])
    other.grad = torch.zeros_like(other)
    ours.step()
    assert torch.equal(one, before[0])
    torch.testing.assert_close(other.detach(), before[1] * 0.95)


def test_by_count_of_operations_muon_adds_little_to_a_step_on_a_gpu():
    """Of photon-125m at its local batch: the orthogonalisation against forward and backward pass."""
    width, layers, tokens, sequence = 768, 12, 32 * 2048, 2048
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    step = tokens * flops_per_token(125_000_000, layers, width, sequence)
    muon = layers * sum(orthogonal.flops(*shape) for shape in shapes)
    assert 1.0 < (step + muon) / step < 1.3
