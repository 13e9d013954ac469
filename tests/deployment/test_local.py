"""A deployed run trains the same weights as an in-process one, with TLS, node keys and a database."""

import json
from pathlib import Path

import pytest

from photon.engine.deployment import COMPLETED
from photon.engine.inprocess import run_inprocess
from photon.federation.run import prepare_run
from photon.node import answer
from photon.telemetry.events import RoundFinished, RunStarted
from tests.conftest import small_run, write_corpus
from tests.deployment.harness import Deployment, wait_until

RUN = ["rounds=2", "cohort=2", "federation.silos=2"]

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with two silos."""
    return write_corpus(tmp_path_factory.mktemp("pair"), {"alpha": "abcdefgh", "beta": "ijklmnop"})


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "insecure"])
def test_a_deployed_run_equals_the_inprocess_run(pair: Path, tmp_path: Path, secure: bool) -> None:
    reference = run_inprocess(
        prepare_run(small_run(*RUN, data=pair, run_dir=tmp_path / "reference")),
        answer,
        resume=False,
    )
    with Deployment(tmp_path / "fed", pair, secure=secure) as deployment:
        deployment.up()
        run = deployment.submit(RUN)
        assert run.wait() == COMPLETED, run.log()
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]
    assert summary["engine"] == "deployment"
    for silo in ("alpha", "beta"):
        state = deployment.state_folder(silo)
        # Beside them are what the node approves, and models that it has received for any of its silos.
        of_the_node = {"_code", ".received"}
        folders = [path.name for path in state.iterdir() if path.is_dir() and path.name not in of_the_node]
        assert folders == [silo], "a silo keeps its own state and no other's"
        log = (state / "worker.log").read_text()
        assert log.count(" serves for process ") == 1, "one worker serves all rounds"
        assert log.count("train: done") == 2


def test_a_run_whose_server_died_is_resumed(pair: Path, tmp_path: Path) -> None:
    run_config = ["rounds=3", *RUN[1:]]
    reference = run_inprocess(
        prepare_run(small_run(*run_config, data=pair, run_dir=tmp_path / "reference")),
        answer,
        resume=False,
    )
    with Deployment(tmp_path / "fed", pair, secure=False) as deployment:
        deployment.up()
        run = deployment.submit(run_config)
        run.wait_for(lambda events: any(isinstance(e, RoundFinished) for e in events), "the first round")
        (server,) = deployment.children("superexec", "flwr-serverapp")
        server.kill()
        wait_until(lambda: run.status().startswith("finished"), "Flower noticing", pause=2.0)
        assert run.status() == "finished:failed"
        run.resume()
    first, second = (event for event in run.events() if isinstance(event, RunStarted))
    assert first.resumed_from is None
    assert second.resumed_from in (1, 2)
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["weights_sha256"] == reference["weights_sha256"]
