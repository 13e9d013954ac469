import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from photon.config.compose import compose
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation.export import export_run
from photon.evaluation.load import open_trained
from photon.evaluation.sparse_file import load_sparse, save_sparse
from photon.federation.run import prepare_run
from photon.node import answer
from photon.training.groups import read_params
from tests.conftest import SMALL


@pytest.fixture
def params() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(7, 5, generator=generator) * (torch.rand(7, 5, generator=generator) > 0.8)
    return {"a.weight": sparse, "a.bias": torch.ones(7), "b.weight": torch.zeros(3, 2)}


def test_what_is_written_is_read(params: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_sparse(tmp_path / "x", params)
    assert {name: tensor.tolist() for name, tensor in load_sparse(tmp_path / "x").items()} == {
        name: tensor.tolist() for name, tensor in params.items()
    }
    stored = load_file(tmp_path / "x")
    assert stored["a.weight.mask"].numel() == 5
    assert stored["a.weight.values"].numel() == int(params["a.weight"].count_nonzero())
    assert "a.bias" in stored


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.pop("a.weight.values"),
        lambda t, m: t.update({"a.weight.values": torch.ones(99)}),
        lambda t, m: t.update({"a.weight.mask": torch.zeros(9, dtype=torch.uint8)}),
        lambda t, m: m.update(shapes="nothing"),
        lambda t, m: m.update(shapes=json.dumps({"a.weight": [-7, 5]})),
        lambda t, m: m.update(format="photon-sparse/2"),
    ],
)
def test_what_does_not_add_up_is_refused(
    change: object, params: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "x"
    save_sparse(file, params)
    tensors, metadata = (
        load_file(file),
        {
            "format": "photon-sparse/1",
            "shapes": json.dumps({"a.weight": [7, 5], "b.weight": [3, 2]}),
        },
    )
    change(tensors, metadata)  # type: ignore[operator]
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(PhotonError, match=r"damaged|format"):
        load_sparse(file)
    file.write_bytes(b"short")
    with pytest.raises(PhotonError, match="damaged"):
        load_sparse(file)


def test_a_sparse_export_is_the_same_model_in_fewer_bytes(corpus: Path, tmp_path: Path) -> None:
    run = [*SMALL, "strategy=sparsyfed", "strategy.sparsity=0.9", "cohort=2", f"data.path={corpus}"]
    run_dir = tmp_path / "run"
    run_inprocess(prepare_run(compose([*run, f"run_dir={run_dir}"])), answer, resume=False)
    export_run(run_dir, tmp_path / "dense")
    export_run(run_dir, tmp_path / "sparse", sparse=True)
    one, other = (open_trained(tmp_path / kind) for kind in ("dense", "sparse"))
    assert one.tokenizer_sha256 == other.tokenizer_sha256
    for (name, here), there in zip(
        read_params(one.model).items(), read_params(other.model).values(), strict=True
    ):
        assert torch.equal(here, there), name
    sizes = [(tmp_path / k).stat().st_size for k in ("dense/model.safetensors", "sparse/sparse.safetensors")]
    assert sizes[1] < 0.9 * sizes[0]
    assert "photon generate" in (tmp_path / "sparse" / "README.md").read_text()
    export_run(run_dir, tmp_path / "sparse")
    assert not (tmp_path / "sparse" / "sparse.safetensors").exists()
