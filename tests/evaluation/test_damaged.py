"""A checkpoint of which a bit has changed is no model: what is made of it would be another one."""

from pathlib import Path

import pytest

from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation.export import export_run
from photon.evaluation.load import open_trained
from photon.federation.run import prepare_run
from photon.node import answer
from tests.conftest import small_run


def test_a_changed_weight_is_neither_exported_nor_evaluated(corpus: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_inprocess(
        prepare_run(small_run("rounds=1", "local_steps=4", data=corpus, run_dir=run_dir)),
        answer,
        resume=False,
    )
    file = run_dir / "checkpoints" / "round-000001" / "params.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for path in (run_dir, file.parent):
        with pytest.raises(PhotonError, match=r"params\.safetensors is not what was written"):
            open_trained(path)
    with pytest.raises(PhotonError, match=r"params\.safetensors is not what was written"):
        export_run(run_dir, tmp_path / "export")
    assert not (tmp_path / "export").exists()
