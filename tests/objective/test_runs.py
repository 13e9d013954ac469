"""Whole runs with other losses than that of a dense causal language model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run
from photon.models.build import build_model
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.training.devices import stop_group
from tests.conftest import SMALL, composed

MIXTRAL = [
    *(override for override in SMALL if "architecture" not in override),
    "model=custom",
    "model.architecture={model_type: mixtral, num_hidden_layers: 1, hidden_size: 16, intermediate_size: 16, "
    "num_attention_heads: 2, num_key_value_heads: 1, num_local_experts: 4, num_experts_per_tok: 2, "
    "router_aux_loss_coef: 5.0}",
    "telemetry.diagnostics=true",
    "rounds=2",
]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_mixture_of_experts_reports_its_cross_entropy_and_the_routers_loss(
    corpus: Path, tmp_path: Path, processes: int
) -> None:
    own = [f"data.path={corpus}", f"run_dir={tmp_path / 'run'}", f"training.processes={processes}"]
    run_inprocess(prepare_run(composed(*MIXTRAL, *own)), answer, resume=False)
    stop_group()
    losses = [event["loss"] for event in events(tmp_path, "silo_finished")]
    auxiliary = [
        value
        for event in events(tmp_path, "diagnostics")
        for name, value in event["values"].items()
        if name.startswith("auxiliary_loss/")
    ]
    assert len(losses) == len(auxiliary) == 6
    # Two experts of four for each token: 2 if all are chosen alike, 4 at most. Five times that is in no loss.
    assert all(1.9 < value <= 4 for value in auxiliary)
    assert all(loss < 7 for loss in losses)


def test_silos_train_and_are_evaluated_by_the_objective_of_the_configuration(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("objective._target_=tests.objective.toy.Masked", "+objective.below=280", "rounds=1", "cohort=1")
    evaluated = events(tmp_path, "evaluated")[-1]
    counts = [one["tokens"] for one in evaluated["per_silo"].values()]
    assert all(0 < count < 8 * 16 for count in counts), "some targets of 8 windows of 17 tokens"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "way",
    [["strategy=desloc", "rounds=3"], ["strategy=worldlm", "outer=diloco"], ["strategy=sparsyfed"]],
    ids=lambda way: way[0],
)
def test_what_an_objective_freezes_comes_out_as_it_went_in(
    way: list[str], run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("objective._target_=tests.objective.toy.Frozen", "optimizer.weight_decay=0.5", *way)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    fresh = build_model(composed(*SMALL, "data.path=none").model, store.latest()[0].state.vocab_size, seed=0)
    after, name = store.latest()[0].load_params(), "transformer.wpe.weight"
    assert torch.equal(after[name], fresh.transformer.wpe.weight)
    assert not torch.equal(after["transformer.wte.weight"], fresh.transformer.wte.weight)


def test_running_statistics_are_refused_before_the_first_round(
    run_small: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(PhotonError, match=r"transformer\.norm keeps running statistics"):
        run_small("objective._target_=tests.objective.toy.Normed")
