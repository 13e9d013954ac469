"""A silo with a SuperNode of its own lies, in each round in another way: the others train on."""

import os
from pathlib import Path

import pytest

from photon.engine.deployment import COMPLETED
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import SiloFailed, SiloFinished
from tests.adversary.lies import TRAIN
from tests.deployment.harness import Deployment

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(3600)]

#: The worst ones, by name: each has ended a run or ruined a model once.
WORST = [
    "update_norm=1e+300",
    "steps=4611686018427387904",
    "tokens=1000000000000",
    "silo=../x",
    "1e999",
    "an enormous length",
    "1e10",
    "float64 1e300",
    "times -1000",
    "an error of 5 MB",
]

#: What Python runs first in every process of the lying silo: its worker answers in other words.
LIAR = """
import sys

if "photon.worker" in sys.orig_argv:
    import photon.node
    from flwr.app import Message, Metadata, RecordDict

    from photon.link.messages import BODY, TrainRequest, unpack
    from tests.adversary.lies import TRAIN, read_body, write_body
    from tests.deployment.test_lies import WORST

    honest = photon.node.answer

    def lying(kind, content, node_config, *more, **named):
        reply = honest(kind, content, node_config, *more, **named)
        asked = unpack(content, TrainRequest) if kind == "train" else None
        if asked is None or asked.round < 2:
            return reply
        lie = next(one for one in TRAIN if one.name == WORST[asked.round - 2])
        if lie.name.startswith("an error"):
            raise RuntimeError("\\x1b]0;pwned\\x07" + "x" * 5_000_000)
        body = read_body(reply)
        lie.change(body, reply, None)
        if body:
            import json

            write_body(reply, json.dumps(body))
        return reply

    photon.node.answer = lying
"""


def test_a_deployed_silo_that_lies_costs_its_replies(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = {lie.name: lie for lie in TRAIN}
    assert set(WORST) <= set(by_name)
    liar = tmp_path / "liar"
    liar.mkdir()
    (liar / "sitecustomize.py").write_text(LIAR)
    root = str(Path(__file__).parents[2])
    usual = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    rounds = len(WORST) + 1
    with Deployment(tmp_path / "fed", corpus, secure=False) as deployment:
        deployment.up([])
        for silo in ("alpha", "beta", "gamma"):
            path = os.pathsep.join([str(liar), usual]) if silo == "alpha" else usual
            monkeypatch.setenv("PYTHONPATH", path)
            deployment.start(silo)
        deployment.wait_online(3)
        run = deployment.submit(
            [
                f"rounds={rounds}",
                "cohort=3",
                "federation.silos=3",
                "local_steps=1",
                "model.recipe.warmup_steps=1",
                "evaluation.every=100",
                "federation.admission.quarantine_after=null",
            ]
        )
        assert run.wait() == COMPLETED, run.log()
    failed = {event.round: event for event in run.events() if isinstance(event, SiloFailed)}
    assert {event.silo for event in failed.values()} == {"alpha"}
    assert sorted(failed) == list(range(2, rounds + 1))
    assert all(event.reason.isprintable() and len(event.reason) <= 1000 for event in failed.values())
    finished = [(event.round, event.silo) for event in run.events() if isinstance(event, SiloFinished)]
    honest = [(each, silo) for each in range(1, rounds + 1) for silo in ("beta", "gamma")]
    assert finished == sorted([(1, "alpha"), *honest])
    checkpoint, passed_over = CheckpointStore(run.run_dir / "checkpoints").latest()
    assert (checkpoint.state.round, passed_over) == (rounds, [])
