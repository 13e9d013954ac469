"""Every preset in a federation, and LoRDO's bases over several rounds of it."""

from pathlib import Path

import pytest
import torch

from photon.optim.low_rank import leading_singular_vectors
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups

PRESETS = sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "optimizer").glob("*.yaml"))


@pytest.mark.few(3)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_learns(run_small, preset):
    rate = 0.3 if preset == "sgd" else 0.01
    summary = run_small(f"optimizer={preset}", f"optimizer.lr={rate}", "rounds=3")
    assert summary["perplexity"]["final"] < 0.97 * summary["perplexity"]["initial"]


def test_bases_of_all_silos_are_those_of_the_pseudo_gradient(run_small, tmp_path):
    run_small("optimizer=lordo", "optimizer.rank=3", "optimizer.lr=0.01", "checkpoint.keep=4", "rounds=3")
    run = tmp_path / "run"
    store = CheckpointStore(run / "checkpoints", keep=4)
    theta = [store.load(number).load_params() for number in range(3)]
    for number in (2, 3):
        folders = sorted(run.glob(f"silos/*/round-{number:06d}"))
        assert len(folders) == 3
        for folder in folders:
            bases = load_groups(folder / "optimizer.safetensors")["basis"]
            assert len(bases) == 4
            for name, basis in bases.items():
                delta = theta[number - 2][name] - theta[number - 1][name]
                assert torch.equal(basis, leading_singular_vectors(delta, 3)), (folder, name)


def test_bases_stay_equal_and_orthonormal_when_all_states_are_averaged(run_small, tmp_path):
    run_small("optimizer=lordo", "optimizer.rank=3", "optimizer.lr=0.01", "strategy=local-adam", "rounds=3")
    folders = sorted((tmp_path / "run").glob("silos/*/round-000003"))
    bases = [load_groups(folder / "optimizer.safetensors")["basis"] for folder in folders]
    assert len(bases) == 3
    for name, basis in bases[0].items():
        assert all(torch.equal(basis, other[name]) for other in bases)
        assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-6)
