"""Silos of islands on real SuperNodes: the tree that they stand for, and what is left of a killed node."""

import json
from pathlib import Path

import psutil
import pytest

from photon.engine.deployment import COMPLETED
from photon.engine.inprocess import run_inprocess
from photon.federation.run import prepare_run
from photon.files.processes import is_gone
from photon.node import answer
from photon.telemetry.events import RoundStarted, SiloFinished
from tests.conftest import deal, small_run
from tests.deployment.harness import Deployment, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1800)]

RUN = ["cohort=null", "rounds=2", "evaluation.every=2", "federation.silos=2"]
TREE = "federation.tree={alpha: [alpha-1, alpha-2], beta: [beta-1, beta-2]}"


def islands_of(deployment: Deployment, silo: str) -> list[psutil.Process]:
    """Return the processes of a silo's islands, which are nobody's children."""
    folder = str(deployment.state_folder(silo) / silo / "islands")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "photon.worker" in command and any(word.startswith(folder) for word in command):
            found.append(process)
    return found


def test_silos_of_islands_train_as_one_process_does(corpus: Path, tmp_path: Path) -> None:
    with Deployment(
        tmp_path / "fed", corpus, secure=False, silos=["alpha", "beta"], node_config="islands=2"
    ) as deployment:
        deployment.up()
        run = deployment.submit(RUN)
        run.wait_for(lambda events: any(isinstance(e, RoundStarted) and e.round == 2 for e in events))
        processes = [process for silo in ("alpha", "beta") for process in islands_of(deployment, silo)]
        assert len(processes) == 4
        assert run.wait() == COMPLETED, run.log()
        # The same processes served both rounds.
        assert not any(is_gone(process) for process in processes)
        deployment.kill("alpha")
        wait_until(lambda: all(is_gone(p) for p in processes[:2]), "the end of alpha's islands", 30)
    deployed = json.loads((run.run_dir / "summary.json").read_text())
    deal(corpus, tmp_path / "dealt", {"alpha": 2, "beta": 2})
    tree = small_run(*RUN, TREE, data=tmp_path / "dealt", run_dir=tmp_path / "inprocess")
    inprocess = run_inprocess(prepare_run(tree), answer, resume=False)
    assert deployed["weights_sha256"] == inprocess["weights_sha256"]
    assert deployed["tokens"] == inprocess["tokens"]
    assert {e.silo for e in run.events() if isinstance(e, SiloFinished)} == {"alpha", "beta"}
