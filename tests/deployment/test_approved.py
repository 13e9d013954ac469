"""A silo runs what it approved and nothing else: one byte more in what a run brings leaves no trace there."""

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from photon.deployment.approved import ApprovedCode
from photon.deployment.bundle import digest
from photon.engine.app_folder import app_folder
from photon.engine.deployment import COMPLETED
from photon.flower_compat import build_bundle
from photon.telemetry.events import Notice
from tests.conftest import write_corpus
from tests.deployment.harness import Deployment

PHOTON = str(Path(sys.executable).parent / "photon")

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]


def app_without_the_check(folder: Path, trace: str) -> Path:
    """Make an app of Photon's that has nothing of the check, and leaves a file wherever it is imported."""
    left_out = shutil.ignore_patterns("deployment", "cli.py", "commands")
    with app_folder() as own:
        shutil.copytree(own, folder, ignore=left_out)
    client = folder / "photon" / "client_app.py"
    touch = f"import os, pathlib\npathlib.Path(os.environ['FLWR_HOME'], '{trace}').touch()\n"
    client.write_text(client.read_text() + touch)
    return folder


def test_one_changed_byte_is_refused_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = app_without_the_check(tmp_path / "known", "trace-0")
    changed = app_without_the_check(tmp_path / "changed", "trace-1")
    sent = build_bundle(changed)
    assert len(sent) == len(build_bundle(known))
    data = write_corpus(tmp_path / "corpus", {"alpha": "abcdefgh", "beta": "ijklmnop"})
    with Deployment(tmp_path / "fed", data) as deployment:
        alpha, beta = (deployment.state_folder(silo) for silo in ("alpha", "beta"))
        for state, folder in ((alpha, known), (beta, changed)):
            subprocess.run([PHOTON, "silo", "approve", str(state), str(folder), "--yes"], check=True)
        deployment.up()
        monkeypatch.setattr("photon.engine.deployment.app_folder", lambda: nullcontext(changed))
        run = deployment.submit(["rounds=2", "cohort=1", "federation.silos=1"])
        assert run.wait() == COMPLETED, run.log()
        summary = json.loads((run.run_dir / "summary.json").read_text())
        assert list(summary["perplexity"]["per_silo"]) == ["beta"]

        refusal = f"this silo has not approved the application with the SHA-256 {digest(sent)} (photon/photon"
        told = [event.message for event in run.events() if isinstance(event, Notice)]
        assert any(f"cannot describe its silos: {refusal}" in message for message in told), told
        assert f"photon: refused: {refusal}" in deployment.program("alpha").log.read_text()

        # The very code that was approved by the other leaves its trace there, so it would have here.
        assert (deployment.program("beta").home / "trace-1").exists()
        for trace in ("trace-0", "trace-1", "apps"):
            assert not (deployment.program("alpha").home / trace).exists()
        assert [path.name for path in alpha.iterdir() if path.is_dir()] == ["_code"]
        assert not (alpha / "_code" / "unpacked").exists()
        assert [file.read_bytes() for file in ApprovedCode(alpha).refused()] == [sent]

        said = subprocess.run(
            [PHOTON, "silo", "status", "--json", str(alpha), str(beta)],
            capture_output=True,
            text=True,
            check=True,
        )
        refusing, training = json.loads(said.stdout)
        assert (refusing["silos"], list(refusing["refused"])) == ({}, [digest(sent)])
        assert [one["sha256"] for one in training["approved"]] == [digest(sent)]
        (use,) = training["silos"]["beta"]["runs"].values()
        assert use["releases"] == 2
        assert use["tokens"] > 0
