"""Secure aggregation between real SuperNodes, one of which hangs once the others count on its masks."""

import json
from pathlib import Path

import pytest
import torch

from photon.engine.deployment import COMPLETED
from photon.privacy.masking import Quantizer
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.telemetry.events import RoundFinished, RoundStarted, SiloFailed, SiloFinished
from tests.deployment.harness import Deployment, wait_until

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(900)]

RUN = [
    *("privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update", "privacy.threshold=2"),
    *("cohort=null", "rounds=2", "checkpoint.keep=3", "evaluation.every=1000", "federation.deadline=60"),
]


def test_the_sum_is_that_of_those_who_answered(corpus: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("secure_aggregation: true\n")
    with Deployment(tmp_path / "fed", corpus, node_config=f'policy="{policy}"') as deployment:
        deployment.up()
        run = deployment.submit(RUN)
        run.wait_for(lambda events: any(isinstance(e, RoundStarted) and e.round == 2 for e in events))
        file = deployment.state_folder("gamma") / "gamma" / "secure.json"

        def shared() -> bool:
            attempt = json.loads(file.read_text())
            return attempt["round"] == 2 and bool(attempt["keys"])

        wait_until(shared, "gamma's shares of round 2", pause=0.01)
        worker = deployment.worker("gamma")
        worker.suspend()
        assert run.wait() == COMPLETED, run.log()
        worker.resume()
        events = run.events()
        assert len([event for event in events if isinstance(event, RoundFinished)]) == 2
        finished = [(e.round, e.silo) for e in events if isinstance(e, SiloFinished)]
        assert {silo for number, silo in finished if number == 1} == {"alpha", "beta", "gamma"}
        # Where gamma was quicker than this test its update is in the sum, and the others unmasked it.
        assert {event.silo for event in events if isinstance(event, SiloFailed)} <= {"gamma"}
        store, step = CheckpointStore(run.run_dir / "checkpoints"), Quantizer(8.0, 3).step
        for number in (1, 2):
            before, after = (store.load(at).load_params() for at in (number - 1, number))
            updates = [
                load_groups(
                    deployment.state_folder(silo) / silo / f"round-{number:06d}" / "reply.safetensors"
                )["params"]
                for at, silo in finished
                if at == number
            ]
            for name, tensor in before.items():
                mean = torch.stack([update[name].double() for update in updates]).mean(0)
                error = (tensor.double() - mean - after[name].double()).abs().max()
                assert float(error) <= step / 2 + 2**-22, name
