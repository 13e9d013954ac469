import torch

from photon.optim import MuonAdamW
from tests.optim.helpers import largest_difference, parameters, set_gradients, trajectory


def test_is_torchs_muon_on_hidden_matrices_and_torchs_adamw_on_the_rest():
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
