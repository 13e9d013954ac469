"""A federation that trains on text of its own, under the strategies and links that there are."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.errors import PhotonError
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import SiloFailed
from photon.telemetry.log import read_events
from tests.conftest import SMALL, composed

Run = Callable[..., dict[str, Any]]
OWN = ["federation.server_silo=alpha", "cohort=null", "rounds=4", "model.architecture.n_layer=2"]
MASKED = ["privacy=secure", "link.uplink_payload=update"]


def failed(run_dir: Path) -> list[str]:
    return [one.reason for one in read_events(run_dir / "events.jsonl") if isinstance(one, SiloFailed)]


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_key_layers_that_nobody_sends_are_trained_on_its_own_text(
    schedule: str, run_small: Run, tmp_path: Path
) -> None:
    """Its silo has no key layers but the federation's, which it gets in every round, and gives back."""
    run_small("strategy=fedper", f"strategy.schedule={schedule}", "checkpoint.keep=9", *OWN)
    assert failed(tmp_path / "run") == []
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    key = "transformer.h.1.mlp.c_fc.weight"
    rounds = [store.load(number).load_params()[key] for number in range(5)]
    assert not any(torch.equal(one, other) for one, other in pairwise(rounds))


def test_it_is_sent_parameters_where_the_others_are_sent_their_change(run_small: Run, tmp_path: Path) -> None:
    """It trains from other parameters than they do, so it has none that their change could be added to."""
    changes = ["link.uplink_payload=update", "link.downlink_payload=update"]
    summary = run_small(*OWN, *changes)
    assert failed(tmp_path / "run") == []
    plain = run_small(*OWN, "link.uplink_payload=update", name="plain")
    assert summary["perplexity"]["final"] == pytest.approx(plain["perplexity"]["final"], rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["strategy=streaming-diloco"], "federation.server_silo=alpha: silos are sent the fragments"),
        (["strategy=scaffold"], "federation.server_silo=alpha: control variates"),
        (["strategy=centralized"], "federation.server_silo=alpha: its text is among that of all silos"),
        (
            ["strategy.weighting=uniform", *MASKED],
            "federation.server_silo=alpha: privacy.secure_aggregation: ",
        ),
        (["strategy=worldlm", "privacy.allow_unmasked=true", *MASKED], "set strategy.schedule=parallel"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(PhotonError) as refused:
        composed(*SMALL, "data.path=elsewhere", *OWN, *overrides)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_within_a_tree_it_is_refused_alike() -> None:
    tree = "federation.tree={n: {children: [alpha, beta], data: gamma}, delta: null}"
    with pytest.raises(
        PhotonError, match=r"federation.tree: n: federation.server_silo=gamma: privacy\.secure"
    ):
        composed(*SMALL, "data.path=elsewhere", "strategy.weighting=uniform", "cohort=null", tree, *MASKED)
    own = "{n: {children: [alpha], data: beta}, s: {children: [gamma], outer: diloco}}"
    composed(*SMALL, "data.path=elsewhere", "cohort=null", f"federation.tree={own}")


def test_beside_the_others_its_update_may_be_masked() -> None:
    both = ["strategy=worldlm", "strategy.schedule=parallel", "privacy.allow_unmasked=true"]
    composed(*SMALL, "data.path=elsewhere", *OWN, *both, *MASKED)
