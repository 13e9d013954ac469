"""A run whose configuration was changed goes on as the one that it says, or says why it cannot."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.compose import parse
from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError, RunError
from photon.federation.resumed import compared
from photon.federation.run import check_run_dir, prepare_run
from photon.node import answer
from photon.silo import service
from photon.state.checkpoint import CheckpointStore
from photon.strategy.base import strategy_of
from photon.strategy.local import Kept
from photon.strategy.streaming import KeptFragments, StreamingDiLoCo
from photon.telemetry.events import Notice, SiloFailed
from photon.telemetry.log import read_events
from tests.conftest import write_corpus

Run = Callable[..., dict[str, Any]]
SGD = ["optimizer=sgd", "optimizer.momentum=0.9", "schedule=constant"]
TREE = "federation.tree={n: [alpha, beta], s: [gamma]}"


def told(run_dir: Path) -> list[str]:
    return [event.message for event in read_events(run_dir / "events.jsonl") if isinstance(event, Notice)]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            SGD,
            ["optimizer=adamw", "schedule=constant"],
            r"optimizer: .* of SGD\(.*momentum=0.9.* not of AdamW",
        ),
        ([], ["+optimizer.amsgrad=true"], r"optimizer: .* AdamW\("),
        (
            ["strategy=lordo", "optimizer.rank=4"],
            ["strategy=lordo", "optimizer.rank=2"],
            "optimizer: .*rank=4",
        ),
        (["outer=diloco"], ["outer=fedadam"], r"outer: .*\(momentum_buffer\) is that of SGD\(.* not of Adam"),
        (["outer=diloco"], ["outer=fedavg"], r"outer: .*\(momentum_buffer\)"),
        ([], ["seed=1"], "seed=1: the run began with 0"),
        ([], ["model.architecture.n_head=4"], "model: .*architecture.n_head: 2 → 4"),
        ([], ["model.sequence_length=32"], "model: .*sequence_length: 16 → 32"),
        ([], ["strategy=fedprox"], "strategy._target_: the run began with Photon"),
        ([], ["strategy.local_state=sync"], "strategy.sync: the run has averaged no states, and .* exp_avg"),
        (
            ["strategy=local-adam"],
            ["strategy=local-adam", "strategy.sync={exp_avg: 4, exp_avg_sq: never}"],
            "strategy.sync: the run has averaged exp_avg, exp_avg_sq, params, and would now average exp_avg,",
        ),
        (
            ["strategy=worldlm", "cohort=null", TREE],
            ["strategy=worldlm", "cohort=null", TREE, "strategy.embeddings=key"],
            "strategy: other layers would be",
        ),
        (["+transition.step=4"], ["+transition.step=8"], "transition: "),
        (
            ["strategy=sparsyfed"],
            ["strategy=sparsyfed", "strategy.beta=2"],
            "strategy: the checkpoint holds the weights of beta=1.25 and layers=None, which are another",
        ),
        (
            ["strategy=streaming-diloco", "strategy.fragments=2", "outer=fedadam"],
            ["strategy=streaming-diloco", "strategy.fragments=3", "outer=fedadam"],
            "strategy: the outer optimizer has counted the steps of 2 strided fragments",
        ),
        (
            ["cohort=null", TREE, "federation.inner_rounds=2"],
            ["cohort=null", TREE],
            "federation.tree: n has done 2 rounds of its own in each round, and would now do 1",
        ),
    ],
)
def test_what_cannot_go_on_says_so_before_anything_starts(
    before: list[str],
    after: list[str],
    message: str,
    small_config: Callable[..., RunConfig],
    run_small: Run,
    tmp_path: Path,
) -> None:
    run_small("rounds=2", *before)
    events = (tmp_path / "run" / "events.jsonl").read_bytes()
    changed = prepare_run(small_config("rounds=4", *after))
    with pytest.raises(PhotonError, match=f"config.yaml: {message}") as refused:
        check_run_dir(changed, resume=True)
    assert "\n" not in str(refused.value)
    with pytest.raises(PhotonError, match=message):
        run_inprocess(changed, answer, resume=True)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
    assert run_small("rounds=4", *before, resume=True)["rounds"] == 4, "changed back, it goes on"


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], ["outer=diloco"], "outer.momentum: 0.0 → 0.9"),
        (["outer=diloco"], ["outer=diloco", "outer.lr=0.5"], "outer.lr: 0.7 → 0.5"),
        (
            [],
            ["optimizer.lr=0.0001", "optimizer.betas=[0.8, 0.9]"],
            r"optimizer.betas: .* → \[0.8, 0.9\]; optimizer.lr",
        ),
        (
            SGD,
            ["optimizer=adamw", "schedule=constant", "strategy.local_state=reset"],
            "optimizer._target_: .*SGD → ",
        ),
        (
            ["strategy=desloc", "strategy.sync.exp_avg=8"],
            ["strategy=desloc", "strategy.sync.exp_avg=4"],
            "exp_avg: 8 → 4",
        ),
        ([], ["link=powersgd"], "link.uplink: "),
        (["link=powersgd"], ["link=int4"], "link.uplink: "),
        ([], ["training.batch_size=8", "local_steps=2"], "local_steps: 4 → 2; .*training.batch_size: 4 → 8"),
        (
            ["strategy=streaming-diloco"],
            ["strategy=streaming-diloco", "strategy.fragments=2"],
            "fragments: 4 → 2",
        ),
        (
            ["strategy=hierfavg", "cohort=null", TREE],
            ["strategy=hierfavg", "cohort=null", "federation.tree={n: [alpha], s: [beta, gamma]}"],
            "federation.tree.n",
        ),
        (
            ["optimizer=lordo"],
            ["optimizer=lordo", "link.downlink_payload=update", "link.uplink_payload=update"],
            "link.downlink_payload",
        ),
    ],
)
def test_what_can_go_on_is_the_run_that_it_says(
    before: list[str], after: list[str], message: str, run_small: Run, tmp_path: Path
) -> None:
    run_small("rounds=2", *before)
    summary = run_small("rounds=4", *after, resume=True)
    assert summary["rounds"] == 4
    (line,) = [line for line in told(tmp_path / "run") if "goes on with another configuration" in line]
    assert "rounds: 2 → 4" in line
    assert re.search(message, line), line
    state = CheckpointStore(tmp_path / "run" / "checkpoints").load(4).state
    assert parse(state.config).rounds == 4


@pytest.mark.parametrize(
    ("rounds", "fragments"),
    [
        pytest.param(2, 3, id="its last round synced all"),
        pytest.param(9, 2, id="they were others"),
    ],
)
def test_silos_go_on_from_the_fragments_that_were_synced(
    rounds: int, fragments: int, run_small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a round has synced is what was to be then, whatever the run has become since."""
    streaming = ["strategy=streaming-diloco", "cohort=null", "model.architecture.n_layer=2"]
    train = service.train

    def train_two_rounds(request: Any, *rest: Any) -> Any:
        if request.round == 3:
            raise PhotonError("it is ended")
        return train(request, *rest)

    with monkeypatch.context() as patch, suppress(RunError):
        patch.setattr(service, "train", train_two_rounds)
        run_small(*streaming, "strategy.fragments=3", f"rounds={rounds}")
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").load(2)
    method, params = strategy_of(parse(checkpoint.state.config)), checkpoint.load_params()
    assert isinstance(method, StreamingDiLoCo)
    synced = method.synced_params(2, {name: tensor.shape for name, tensor in params.items()})
    assert (len(synced) == len(params)) is (rounds == 2)

    starts: list[Any] = []
    start = KeptFragments.start

    def noting(self: Any, *args: Any) -> Any:
        starts.append(start(self, *args))
        return starts[-1]

    monkeypatch.setattr(KeptFragments, "start", noting)
    run_small(*streaming, f"strategy.fragments={fragments}", "rounds=9", resume=True)
    for first in starts[:3]:
        assert all(torch.equal(first.params[name], params[name]) for name in synced)


