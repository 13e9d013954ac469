"""An objective without steps on real SuperNodes: the same sums as in one process, to the bit."""

import os
from pathlib import Path

import pytest
import torch

from photon.engine.deployment import COMPLETED
from photon.engine.inprocess import run_inprocess
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from tests.conftest import deal, small_run
from tests.deployment.harness import Deployment

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1800)]

RUN = [
    "strategy=sums",
    "objective._target_=tests.objective.toy.Sums",
    "rounds=2",
    "cohort=null",
    "federation.silos=2",
]


def test_deployed_silos_sum_as_one_process_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    (tmp_path / "toys.yaml").write_text("modules: [tests.objective.toy]\n")
    toys = f'policy="{tmp_path / "toys.yaml"}"'
    silos = ["alpha", "beta"]
    with Deployment(tmp_path / "fed", corpus, secure=False, silos=silos, node_config=toys) as deployment:
        deployment.up()
        run = deployment.submit(RUN)
        assert run.wait() == COMPLETED, run.log()
    deal(corpus, tmp_path / "dealt", {"alpha": 1, "beta": 1})
    alone = small_run(*RUN, data=tmp_path / "dealt", run_dir=tmp_path / "alone")
    run_inprocess(prepare_run(alone), answer, resume=False)
    deployed, expected = (
        CheckpointStore(folder / "checkpoints").load(2) for folder in (run.run_dir, tmp_path / "alone")
    )
    assert deployed.state.global_step == 0
    assert deployed.load_kept().keys() == expected.load_kept().keys() == {"shared/gram"}
    for name, tensor in expected.load_kept()["shared/gram"].items():
        assert torch.equal(deployed.load_kept()["shared/gram"][name], tensor)
