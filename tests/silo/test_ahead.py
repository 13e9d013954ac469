"""What a silo could not take part in to the end, it says before the first round."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.node import answer
from photon.silo.shapes import param_shapes
from photon.strategy.base import LOOKED_AHEAD, strategy_of
from photon.telemetry.events import Notice, SiloFailed, SiloFinished
from photon.telemetry.log import read_events

Start = Callable[..., dict[str, Any]]
#: Moments are averaged in rounds 3 and 6; nothing but parameters leaves before.
DESLOC = ("strategy=desloc", "strategy.sync.exp_avg=12", "strategy.sync.exp_avg_sq=24", "rounds=3")


@pytest.fixture
def start(silo_folders: dict[str, Path], small_config: Callable[..., RunConfig], tmp_path: Path) -> Start:
    """Train alpha and beta on nodes of their own, beta with a policy or a node config of its own."""

    def run(rules: Mapping[str, Any], *overrides: str, **own: Any) -> dict[str, Any]:
        nodes: dict[int, dict[str, Any]] = {
            number: {"data-dir": str(data), "state-dir": str(tmp_path / "state" / silo)}
            for number, (silo, data) in enumerate(silo_folders.items(), start=1)
        }
        if rules:
            (tmp_path / "policy.yaml").write_text(json.dumps(rules))
            nodes[2]["policy"] = str(tmp_path / "policy.yaml")
        nodes[2] |= own
        config = prepare_run(small_config("cohort=null", *overrides))
        return run_federation(config, InProcessGrid(answer, nodes), resume=False, live=False)

    return run


def told(run_dir: Path) -> tuple[list[str], set[str], int]:
    """Return the warnings of a run, the silos that have trained, and how often one failed in a round."""
    events = read_events(run_dir / "events.jsonl")
    warnings = [event.message for event in events if isinstance(event, Notice) and event.level == "warning"]
    trained = {event.silo for event in events if isinstance(event, SiloFinished)}
    return warnings, trained, sum(isinstance(event, SiloFailed) for event in events)


@pytest.mark.parametrize(
    ("rules", "overrides", "reason"),
    [
        (
            {"privacy": {"clip_norm": 1.0}},
            DESLOC,
            "privacy=parameters alone, and the request asks for the state groups exp_avg",
        ),
        ({"max_parameters": 100}, (), "max_parameters=100, and the request asks for a model of"),
        (
            {"secure_aggregation": True},
            (),
            "secure_aggregation=true, and the request asks for an update with",
        ),
        (
            {"privacy": {"clip_norm": 1.0, "noise_multiplier": 1.0}},
            ("strategy=topk",),
            "privacy=noise on every coordinate, and the request asks for a sparse model",
        ),
    ],
)
def test_a_policy_that_forbids_some_round_keeps_its_silo_out_of_all(
    rules: dict[str, Any], overrides: tuple[str, ...], reason: str, start: Start, tmp_path: Path
) -> None:
    start(rules, *overrides)
    warnings, trained, failures = told(tmp_path / "run")
    assert [line for line in warnings if f"refused by beta's policy: {reason}" in line]
    assert (trained, failures) == ({"alpha"}, 0)
    assert not (tmp_path / "state" / "beta").exists(), "nothing was trained there"


def test_a_policy_that_bounds_updates_takes_part_where_parameters_alone_leave(
    start: Start, tmp_path: Path
) -> None:
    start({"privacy": {"clip_norm": 1.0}}, "rounds=2")
    warnings, trained, failures = told(tmp_path / "run")
    assert (trained, failures) == ({"alpha", "beta"}, 0)
    assert not [line for line in warnings if "refused" in line]


@pytest.mark.parametrize("way", [["link.transport=store"], ["link.inline_limit_mb=0.001"]])
def test_a_node_that_does_not_reach_the_store_says_so_first(
    way: list[str], start: Start, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    url = f"link.store.url={tmp_path / 'store'}"
    with pytest.raises(PhotonError, match="tensors go through a store, but store-url is not set"):
        start({}, url, *way, "federation.silos=2")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_store_that_small_tensors_do_without_is_not_asked_for(start: Start, tmp_path: Path) -> None:
    start({}, f"link.store.url={tmp_path / 'store'}", "link.inline_limit_mb=4", "rounds=1")
    assert told(tmp_path / "run")[1:] == ({"alpha", "beta"}, 0)


@pytest.mark.parametrize(
    ("overrides", "own", "reason"),
    [
        (["training.batch_size=16384"], {}, "a micro-batch of 16,384 sequences"),
        (["strategy=topk"], {"processes": 2}, "training.processes: a sparse strategy trains in one process"),
    ],
)
def test_a_step_that_a_silo_cannot_take(
    overrides: list[str], own: dict[str, Any], reason: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A deployed aggregator does not look at the machines of its silos, which are small here.
    monkeypatch.setattr("photon.federation.run.check_steps", lambda *_: None)
    monkeypatch.setattr("photon.files.memory.memory_bytes", lambda: 2**26)
    with pytest.raises(PhotonError, match=reason):
        start({}, *overrides, "federation.silos=2", **own)


@pytest.mark.parametrize(
    "overrides",
    [
        DESLOC,
        (*DESLOC, "+transition.step=4", "+transition.local_steps=2"),
        ("strategy=local-adam",),
        ("strategy=streaming-diloco", "rounds=6"),
        ("strategy=photon", "rounds=6"),
    ],
)
def test_telling_rounds_see_all_that_ever_leaves(
    overrides: tuple[str, ...], small_config: Callable[..., RunConfig]
) -> None:
    config = small_config(*overrides, "rounds=20")
    strategy, shapes = strategy_of(config), param_shapes(config, 300)

    def leaving(rounds: Any) -> set[tuple[str, bool]]:
        contracts = [strategy.contract(server_round, shapes) for server_round in rounds]
        return {(group, one.bounded) for each in contracts for group, one in each.leaving.items()}

    telling = strategy.telling_rounds()
    assert leaving(telling) == leaving(range(1, 21))
    assert max(telling) <= config.rounds


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=desloc", "local_steps=8", "++strategy.sync={exp_avg: 8, exp_avg_sq: 8000000000000}"),
        ("strategy=sums", "objective._target_=tests.objective.toy.Sums"),
    ],
)
def test_an_aggregator_that_names_very_many_rounds_keeps_no_silo_busy(
    overrides: tuple[str, ...], small_config: Callable[..., RunConfig]
) -> None:
    strategy = strategy_of(small_config(*overrides, "rounds=1000000000000"))
    assert max(strategy.telling_rounds()) <= LOOKED_AHEAD
