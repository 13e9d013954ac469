"""A silo of islands: the tree that it stands for, what its policy sees of it, and what a crash costs it."""

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Message, RecordDict

from photon.client_app import answer
from photon.data.prepared import PreparedData
from photon.data.separate import separate_silo
from photon.engine.inprocess import InProcessGrid, ParallelGrid, run_inprocess
from photon.errors import PhotonError
from photon.federation.exchange import exchange
from photon.federation.federation import Federation
from photon.federation.run import prepare_run, run_federation
from photon.files.processes import is_gone
from photon.link.answer import MessageType, NodeConfig
from photon.silo.site import read_settings
from photon.state.checkpoint import Checkpoint, CheckpointStore
from photon.telemetry.events import Event, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from tests.conftest import SMALL_DEPLOYED, composed, deal, small_run

RUN = ["cohort=null", "rounds=2", "evaluation.every=2", "federation.max_failures=0"]
#: The tree that alpha stands for when it has two islands.
TREE = "federation.tree={alpha: [alpha-1, alpha-2], beta: null}"
#: Adam blows rounding up where a gradient is zero, as that of an attention's key bias is.
SMOOTH = ["optimizer=sgd", "optimizer.lr=0.5", "optimizer.momentum=0.9"]

Nodes = Mapping[int, Mapping[str, str | int]]


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let islands work here, one after the other, and not in workers."""
    monkeypatch.setattr("photon.client_app.has_worker", lambda *_: False)
    monkeypatch.setattr("photon.subfederation.islands.ParallelGrid", InProcessGrid)


@pytest.fixture
def nodes(corpus: Path, tmp_path: Path) -> Iterator[dict[int, dict[str, str | int]]]:
    """Node configs of alpha, which has two islands, and of beta."""
    data = PreparedData.open(corpus)
    made: dict[int, dict[str, str | int]] = {}
    for node, silo in enumerate(("alpha", "beta"), start=1):
        separate_silo(data, silo, tmp_path / silo / "data")
        made[node] = {
            "data-dir": str(tmp_path / silo / "data"),
            "state-dir": str(tmp_path / silo / "state"),
        }
    made[1]["islands"] = 2
    yield made
    for process in workers(tmp_path):
        process.kill()
        process.wait(10)


def workers(folder: Path) -> list[psutil.Process]:
    """Return the silo workers whose state folders are below ``folder``."""
    children = psutil.Process().children()
    return [
        child
        for child in children
        if not is_gone(child) and any(str(folder) in word for word in child.cmdline())
    ]


def deploy(nodes: Nodes, run_dir: Path, *overrides: str, resume: bool = False) -> dict[str, Any]:
    """Train as a deployment does, but for Flower's processes: islands and beta have workers of their own."""
    small = composed(*SMALL_DEPLOYED, "federation.silos=2", *RUN, *overrides)
    config = prepare_run(small.model_copy(update={"run_dir": str(run_dir)}))
    return run_federation(config, InProcessGrid(answer, nodes), resume=resume, live=False)


def params_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return CheckpointStore(run_dir / "checkpoints").latest()[0].load_params()


def events_of(run_dir: Path) -> list[Event]:
    return read_events(run_dir / "events.jsonl")


@pytest.mark.usefixtures("in_one_process")
def test_islands_train_as_the_tree_in_one_process_does(nodes: Nodes, corpus: Path, tmp_path: Path) -> None:
    deployed = deploy(nodes, tmp_path / "run")
    deal(corpus, tmp_path / "dealt", {"alpha": 2, "beta": 1})
    tree = small_run(*RUN, TREE, data=tmp_path / "dealt", run_dir=tmp_path / "inprocess")
    inprocess = run_inprocess(prepare_run(tree), answer, resume=False)
    assert deployed["weights_sha256"] == inprocess["weights_sha256"]
    assert deployed["perplexity"]["final"] == pytest.approx(inprocess["perplexity"]["final"], rel=1e-9)
    # Four steps, four windows of 16 tokens: on two islands, and on beta.
    finished = [e for e in events_of(tmp_path / "run") if isinstance(e, SiloFinished)]
    assert [(e.silo, e.steps, e.tokens) for e in finished] == 2 * [("alpha", 4, 512), ("beta", 4, 256)]
    assert deployed["tokens"] == inprocess["tokens"] == 2 * (512 + 256)
    # Nothing above the silo names an island.
    assert "alpha-1" not in (tmp_path / "run" / "events.jsonl").read_text()
    state = tmp_path / "alpha" / "state" / "alpha"
    assert {e.silo for e in events_of(state) if isinstance(e, SiloFinished)} == {"alpha-1", "alpha-2"}


