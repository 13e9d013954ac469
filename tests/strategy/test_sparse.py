"""Sparse strategies: whole small runs, and the toy of the specification."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from photon.config.compose import compose
from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.evaluation.load import open_trained
from photon.federation.run import prepare_run
from photon.models.build import build_model
from photon.models.sparse import SparseTraining, density, kept, masks_of, prunable_names, prune
from photon.node import answer
from photon.objective.perplexity import evaluate_windows
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import Diagnostics
from photon.telemetry.log import read_events
from photon.training.groups import read_params, write_params

SPARSITY = 0.9


@pytest.fixture
def trained(small_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., Path]:
    numbers = itertools.count()

    def train(*overrides: str, resume: Path | None = None) -> Path:
        run_dir = resume or tmp_path / f"run-{next(numbers)}"
        more = ("cohort=2", "rounds=4", "checkpoint.keep=9", "optimizer.lr=3e-3", *overrides)
        config = small_config(*more, name=run_dir.name)
        run_inprocess(prepare_run(config), answer, resume=resume is not None)
        return run_dir

    return train


def params_of(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    store = CheckpointStore(run_dir / "checkpoints", 9)
    return [store.load(number).load_params() for number in store.rounds()]


def summary(run_dir: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return result


@pytest.fixture
def names(small_config: Callable[..., RunConfig]) -> list[str]:
    return prunable_names(build_model(small_config().model, 300, seed=0, device="meta"), ())


def figures(run_dir: Path, name: str) -> list[float]:
    events = read_events(run_dir / "events.jsonl")
    return [e.values[name] for e in events if isinstance(e, Diagnostics) and name in e.values]


def test_nothing_pruned_and_nothing_mapped_is_fedavg(trained: Callable[..., Path]) -> None:
    reference = summary(trained("strategy=photon"))["weights_sha256"]
    assert summary(trained("strategy=topk", "strategy.sparsity=0"))["weights_sha256"] == reference
    plain = ("strategy=sparsyfed", "optimizer=adamw", "strategy.beta=1", "strategy.activation_pruning=false")
    assert summary(trained(*plain, "strategy.sparsity=0"))["weights_sha256"] == reference
    assert (
        summary(trained(*plain, "strategy.sparsity=0.9"))["weights_sha256"]
        == summary(trained("strategy=topk", "strategy.sparsity=0.9"))["weights_sha256"]
        != reference
    )


def test_sparsyfed_brings_the_rate_that_it_needs() -> None:
    """Whoever chooses an optimizer or a rate has that."""

    def rate(*overrides: str) -> float:
        return float(compose(["strategy=sparsyfed", *overrides]).optimizer.as_mapping()["lr"])

    recipe = compose().model.recipe.learning_rate
    assert rate() == pytest.approx(4 * recipe)
    assert rate("optimizer=adamw") == recipe
    assert rate("optimizer.lr=0.1") == 0.1


@pytest.mark.few(1)
@pytest.mark.parametrize(("outer", "local_state"), [("fedavg", "keep"), ("diloco", "reset")])
def test_the_support_of_sparsyfed_only_shrinks(
    outer: str, local_state: str, trained: Callable[..., Path], names: list[str]
) -> None:
    run_dir = trained(
        "strategy=sparsyfed",
        *(f"strategy.sparsity={SPARSITY}", f"outer={outer}", f"strategy.local_state={local_state}"),
    )
    rounds = params_of(run_dir)
    total = sum(rounds[0][name].numel() for name in names)
    assert density(rounds[0], names) == 1
    for before, after in itertools.pairwise(rounds[1:]):
        assert all(not (after[name] != 0)[before[name] == 0].any() for name in names)
    for params in rounds[1:]:
        assert kept(total, SPARSITY) <= density(params, names) * total <= 2 * kept(total, SPARSITY)
    assert figures(run_dir, "regrown/mean") == [0] * 4
    assert figures(run_dir, "density/all") == [density(params, names) for params in rounds[1:]]
    assert summary(run_dir)["density"] == density(rounds[-1], names)
    assert all(0 < iou <= 1 for iou in figures(run_dir, "mask_iou/all"))


def test_without_the_map_weights_grow_again(trained: Callable[..., Path]) -> None:
    for strategy in ("topk", "zerofl"):
        run_dir = trained(f"strategy={strategy}", "strategy.sparsity=0.5", "optimizer.lr=3e-2")
        assert sum(figures(run_dir, "regrown/mean")[1:]) > 0


def test_flash_keeps_the_mask_of_the_first_round(trained: Callable[..., Path], names: list[str]) -> None:
    rounds = params_of(trained("strategy=flash", f"strategy.sparsity={SPARSITY}"))
    total = sum(rounds[0][name].numel() for name in names)
    first = {name: rounds[1][name] != 0 for name in names}
    for params in rounds[1:]:
        assert all(torch.equal(params[name] != 0, first[name]) for name in names)
    # A rounding for each layer.
    assert abs(density(rounds[1], names) * total - kept(total, SPARSITY)) <= len(names)


def test_what_crosses_the_link_is_a_bit_a_weight_and_the_values(
    trained: Callable[..., Path], names: list[str]
) -> None:
    settings = ("strategy=sparsyfed", f"strategy.sparsity={SPARSITY}", "rounds=2")
    run_dir = trained(*settings, "link.uplink=[{_target_: photon.link.codecs.Bitmask}]")
    params = params_of(run_dir)[0]
    prunable = sum(params[name].numel() for name in names)
    others = sum(tensor.numel() for name, tensor in params.items() if name not in names)
    whole = 4 * (prunable + others) + (prunable + others) / 8
    sent = summary(run_dir)["bytes"]["per_group"]["params"]["up"] / 4  # two silos, two rounds
    spared = 4 * (prunable - kept(prunable, SPARSITY))
    assert sent == pytest.approx(whole - spared, rel=0.01)
    # The preset compresses the bits.
    assert summary(trained(*settings))["bytes"]["per_group"]["params"]["up"] / 4 < sent


def test_a_resumed_run_is_the_same_run(trained: Callable[..., Path]) -> None:
    settings = ("strategy=sparsyfed", f"strategy.sparsity={SPARSITY}", "strategy.ramp_rounds=3")
    whole = summary(trained(*settings))["weights_sha256"]
    # The schedule knows the length of the run, so the first part has it too.
    part = trained(*settings)
    for left in ("round-000003", "round-000004"):
        for path in (part / "checkpoints").glob(f"{left}*"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    trained(*settings, resume=part)
    assert summary(part)["weights_sha256"] == whole


def test_the_ramp_prunes_less_at_first(trained: Callable[..., Path]) -> None:
    densities = figures(
        trained("strategy=sparsyfed", f"strategy.sparsity={SPARSITY}", "strategy.ramp_rounds=3"),
        "density/all",
    )
    assert densities[0] > 1 - SPARSITY * (1 - (2 / 3) ** 3) > densities[2]


def test_an_opened_checkpoint_is_the_effective_dense_model(
    trained: Callable[..., Path], small_config: Callable[..., RunConfig], corpus: Path, names: list[str]
) -> None:
    from photon.data.prepared import PreparedData

    run_dir = trained("strategy=sparsyfed", f"strategy.sparsity={SPARSITY}", "evaluation.sequences=1000")
    opened, data = open_trained(run_dir), PreparedData.open(corpus)
    silo = data.silo_names[0]
    nll, tokens = evaluate_windows(
        opened.model,
        data.windows(silo, "validation"),
        batch_size=8,
        device=torch.device("cpu"),
        precision="fp32",
        limit=None,
    )
    told = summary(run_dir)["perplexity"]["per_silo"][silo]["final"]
    assert torch.tensor(nll / tokens).exp() == pytest.approx(told, rel=1e-5)
    params = read_params(opened.model)
    stored = params_of(run_dir)[-1]
    assert density(params, names) == density(stored, names)
    assert not torch.allclose(params[names[0]], stored[names[0]])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("link=int8", "uplink_payload=update"),
        ("strategy.local_state=sync", "local_state=sync"),
        ("strategy.sparsity=1", "expected at least 0 and below 1"),
        ("strategy.layers=[nowhere]", "'nowhere' fits no weight"),
        ("strategy.bata=2", "did you mean 'strategy.beta'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    override: str, message: str, trained: Callable[..., Path]
) -> None:
    with pytest.raises(PhotonError, match=message):
        trained("strategy=sparsyfed", override)


# --- the toy ------------------------------------------------------------------------------------------


def toy(beta: float, optimizer: str, rounds: int = 15) -> tuple[int, list[float], bool]:
    """Return regrown weights, the density after each round and whether the support only shrank.

    A two-layer network (32-64-8) learns a teacher's labels; 20 silos with shifted inputs, 5 a round.
    """
    torch.manual_seed(0)
    sparse = SparseTraining(0.9, beta=beta)

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    teacher, model = network(), network()
    names = prunable_names(model, ())
    sparse.attach(model)  # type: ignore[arg-type]
    silos = []
    for _ in range(20):
        x = torch.randn(200, 32) + torch.randn(32)
        with torch.no_grad():
            silos.append((x, teacher(x).argmax(1)))
    params = {name: tensor.clone() for name, tensor in read_params(model).items()}
    regrown, densities, monotone = 0, [], True
    for number in range(rounds):
        replies = []
        for silo in torch.randperm(20)[:5].tolist():
            write_params(model, params)
            if optimizer == "sgd":
                local: Any = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1e-3)
            else:
                local = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=1e-2)
            x, labels = silos[silo]
            for _ in range(3):
                for batch in torch.randperm(200).split(20):
                    nn.functional.cross_entropy(model(x[batch]), labels[batch]).backward()
                    local.step()
                    local.zero_grad()
            reply = {name: tensor.clone() for name, tensor in read_params(model).items()}
            reply = prune({"params": reply}, masks_of(reply, names, 0.9, "global"))["params"]
            regrown += sum(int(((params[n] == 0) & (reply[n] != 0)).sum()) for n in names)
            replies.append(reply)
        mean = {name: torch.stack([reply[name] for reply in replies]).mean(0) for name in params}
        if number:
            monotone &= all(not ((params[n] == 0) & (mean[n] != 0)).any() for n in names)
        params = mean
        densities.append(density(params, names))
    return regrown, densities, monotone


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_toy_nothing_grows_again_under_the_map(optimizer: str) -> None:
    regrown, densities, monotone = toy(1.25, optimizer)
    assert regrown == 0
    assert monotone
    assert densities[-1] < densities[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_toy_weights_grow_again_without_it(optimizer: str) -> None:
    regrown, _, monotone = toy(1.0, optimizer)
    assert regrown > 1000
    assert not monotone
