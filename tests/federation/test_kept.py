"""What no step moves, frozen parameters and buffers, comes out of a run as it went in.

And what gets no gradient, as these models have it too, hinders none of the ways to train.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.engine.inprocess import run_inprocess
from photon.evaluation.load import open_trained
from photon.evaluation.perplexity import evaluate_data, overall
from photon.federation.run import prepare_run
from photon.models.pretrained import load_pretrained, quiet_transformers
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.training.devices import stop_group
from photon.training.groups import kept_names, read_params, write_params
from tests.models.causal_types import save

#: bart: cross-attention gets no gradient; marian: its positions are frozen, too; hy_v4: a buffer biases the
#: router, and a part of attention gets no gradient; deepseek_v4: a buffer of integers.
TYPES = ["marian", "hy_v4", "deepseek_v4"]

WAYS = [
    ["strategy=photon", "outer=diloco"],
    ["strategy=photon", "outer=fedadam", "+outer.weight_decay=0.1"],
    ["strategy=local-adam"],
    ["strategy=desloc", "rounds=6"],
    ["strategy=streaming-diloco", "strategy.fragments=2"],
    ["strategy=scaffold"],
    ["strategy=fedprox"],
    ["strategy=worldlm"],
    ["strategy=fedper"],
    ["strategy=worldlm", "cohort=null", "federation.tree={north: [alpha, beta], south: [gamma]}"],
    ["strategy=photon", "outer=diloco", "cohort=null", "federation.tree={n: [alpha, beta], s: [gamma]}"],
    ["strategy=hierfavg", "cohort=null", "federation.tree={n: [alpha, beta], s: [gamma]}"],
    ["strategy=sparsyfed"],
    ["strategy=zerofl"],
    ["strategy=flash"],
    ["strategy=topk"],
    ["strategy=lordo", "optimizer.rank=4"],
    ["strategy=mtdao"],
    ["strategy=robust"],
    ["strategy=photon", "optimizer=muon"],
    ["strategy=photon", "optimizer=refreshed-adamw"],
    ["strategy=photon", "optimizer=sgd"],
    ["strategy=photon", "link=int8"],
    ["strategy=photon", "link=sparseloco"],
    ["strategy=photon", "link=powersgd"],
    ["strategy=photon", "link=bf16", "link.uplink_payload=update", "link.downlink_payload=update"],
    ["strategy=photon", "link.downlink=[{_target_: photon.link.codecs.Int, bits: 4, block: 64}]"],
    ["strategy=photon", "privacy=gaussian", "privacy.seed=0"],
    ["strategy=photon", "privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose buffers and frozen parameters are not those of a fresh one."""
    made = {}
    for model_type in TYPES:
        made[model_type] = tmp_path_factory.mktemp(model_type)
        with quiet_transformers():
            save(model_type, made[model_type], vocab_size=320)
    return made


def of_round(run_dir: Path, server_round: int) -> dict[str, Tensor]:
    return CheckpointStore(run_dir / "checkpoints").load(server_round).load_params()


def train(config: RunConfig, warm: Path) -> dict[str, Any]:
    """Train from a folder, whatever its architecture is."""
    model = config.model.model_copy(update={"architecture": None, "warm_start": str(warm)})
    return run_inprocess(prepare_run(config.model_copy(update={"model": model})), answer, resume=False)


@pytest.mark.few(3)
# Each of the models has met each of the ways; one of them, and half of the ways, do for every day.
@pytest.mark.parametrize(
    ("way", "model_type"),
    [
        pytest.param(
            way,
            TYPES[index % 3],
            id=f"{' '.join(way).replace('strategy=photon ', '')[:60]}",
            marks=[pytest.mark.slow] if index % 2 else [],
        )
        for index, way in enumerate(WAYS)
    ],
)
def test_it_comes_out_as_it_went_in(
    way: list[str],
    model_type: str,
    folders: dict[str, Path],
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
) -> None:
    warm = folders[model_type]
    started = load_pretrained(warm)
    kept, before = kept_names(started), read_params(started)
    assert kept
    decay = [] if "optimizer=sgd" in way else ["optimizer.weight_decay=0.1"]
    train(small_config("local_steps=2", *decay, *way), warm)
    rounds = CheckpointStore(tmp_path / "run" / "checkpoints").rounds()
    after = of_round(tmp_path / "run", rounds[-1])
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    moved = [name for name in before if name not in kept and not torch.equal(after[name], before[name])]
    assert len(moved) > len(before) / 3


