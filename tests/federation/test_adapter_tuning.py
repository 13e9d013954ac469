"""Adapters tuned on conversations and on preferences: with codecs, masks, trees, groups and crashes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run
from photon.node import answer
from photon.silo import service
from photon.state.checkpoint import CheckpointStore
from photon.training.devices import stop_group
from tests.adapted import Adapted, adapted
from tests.objective.test_dpo import write_pairs
from tests.objective.test_sft import write_chats

Run = Callable[..., dict[str, Any]]
TREE = ["federation.tree={north: [alpha, beta], south: [gamma]}", "cohort=null"]
DEEP = ["federation.tree={n: {m: [alpha], k: [beta]}, s: [gamma]}", "cohort=null", "outer=diloco"]
UPDATES = ["strategy.weighting=uniform", "link.uplink_payload=update"]
#: Adam makes whole steps of what another order of sums leaves of rounding.
SGD = ["optimizer=sgd", "optimizer.lr=0.1", "rounds=2"]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted(tmp_path_factory.mktemp("sft"), "sft", write_chats)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted(tmp_path_factory.mktemp("dpo"), "dpo", write_pairs)


@pytest.fixture
def tuning(request: pytest.FixtureRequest) -> Adapted:
    """What is tuned; a test names the objective."""
    found: Adapted = request.getfixturevalue(request.param)
    return found


def params(run_dir: Path) -> dict[str, Tensor]:
    return CheckpointStore(run_dir / "checkpoints").latest()[0].load_params()


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(other[name], tensor, rtol=0, atol=atol), name


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("tuning", "way"),
    [
        ("sft", ["link=topk"]),
        ("dpo", ["link=two-bit"]),
        ("sft", [*TREE, "link=topk-100x"]),
        ("dpo", DEEP),
        ("dpo", ["link=topk"]),
        ("sft", ["link=two-bit"]),
        ("sft", [*TREE, "strategy=worldlm", "outer=diloco"]),
        ("sft", DEEP),
    ],
    indirect=["tuning"],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_adapters_learn_and_the_rest_stays(
    tuning: Adapted, way: list[str], run_small: Run, tmp_path: Path
) -> None:
    run_small(*tuning.overrides, *way, "checkpoint.keep=9", data=tuning.data)
    run_dir = tmp_path / "run"
    first, *later = [event["loss"] for event in events(run_dir, "evaluated")]
    # In three rounds the momentum of an outer optimizer on each level of a tree carries it beyond.
    assert min(later) < first
    assert not events(run_dir, "silo_failed")
    begun, ended = CheckpointStore(run_dir / "checkpoints").load(0).load_params(), params(run_dir)
    moved = {name for name, tensor in ended.items() if not torch.equal(tensor, begun[name])}
    assert moved
    assert all(".lora_" in name for name in moved)


@pytest.mark.few(1)
@pytest.mark.parametrize("tuning", ["sft", "dpo"], indirect=True)
def test_a_masked_sum_of_adapters_is_their_mean(tuning: Adapted, run_small: Run, tmp_path: Path) -> None:
    run_small(*tuning.overrides, *SGD, *UPDATES, data=tuning.data, name="plain")
    run_small(*tuning.overrides, *SGD, *UPDATES, "privacy=secure", data=tuning.data, name="masked")
    assert_close(params(tmp_path / "plain"), params(tmp_path / "masked"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "parallel"), [("sft", "ddp"), ("sft", "fsdp"), ("dpo", "ddp")], indirect=["tuning"]
)
def test_two_processes_of_a_silo_tune_what_one_does(
    tuning: Adapted, parallel: str, run_small: Run, tmp_path: Path
) -> None:
    both = ["training.processes=2", f"training.parallel={parallel}"]
    run_small(*tuning.overrides, *SGD, data=tuning.data, name="one")
    run_small(*tuning.overrides, *SGD, *both, data=tuning.data, name="two")
    stop_group()
    assert_close(params(tmp_path / "one"), params(tmp_path / "two"), atol=1e-6)


def test_preferences_are_not_sharded_with_an_adapter_either(dpo: Adapted, run_small: Run) -> None:
    with pytest.raises(PhotonError, match=r"training\.parallel=fsdp: DirectPreference needs the whole model"):
        run_small(*dpo.overrides, "training.processes=2", "training.parallel=fsdp", data=dpo.data)


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.few(1)
@pytest.mark.parametrize("tuning", ["sft", "dpo"], indirect=True)
def test_a_run_that_was_killed_within_a_round_ends_with_the_same_bits(
    tuning: Adapted, small_config: Callable[..., RunConfig], run_small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a codec has left out so far, and what the outer optimizer remembers, are of adapters alone."""
    ways = [*tuning.overrides, "outer=diloco", "link=topk", "cohort=2"]
    whole = run_small(*ways, data=tuning.data, name="whole")
    train, asked = service.train, []

    def mortal(request: Any, *rest: Any) -> Any:
        asked.append(request.round)
        if asked.count(2) == 2:
            raise Killed
        return train(request, *rest)

    config = prepare_run(small_config(*ways, data=tuning.data))
    with monkeypatch.context() as patch:
        patch.setattr(service, "train", mortal)
        with pytest.raises(Killed):
            run_inprocess(config, answer, resume=False)
    assert run_inprocess(config, answer, resume=True)["weights_sha256"] == whole["weights_sha256"]
