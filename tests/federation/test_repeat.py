"""The same command gives the same weights: what is chosen is chosen once, and what is drawn has a seed."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from photon.config.compose import load
from photon.config.decided import Decided
from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.federation import federation
from photon.federation.run import prepare_run
from photon.node import answer
from photon.silo import choice, runtime
from photon.state.checkpoint import CheckpointStore, ServerState
from photon.training.devices import stop_group

#: Every kind of dropout that the small model has.
DROPOUT = [f"model.architecture.{name}=0.2" for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")]
AUTO = ["training.precision=auto", "training.threads=null", "training.device=auto"]
RUN = ["cohort=2", "rounds=3", "outer=diloco"]

Run = Callable[..., dict[str, Any]]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def disturb(number: int = 99) -> None:
    """Leave the process's random sources, and what it has built, as another run may have left them."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    runtime._runtime.cache_clear()


def killed_in(config: RunConfig, server_round: int) -> None:
    """Train a run until the checkpoint of a round is about to be written."""
    writing = CheckpointStore.writing

    def dying(store: Any, state: ServerState, *rest: Any, **more: Any) -> Any:
        if state.round == server_round:
            raise Killed
        return writing(store, state, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(Killed):
            run_inprocess(prepare_run(config), answer, resume=False)


# --- draws ------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=photon"],
        ["strategy=desloc", "strategy.sync={exp_avg: 8, exp_avg_sq: 8}"],
        pytest.param(["strategy=photon", "optimizer=muon", "link=int4"], marks=pytest.mark.slow),
        ["strategy=lordo"],
        pytest.param(["strategy=streaming-diloco", "model.architecture.n_layer=2"], marks=pytest.mark.slow),
        ["strategy=sparsyfed", "outer=fedavg"],
        ["strategy=worldlm", "cohort=null", "federation.tree={n: [alpha, beta], s: [gamma]}"],
        pytest.param(["strategy=centralized", "training.micro_batch_size=2"], marks=pytest.mark.slow),
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_model_with_dropout_repeats_and_resumes(
    overrides: list[str], small_config: Callable[..., RunConfig], run_small: Run
) -> None:
    disturb(1)
    whole = run_small(*RUN, *DROPOUT, *overrides, name="whole")
    disturb(2)
    again = run_small(*RUN, *DROPOUT, *overrides, name="again")
    assert again["weights_sha256"] == whole["weights_sha256"]
    killed_in(small_config(*RUN, *DROPOUT, *overrides, name="cut"), 2)
    disturb(3)
    resumed = run_small(*RUN, *DROPOUT, *overrides, name="cut", resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    other = run_small(*RUN, *DROPOUT, *overrides, "model.architecture.resid_pdrop=0.3", name="other")
    assert other["weights_sha256"] != whole["weights_sha256"], "the model has no dropout"


def test_silos_and_rounds_draw_what_others_do_not(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float, float]] = []
    train = runtime.LocalTrainer.train

    def drawing(self: Any, *rest: Any, **more: Any) -> Any:
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))
        return train(self, *rest, **more)

    monkeypatch.setattr(runtime.LocalTrainer, "train", drawing)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run_small("cohort=null", "rounds=2")
    assert len(drawn) == len(set(drawn)) == 6
    assert torch.equal(torch.get_rng_state(), state), (
        "what else draws in the process goes on as if there were no run"
    )
    first, drawn[:] = list(drawn), []
    disturb(3)
    run_small("cohort=null", "rounds=2", name="again")
    assert drawn == first


@pytest.mark.slow
def test_dropout_repeats_in_a_group_of_processes(run_small: Run) -> None:
    overrides = [*RUN, *DROPOUT, "training.processes=2"]
    first = run_small(*overrides, name="first")
    stop_group()
    again = run_small(*overrides, name="again")
    stop_group()
    assert again["weights_sha256"] == first["weights_sha256"]


# --- choices ----------------------------------------------------------------------------------------------


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[float], None]]:
    """Let the probe find what a test says, in a home of the test's own."""
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    found, products = [2.0], [1.0]
    monkeypatch.setattr(
        choice,
        "_measured",
        lambda *rest: {choice.BF16: found[0], choice.BF16_PRODUCTS: found[0] * products[0]},
    )

    def says(speedup: float, of_products: float = 1.0) -> None:
        """Find this from now on, in a new process: of bf16, and of products in it."""
        found[0], products[0] = speedup, of_products
        choice._decided.cache_clear()
        disturb()

    says(2.0)
    yield says
    choice._decided.cache_clear()


def training_of(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run_dir / "config.yaml").read_text())["training"]
    return found


def test_two_equal_commands_choose_alike(
    run_small: Run, stopwatch: Callable[[float], None], tmp_path: Path
) -> None:
    first = run_small(*RUN, *AUTO, name="first")
    stopwatch(0.5)
    again = run_small(*RUN, *AUTO, name="again")
    assert again["weights_sha256"] == first["weights_sha256"]
    assert training_of(tmp_path / "first")["precision"] == "bf16"
    said = (tmp_path / "first" / "events.jsonl").read_text()
    assert "in bf16 a step of this model is 2.00 times as fast" in said
    assert "by products" not in said


