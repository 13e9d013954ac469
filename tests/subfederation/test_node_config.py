"""What the operator of a node has set holds for the silos of a federation that the node answers for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid
from photon.errors import RunError
from photon.federation.run import prepare_run, run_federation
from photon.node import answer
from photon.telemetry.events import SiloFailed, SiloFinished
from tests.federation.test_federation import events_of

TREE = ("federation.tree={north: [alpha, beta], south: [gamma]}", "strategy=hierfavg", "local_steps=2")


@pytest.fixture
def train_at(
    small_config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Train the tree at one node that has an operator, whose policy has these rules."""

    def train(**rules: Any) -> dict[str, Any]:
        policy = tmp_path / "policy.yaml"
        policy.write_text(json.dumps(rules))
        state = {
            "data-dir": str(corpus),
            "state-dir": str(tmp_path / "state"),
            "policy": str(policy),
            "branches": True,
        }
        config = prepare_run(small_config("cohort=null", "rounds=1", *TREE))
        return run_federation(config, InProcessGrid(answer, {1: state}), resume=False, live=False)

    return train


def test_silos_of_a_federation_within_refuse_what_the_policy_forbids(
    train_at: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"refused by alpha's policy: max_local_steps=1"):
        train_at(max_local_steps=1)
    failed = events_of(tmp_path / "run", SiloFailed)
    assert {(event.silo, event.kind) for event in failed} == {("north", "refused"), ("south", "refused")}
    assert not list((tmp_path / "state").rglob("round-*")), "nothing was trained"


def test_their_state_lies_with_the_federation_that_they_are_of(
    train_at: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert train_at(max_local_steps=2)["status"] == "finished"
    inner = events_of(tmp_path / "state" / "north", SiloFinished)
    assert [event.silo for event in inner] == ["alpha", "beta"]
    kept = {path.parent.name for path in (tmp_path / "state" / "north" / "silos").glob("*/round-*")}
    assert kept == {"alpha", "beta"}


def test_their_updates_are_bounded_as_the_operator_wants(
    train_at: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train_at(privacy={"clip_norm": 0.01})
    inner = events_of(tmp_path / "state" / "north", SiloFinished)
    assert [event.privacy["clip_norm"] for event in inner if event.privacy] == [0.01, 0.01]
    assert all(event.update_norm <= 0.01 * 1.001 for event in inner)