def test_the_silos_evaluate_the_model_of_the_folder(
    folders: dict[str, Path], small_config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    warm = folders["hy_v4"]
    data = PreparedData.open(corpus)
    overrides = [
        "rounds=1",
        "local_steps=1",
        "model.recipe.warmup_steps=0",
        "optimizer.lr=1e-12",
        "evaluation.sequences=null",
    ]
    summary = train(small_config(*overrides, "telemetry.export=true"), warm)

    def perplexity(folder: Path, *, fresh: bool = False) -> float:
        model = load_pretrained(folder)
        for name, buffer in model.named_buffers():
            if fresh and name.endswith("e_score_correction_bias"):
                buffer.zero_()
        evaluated = evaluate_data(model, data, batch_size=32, device="cpu", precision="fp32")
        return overall(evaluated).perplexity

    expected = perplexity(warm)
    assert summary["perplexity"]["initial"] == pytest.approx(expected, rel=1e-5)
    assert perplexity(tmp_path / "run" / "export") == pytest.approx(expected, rel=1e-5)
    assert perplexity(warm, fresh=True) != pytest.approx(expected, rel=1e-5)
    opened = read_params(open_trained(tmp_path / "run").model)
    before = read_params(load_pretrained(warm))
    assert all(torch.equal(opened[name], before[name]) for name in kept_names(load_pretrained(warm)))


@pytest.mark.few(1)
@pytest.mark.parametrize("payload", ["parameters", "update"])
def test_silos_have_it_to_the_bit_over_a_link_that_loses(
    payload: str,
    folders: dict[str, Path],
    small_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Tensor]] = []

    def spying(model: nn.Module, params: Mapping[str, Tensor]) -> None:
        seen.append({name: tensor.clone() for name, tensor in params.items()})
        write_params(model, params)

    for module in ("fit", "evaluate"):
        monkeypatch.setattr(f"photon.silo.{module}.write_params", spying)
    config = small_config(
        "rounds=2",
        "checkpoint.keep=5",
        "local_steps=1",
        "link.uplink_payload=update",
        f"link.downlink_payload={payload}",
        "link.downlink=[{_target_: photon.link.codecs.Int, bits: 4, block: 64}]",
    )
    warm = folders["deepseek_v4"]
    train(config, warm)
    started = load_pretrained(warm)
    before = read_params(started)
    assert len(seen) >= 12
    assert all(torch.equal(one[name], before[name]) for one in seen for name in kept_names(started))
    first = next(name for name in before if name not in kept_names(started))
    exact = [of_round(Path(config.run_dir or ""), number)[first] for number in range(3)]
    assert any(not any(torch.equal(one[first], tensor) for tensor in exact) for one in seen), (
        "nothing is lost"
    )


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_devices_train_it_as_one_does(
    parallel: str, folders: dict[str, Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    warm = folders["hy_v4"]
    before, kept = read_params(load_pretrained(warm)), kept_names(load_pretrained(warm))
    chosen = ("strategy=local-adam", "rounds=2", "cohort=1", "optimizer.weight_decay=0.1")
    train(small_config(*chosen, name="one"), warm)
    two = ("training.processes=2", f"training.parallel={parallel}")
    train(small_config(*chosen, *two, name="two"), warm)
    stop_group()
    one, other = (of_round(tmp_path / name, 2) for name in ("one", "two"))
    assert all(torch.equal(other[name], before[name]) for name in kept)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=2e-5)