def test_attention_is_chosen_once_and_holds_for_the_run(
    run_small: Run,
    small_config: Callable[..., RunConfig],
    stopwatch: Callable[..., None],
    tmp_path: Path,
) -> None:
    stopwatch(2.0, 1.04)
    by_torch = run_small(*RUN, *AUTO, name="torch")
    assert training_of(tmp_path / "torch")["attention"] == "sdpa"
    stopwatch(1.1, 1.2)
    shutil.rmtree(tmp_path / "home")
    whole = run_small(*RUN, *AUTO, name="whole")
    assert whole["weights_sha256"] != by_torch["weights_sha256"]
    assert "attention by products" in (tmp_path / "whole" / "events.jsonl").read_text()
    killed_in(small_config(*RUN, *AUTO, name="cut"), 2)
    chosen = training_of(tmp_path / "cut")
    assert (chosen["precision"], chosen["attention"]) == ("bf16", "products")
    kept = CheckpointStore(tmp_path / "cut" / "checkpoints").load(1).state.decided
    assert {one.attention for one in kept.values()} == {"products"}
    stopwatch(2.0, 0.5)
    shutil.rmtree(tmp_path / "home")
    resumed = run_inprocess(prepare_run(load(tmp_path / "cut" / "config.yaml")), answer, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]


def test_attention_in_fp32_is_torchs_whatever_is_found(
    run_small: Run, stopwatch: Callable[..., None], tmp_path: Path
) -> None:
    stopwatch(2.0, 3.0)
    one = run_small("rounds=1", name="one")
    assert training_of(tmp_path / "one")["attention"] == "sdpa"
    other = run_small("rounds=1", "training.attention=sdpa", name="other")
    assert one["weights_sha256"] == other["weights_sha256"]
    asked = run_small("rounds=1", "training.attention=products", name="asked")
    assert training_of(tmp_path / "asked")["attention"] == "products"
    assert asked["perplexity"]["final"] == pytest.approx(one["perplexity"]["final"], rel=1e-4)


def test_what_was_chosen_holds_for_the_run_and_for_its_repetition(
    run_small: Run,
    small_config: Callable[..., RunConfig],
    stopwatch: Callable[[float], None],
    tmp_path: Path,
) -> None:
    whole = run_small(*RUN, *AUTO, name="whole")
    killed_in(small_config(*RUN, *AUTO, name="cut"), 2)
    chosen = training_of(tmp_path / "cut")
    assert (chosen["precision"], chosen["device"]) == ("bf16", "cpu")
    assert chosen["threads"] >= 1
    kept = CheckpointStore(tmp_path / "cut" / "checkpoints").load(1).state.decided
    assert set(kept) == {"alpha", "beta", "gamma"}
    assert {one.precision for one in kept.values()} == {"bf16"}
    # A machine without memory of what it measured, which now measures something else.
    shutil.rmtree(tmp_path / "home")
    stopwatch(0.5)
    resumed = run_inprocess(prepare_run(load(tmp_path / "cut" / "config.yaml")), answer, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    redone = load(tmp_path / "whole" / "config.yaml").model_copy(update={"run_dir": str(tmp_path / "redone")})
    assert (
        run_inprocess(prepare_run(redone), answer, resume=False)["weights_sha256"] == whole["weights_sha256"]
    )


TREE = ["strategy=hierfavg", "federation.tree={n: [alpha, beta], s: [gamma]}"]


@pytest.mark.few(1)
@pytest.mark.parametrize("overrides", [[], TREE, ["strategy=centralized"]], ids=["silos", "tree", "pooled"])
def test_a_silo_is_told_what_it_chose_before(
    overrides: list[str],
    small_config: Callable[..., RunConfig],
    run_small: Run,
    stopwatch: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In a deployed run the configuration leaves the choice open for ever."""
    monkeypatch.setattr(federation, "settled", lambda config, *rest: config)
    overrides = ["rounds=3", "cohort=null", *overrides, *AUTO]
    whole = run_small(*overrides, name="whole")
    killed_in(small_config(*overrides, name="cut"), 2)
    assert training_of(tmp_path / "cut")["precision"] == "auto"
    shutil.rmtree(tmp_path / "home")
    stopwatch(0.5)
    resumed = run_small(*overrides, name="cut", resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["perplexity"] == whole["perplexity"]
    shutil.rmtree(tmp_path / "home")
    assert run_small(*overrides, name="other")["weights_sha256"] != whole["weights_sha256"]


def test_the_size_of_micro_batches_is_probed_once(
    small_config: Callable[..., RunConfig],
    run_small: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of another size dropout would draw other masks."""
    overrides = [*RUN, *DROPOUT, "training.micro_batch_size=auto"]
    monkeypatch.setattr(runtime, "find_micro_batch_size", lambda step, batch: 2)
    whole = run_small(*overrides, name="whole")
    killed_in(small_config(*overrides, name="cut"), 3)
    assert training_of(tmp_path / "cut")["micro_batch_size"] == 2
    state = CheckpointStore(tmp_path / "cut" / "checkpoints").load(1).state
    assert {one.micro_batch_size for one in state.decided.values()} == {2, None}, "one silo was not drawn"
    monkeypatch.setattr(runtime, "find_micro_batch_size", lambda step, batch: 4)
    disturb()
    resumed = run_inprocess(prepare_run(load(tmp_path / "cut" / "config.yaml")), answer, resume=True)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert run_small(*overrides, name="other")["weights_sha256"] != whole["weights_sha256"]


def test_what_is_decided_fills_what_is_open_and_nothing_else(small_config: Callable[..., RunConfig]) -> None:
    decided = Decided(device="cuda", precision="bf16", threads=3, micro_batch_size=2)
    training = small_config("training.precision=fp32", "training.threads=1", "training.device=cpu").training
    assert decided.applied_to(training) == training
    filled = decided.applied_to(small_config(*AUTO, "training.micro_batch_size=auto").training)
    assert (filled.device, filled.precision, filled.threads, filled.micro_batch_size) == (
        "cuda",
        "bf16",
        3,
        2,
    )
