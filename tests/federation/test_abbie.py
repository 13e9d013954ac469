"""A model that iterates is trained as any other: by every strategy, in every way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.federation.run import prepare_run
from photon.models.flops import model_flops_per_token
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from tests.conftest import SEQUENCE_LENGTH

Run = Callable[..., dict[str, Any]]

#: Three blocks, of which the middle one is the body.
PLAIN = ["model.architecture.n_layer=3", "rounds=2"]
PARTS = "head_blocks: 1, body_blocks: 1, tail_blocks: 1"
ABBIE = [*PLAIN, f"model.abbie={{{PARTS}}}"]
ONCE = [*PLAIN, f"model.abbie={{{PARTS}, train_iterations: 1}}"]
TREE = ["federation.tree={n: [alpha, beta], s: [gamma]}", "cohort=null"]
#: Strategy to what it wants besides.
RULES = {
    "centralized": [],
    "desloc": [],
    "diloco": [],
    "fedavg-reset": [],
    "fedper": [],
    "fedprox": [],
    "flash": [],
    "hierfavg": TREE,
    "local-adam": [],
    "lordo": [],
    "mtdao": [],
    "muloco": ["optimizer=muon"],
    "photon": [],
    "robust": [],
    "scaffold": ["optimizer=sgd"],
    "sparsyfed": [],
    "streaming-diloco": ["strategy.fragments=2"],
    "topk": [],
    "worldlm": TREE,
    "zerofl": [],
}
WAYS = {
    "accumulated": ["training.micro_batch_size=2"],
    "recomputed": ["training.activation_checkpointing=true"],
    "noised": ["privacy=gaussian", "privacy.seed=3", "privacy.noise_multiplier=0.0001"],
    "masked": ["privacy=secure", "link=dense", "link.uplink_payload=update", "strategy.weighting=uniform"],
    "eight bits": ["link=int8"],
}


def params(run_dir: Path) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run_dir / "checkpoints")
    return store.load(store.rounds()[-1]).load_params()


@pytest.mark.few(3)
@pytest.mark.parametrize("strategy", RULES)
def test_every_strategy_trains_it(strategy: str, run_small: Run) -> None:
    found = run_small(*ABBIE, f"strategy={strategy}", *RULES[strategy])["perplexity"]
    assert found["final"] < found["initial"]


@pytest.mark.few(2)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_trained_in_every_way(way: str, run_small: Run) -> None:
    found = run_small(*ABBIE, *WAYS[way])["perplexity"]
    assert found["final"] < found["initial"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    ["photon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diloco", "worldlm", "zerofl"))],
)
def test_with_one_iteration_a_run_is_that_of_the_plain_model(strategy: str, run_small: Run) -> None:
    rules = [f"strategy={strategy}", *RULES[strategy]]
    found = [run_small(*model, *rules, name=str(number)) for number, model in enumerate((PLAIN, ONCE, ABBIE))]
    hashes = [one["weights_sha256"] for one in found]
    assert hashes[0] == hashes[1] != hashes[2]


def test_iterations_cost_operations_and_no_bytes(
    run_small: Run, small_config: Callable[..., RunConfig]
) -> None:
    bytes_, operations = [], []
    for name, model in {"once": ONCE, "twice": ABBIE}.items():
        summary = run_small(*model, name=name)
        run_dir = Path(str(small_config(*model, name=name).run_dir))
        events = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
        started = next(event for event in events if event["event"] == "run_started")
        assert started["flops_per_token"] == model_flops_per_token(
            open_trained(run_dir).model, SEQUENCE_LENGTH
        )
        bytes_.append(summary["bytes"]["per_group"])
        operations.append(started["flops_per_token"])
    assert bytes_[0] == bytes_[1]
    assert operations[0] < operations[1]


def test_the_body_alone_can_be_sparse(run_small: Run, small_config: Callable[..., RunConfig]) -> None:
    rules = [*ABBIE, "strategy=sparsyfed", "strategy.sparsity=0.8"]
    rules.append(r"strategy.layers=['\.h\.1\.(attn|mlp)']")
    found = run_small(*rules)["perplexity"]
    assert found["final"] < found["initial"]
    run_dir = Path(str(small_config(*rules).run_dir))
    shares = {
        name: float((tensor != 0).float().mean())
        for name, tensor in params(run_dir).items()
        if tensor.dim() == 2
    }
    body = [share for name, share in shares.items() if ".h.1." in name]
    others = [share for name, share in shares.items() if ".h.1." not in name]
    assert len(body) == 4
    assert max(body) < 0.5
    assert min(others) > 0.99


def test_a_run_goes_on_with_the_same_iterations_alone(small_config: Callable[..., RunConfig]) -> None:
    run_inprocess(prepare_run(small_config(*ABBIE)), answer, resume=False)
    with pytest.raises(PhotonError, match=r"abbie.train_iterations: 2 → 1"):
        run_inprocess(prepare_run(small_config(*ONCE, "rounds=3")), answer, resume=True)