def test_fewer_routed_layers_than_were_chosen_fail_nobody(run_small: Run, tmp_path: Path) -> None:
    world = ["strategy=worldlm", "cohort=null"]
    run_small("rounds=2", *world)
    run_small("rounds=4", *world, "strategy.routed.n_res=0", resume=True)
    assert not any(isinstance(event, SiloFailed) for event in read_events(tmp_path / "run" / "events.jsonl"))


def test_an_unchanged_run_tells_of_no_change(run_small: Run, tmp_path: Path) -> None:
    run_small("rounds=2", "training.precision=auto", "training.threads=null")
    run_small("rounds=2", "training.precision=auto", "training.threads=null", resume=True)
    assert [line for line in told(tmp_path / "run") if "another configuration" in line] == []


def test_a_model_whose_file_was_changed_is_another_one(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    file, config = tmp_path / "model.json", small_config("rounds=2")
    section = config.model.model_copy(update={"architecture": None, "config_file": str(file)})
    config = prepare_run(config.model_copy(update={"model": section}))
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    file.write_text(json.dumps(fields))
    run_inprocess(config, answer, resume=False)
    file.write_text(json.dumps(fields | {"n_head": 4}))
    with pytest.raises(PhotonError, match=r"model: .*architecture.n_head: 2 → 4"):
        run_inprocess(config, answer, resume=True)


def test_a_damaged_newest_checkpoint_does_not_hide_what_the_run_was(run_small: Run, tmp_path: Path) -> None:
    run_small("rounds=3")
    (tmp_path / "run" / "checkpoints" / "round-000003" / "params.safetensors").write_bytes(b"")
    with pytest.raises(PhotonError, match="seed=5"):
        run_small("rounds=4", "seed=5", resume=True)
    assert run_small("rounds=4", resume=True)["rounds"] == 4


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_it(run_small: Run, tmp_path: Path) -> None:
    run_small("rounds=2")
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints").load(2)
    earlier = checkpoint.state.model_copy(update={"config": ""})
    assert compared(type(checkpoint)(checkpoint.path, earlier), parse(checkpoint.state.config)) is None


def test_a_silo_with_the_state_of_another_optimizer_says_so(small_config: Callable[..., RunConfig]) -> None:
    """Where the server cannot know: its checkpoint may be of an earlier version."""
    method = strategy_of(small_config()).local
    kept = Kept({"momentum_buffer": {}}, {}, {})
    request: Any = type("Request", (), {"silo": "alpha"})
    with pytest.raises(
        PhotonError, match=r"optimizer: alpha has kept the state of another one \(momentum_buffer\)"
    ):
        method.joined({"params": {}}, kept, request, {}, {})


def test_other_text_under_the_same_name_is_told(run_small: Run, corpus: Path, tmp_path: Path) -> None:
    run_small("rounds=2", "cohort=null")
    words = {"alpha": "abcdefgh", "beta": "nopijklm", "gamma": "qrstuvwxyz"}
    other = write_corpus(tmp_path / "other", words, corpus / "tokenizer")
    run_small("rounds=4", "cohort=null", data=other, resume=True)
    lines = [line for line in told(tmp_path / "run") if "has other text" in line]
    assert [line.partition(" has")[0] for line in lines] == ["round 3: beta"]