@pytest.mark.usefixtures("in_one_process")
def test_one_island_is_the_silo_itself(nodes: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    weights = []
    for islands in ({"islands": 1, "island-rounds": 1}, {}):
        own = {key: value for key, value in nodes[1].items() if not key.startswith("island")}
        chosen = {1: {**own, **islands}, 2: nodes[2]}
        summary = deploy(chosen, tmp_path / f"run-{len(islands)}")
        weights.append(summary["weights_sha256"])
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_one_process")
def test_rounds_of_the_islands_share_the_local_steps(
    nodes: dict[int, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    """Alone, such a silo is a flat federation of its islands, with more and shorter rounds."""
    nodes[1]["island-rounds"] = 2
    deploy({1: nodes[1]}, tmp_path / "run", "federation.silos=1", *SMOOTH)
    deal(corpus, tmp_path / "dealt", {"alpha": 2})
    shorter = [*RUN, *SMOOTH, "rounds=4", "local_steps=2"]
    flat = small_run(*shorter, data=tmp_path / "dealt", run_dir=tmp_path / "flat")
    run_inprocess(prepare_run(flat), answer, resume=False)
    trained, expected = (params_of(tmp_path / name) for name in ("run", "flat"))
    for name, tensor in expected.items():
        # But for one rounding a round: θ − (θ − mean) at the federation above.
        torch.testing.assert_close(trained[name], tensor, rtol=1e-4, atol=1e-6)
    finished = [e for e in events_of(tmp_path / "run") if isinstance(e, SiloFinished)]
    assert [(e.steps, e.tokens) for e in finished] == 2 * [(4, 512)]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="islands need Unix sockets")
def test_islands_that_are_killed_lose_nothing_that_was_kept(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = deploy(nodes, tmp_path / "whole")
    rounds = Federation._round

    def killing(self: Federation, checkpoint: Checkpoint) -> Checkpoint:
        if self.config.federation.parent is None and checkpoint.state.round == 1:
            assert len(workers(tmp_path / "alpha")) == 2
            for process in workers(tmp_path / "alpha"):
                process.kill()
                process.wait(10)
        return rounds(self, checkpoint)

    monkeypatch.setattr(Federation, "_round", killing)
    assert deploy(nodes, tmp_path / "killed")["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.usefixtures("in_one_process")
def test_the_policy_judges_all_islands_together(nodes: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    nodes[1]["policy"] = str(policy)
    # Four steps on two islands, four windows of 16 tokens each: 512.
    policy.write_text(
        "max_round_tokens: 512\nmax_local_steps: 4\nmax_run_tokens: 1024\nshare_validation: false\n"
    )
    deploy(nodes, tmp_path / "run", "evaluation.every=1000")
    count = json.loads((tmp_path / "alpha" / "state" / "alpha" / "counts.json").read_text())
    (use,) = count["content"].values()
    assert (use["tokens"], use["releases"]) == (1024, 2)
    assert [(place["start"], place["end"]) for place in use["places"]] == [(0, 32), (32, 64)]
    assert len(list((tmp_path / "alpha").rglob("counts.json"))) == 1, "islands do not count again"
    for rule in ("max_round_tokens: 511", "max_local_steps: 3", "max_run_tokens: 511"):
        policy.write_text(rule + "\n")
        run_dir = tmp_path / rule.partition(":")[0]
        deploy(nodes, run_dir, "federation.max_failures=null", "rounds=1")
        (reason, *_) = {e.reason for e in events_of(run_dir) if isinstance(e, SiloFailed)}
        assert rule.replace(": ", "=") in reason.replace(",", "")


@pytest.mark.usefixtures("in_one_process")
def test_islands_read_on_where_a_transition_has_changed_the_steps(
    nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    """Eight steps, then four: nothing is read twice, so nothing is refused."""
    policy = tmp_path / "policy.yaml"
    nodes[1]["policy"] = str(policy)
    policy.write_text("min_repeat_rounds: 2\n")
    deploy(
        {1: nodes[1]},
        tmp_path / "run",
        "federation.silos=1",
        "+transition.step=8",
        "+transition.local_steps=8",
    )
    count = json.loads((tmp_path / "alpha" / "state" / "alpha" / "counts.json").read_text())
    (use,) = count["content"].values()
    assert [(place["start"], place["end"]) for place in use["places"]] == [(0, 64), (64, 96)]


@pytest.mark.usefixtures("in_one_process")
def test_what_leaves_the_silo_is_clipped_and_what_islands_send_is_not(
    nodes: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("privacy: {clip_norm: 0.01}\n")
    nodes[1]["policy"] = str(policy)
    deploy(nodes, tmp_path / "run", "rounds=1")
    norms = {e.silo: e.update_norm for e in events_of(tmp_path / "run") if isinstance(e, SiloFinished)}
    assert norms["alpha"] <= 0.01 * (1 + 1e-5)
    inside = [
        e.update_norm
        for e in events_of(tmp_path / "alpha" / "state" / "alpha")
        if isinstance(e, SiloFinished)
    ]
    assert len(inside) == 2
    assert min(inside) > 0.01


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=scaffold"], "this node is a federation, which has no control variate of its own"),
        (["strategy=streaming-diloco", "strategy.fragments=2"], "this node is a federation, which keeps no"),
        (
            ["link=int8", "link.downlink_payload=update"],
            "this node is a federation, to which parameters do not travel as a change",
        ),
    ],
    ids=["variates", "fragments", "change"],
)
def test_what_a_federation_cannot_do_is_told_before_a_round(
    nodes: Nodes, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        deploy(nodes, tmp_path / "run", "federation.wait_for_silos=0", *overrides)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"islands": 0}, "islands=0: input should be greater than or equal to 1"),
        ({"island-rounds": 2}, "island-rounds is set but islands is not"),
        ({"islands": 2, "worker": False}, "islands train in workers"),
        ({"islands": 2, "federation": "north.yaml"}, "islands are of a silo with a data-dir"),
    ],
)
def test_what_does_not_go_together_is_told(own: dict[str, Any], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        read_settings(own)


def test_nodes_of_a_parallel_grid_work_at_the_same_time() -> None:
    meeting = threading.Barrier(2)

    def meet(_type: MessageType, _content: RecordDict, _node_config: NodeConfig) -> RecordDict:
        meeting.wait(20)
        return RecordDict()

    grid = ParallelGrid(meet, {1: {}, 2: {}})
    messages = {str(node): Message(RecordDict(), node, "query") for node in (1, 2)}
    answers = list(exchange(grid, messages, lambda name, _: name, deadline=30))
    assert answers == [("1", "1"), ("2", "2")]


def test_shares_are_all_of_the_windows_once(corpus: Path) -> None:
    whole = PreparedData.open(corpus)
    shares = [whole.dealt(island, 3) for island in (1, 2, 3)]
    windows = [share.windows(f"alpha-{island}", "train") for island, share in enumerate(shares, start=1)]
    together = np.empty_like(whole.windows("alpha", "train"))
    for place, part in enumerate(windows):
        together[place::3] = part
    assert np.array_equal(together, whole.windows("alpha", "train"))
    assert [s.manifest.silos[f"alpha-{i}"].train.sequences for i, s in enumerate(shares, 1)] == [
        len(part) for part in windows
    ]
    with pytest.raises(PhotonError, match=r"train windows of alpha cannot be dealt to 100000 islands"):
        whole.dealt(1, 100000)
