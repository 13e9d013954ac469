"""What an operator sets: it is checked, stays on the silo, and goes before what the server says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.silo.policy import NO_POLICY
from photon.silo.site import SiloSite, find_site
from photon.state.checkpoint import CheckpointStore

Make = Callable[..., RunConfig]
OWN = {"data-dir": "/data", "state-dir": "/state"}
SIMULATED = {"partition-id": 0, "num-partitions": 1}


def test_a_deployed_silo_names_its_own_folders(small_config: Make) -> None:
    given = small_config()
    site, config = find_site(OWN | {"store-url": "s3://bucket/run"}, given)
    assert site == SiloSite(
        Path("/data"), Path("/state"), store="s3://bucket/run", policy=NO_POLICY, privacy=given.privacy
    )
    assert config == given


def test_a_simulated_silo_lives_in_the_run(small_config: Make, corpus: Path, tmp_path: Path) -> None:
    given = small_config()
    site, _ = find_site(SIMULATED, given)
    own = tmp_path / "run" / "silos"
    assert site == SiloSite(corpus, own, store=None, policy=NO_POLICY, privacy=given.privacy, simulated=True)


@pytest.mark.parametrize("node_config", [{}, {"state-dir": "/state"}])
def test_the_server_cannot_name_a_folder_of_a_deployed_silo(small_config: Make, node_config: Any) -> None:
    with pytest.raises(PhotonError, match="data-dir and state-dir are not set"):
        find_site(node_config, small_config())


def test_what_the_operator_sets_goes_before_the_run(small_config: Make) -> None:
    own: dict[str, Any] = {
        "device": "cpu",
        "processes": 2,
        "parallel": "fsdp",
        "threads": 3,
        "micro-batch-size": 2,
        "precision": "bf16",
        "matmul-precision": "medium",
    }
    run = small_config("training.device=auto", "training.threads=1")
    _, config = find_site(OWN | own, run)
    for key, value in own.items():
        assert getattr(config.training, key.replace("-", "_")) == value
    untouched = set(type(run.training).model_fields) - {key.replace("-", "_") for key in own}
    for key in untouched:
        assert getattr(config.training, key) == getattr(run.training, key)
    assert config.model_copy(update={"training": run.training}) == run


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"micro_batch_size": 2}, "micro_batch_size: unknown key; did you mean 'micro-batch-size'?"),
        ({"proceses": 2}, "proceses: unknown key; did you mean 'processes'?"),
        ({"processes": 0}, "processes=0: input should be greater than or equal to 1"),
        ({"processes": "many"}, "processes='many'"),
        ({"parallel": "dp"}, "parallel='dp': input should be 'ddp' or 'fsdp'"),
        ({"micro-batch-size": "all"}, "micro-batch-size"),
        ({"processes": 3}, "training.processes=3 does not divide training.batch_size=4"),
        ({"micro-batch-size": 3}, "micro_batch_size=3 does not divide"),
        ({"micro-batch-size": 0}, "micro_batch_size=0 does not divide"),
        ({"micro-batch-size": "auto", "processes": 2}, "micro_batch_size=auto works with"),
        ({"state-dir": None}, "state-dir is not; set both"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(small_config: Make, own: Any, message: str) -> None:
    with pytest.raises(PhotonError) as error:
        find_site(OWN | own, small_config())
    assert str(error.value).startswith("node config: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- silos of different machines in one federation ----------------------------------------------------


#: Adam divides by its own moments and so enlarges the rounding of gradients that are zero but for rounding.
PLAIN_SGD = ["optimizer=sgd", "optimizer.lr=0.5"]
Federate = Callable[..., Path]


@pytest.fixture
def federate(small_config: Make, silo_folders: dict[str, Path], tmp_path: Path) -> Federate:
    """Train two silos, each on a node with settings of its own, and return the run's folder."""

    def run(name: str, own: dict[str, dict[str, Any]]) -> Path:
        nodes = {
            number: {
                "data-dir": str(data),
                "state-dir": str(tmp_path / f"{name}-state" / silo),
                **own.get(silo, {}),
            }
            for number, (silo, data) in enumerate(silo_folders.items(), start=1)
        }
        config = prepare_run(small_config("cohort=2", "rounds=2", "local_steps=2", *PLAIN_SGD, name=name))
        run_federation(config, InProcessGrid(answer, nodes), resume=False, live=False)
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    "own",
    [
        pytest.param({"processes": 2}, marks=pytest.mark.slow),
        {"micro-batch-size": 1},
        {"micro-batch-size": "auto"},
    ],
    ids=str,
)
def test_a_silo_with_devices_of_its_own_trains_as_the_others_do(
    federate: Federate, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However beta gets through its batches, the federation ends with the same weights and figures."""
    from photon.silo import runtime

    probed: list[int] = []

    def probe(step: Any, batch_size: int) -> int:
        probed.append(batch_size)
        return 2

    monkeypatch.setattr(runtime, "find_micro_batch_size", probe)
    alike, different = federate("alike", {}), federate("different", {"beta": own})
    assert set(probed) == ({4} if own.get("micro-batch-size") == "auto" else set())
    expected, found = (CheckpointStore(run / "checkpoints").latest()[0] for run in (alike, different))
    assert expected.state.ledger.keys() == {"alpha", "beta"}
    for name in ("alpha", "beta"):
        for figure in ("last_round", "position", "tokens"):
            assert getattr(found.state.ledger[name], figure) == getattr(expected.state.ledger[name], figure)
    weights = found.load_params()
    for name, tensor in expected.load_params().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
