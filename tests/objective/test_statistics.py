"""An objective without steps, through whole runs: the sums of all silos are those of all text together.

`tests.objective.toy.Sums` takes two rounds. The second reads what was kept of the first, and its sums are
made with that; so an error of a round, or a value that lost bits on its way, is in the last ones.
"""

import itertools
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message
from typer.testing import CliRunner

from photon.client_app import WORKER
from photon.commands.app import app
from photon.config.compose import compose, load
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.link.messages import BODY, TrainReport, TrainRequest, pack, unpack
from photon.link.records import RAW, decode_groups, encode_groups
from photon.models.build import build_model
from photon.node import answer
from photon.preflight import preflight
from photon.silo.worker_client import ask_worker
from photon.state.checkpoint import Checkpoint, CheckpointStore, weights_sha256
from photon.state.silo import SiloCounts
from photon.strategy.sums import Sums as SumsStrategy
from photon.training.groups import StateGroups, read_params
from tests.conftest import SMALL, small_run
from tests.federation.test_federation import TamperingGrid, with_report
from tests.objective.toy import Sums
from tests.silo.test_worker import workers

#: A policy under which a silo takes what these tests bring.
TOYS = "modules: [tests.objective.toy]\n"
SUMS = ["strategy=sums", "objective._target_=tests.objective.toy.Sums", "rounds=2"]
MASKED = [*SUMS, "privacy=secure", "link.uplink_payload=update"]
SILOS = ["alpha", "beta", "gamma"]
#: Where processes that a test starts find the objective.
PATH = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])

Make = Callable[..., RunConfig]


def run(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    return run_inprocess(prepare_run(config), answer, resume=resume)


def checkpoint(folder: Path, server_round: int) -> Checkpoint:
    return CheckpointStore(folder / "checkpoints").load(server_round)


def centralised(
    config: RunConfig, corpus: Path, first: Collection[str], second: Collection[str] = ()
) -> StateGroups:
    """Return what is kept after a round on all text of some silos in one place, or after two."""
    data = PreparedData.open(corpus)
    model = build_model(config.model, data.manifest.vocab_size, seed=config.seed).eval()
    kept: StateGroups = {}
    with torch.no_grad():
        for server_round, silos in enumerate([first, second] if second else [first], start=1):
            windows = np.concatenate([data.windows(silo, "train") for silo in silos])
            kept = Sums().keep(Sums.of_windows(model, windows, kept), kept, server_round)
    return kept


def assert_equal_sums(found: StateGroups, expected: StateGroups) -> None:
    assert {group: set(tensors) for group, tensors in found.items()} == {
        group: set(tensors) for group, tensors in expected.items()
    }
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            assert found[group][name].dtype == torch.float64
            scale = float(tensor.abs().max())
            assert float((found[group][name] - tensor).abs().max()) <= 1e-12 * scale, f"{group}/{name}"


def test_the_sums_of_the_silos_are_those_of_all_text_and_nothing_is_trained(
    small_config: Make, corpus: Path, tmp_path: Path
) -> None:
    # An update, its codecs and processes that train together are for steps: they must not matter.
    config = small_config(
        *SUMS,
        "link.uplink_payload=update",
        "training.processes=2",
        "federation.adaptive_local_steps=true",
        "link.uplink=[]",
    )
    summary = run(config)
    first, last = checkpoint(tmp_path / "run", 1), checkpoint(tmp_path / "run", 2)
    assert_equal_sums(last.load_kept(), centralised(config, corpus, SILOS, SILOS))

    begun = read_params(build_model(config.model, last.state.vocab_size, seed=config.seed))
    assert weights_sha256(first.load_params()) == weights_sha256(last.load_params()) == weights_sha256(begun)
    assert last.load_outer() == {}
    state = last.state
    text = {name: silo.train.tokens for name, silo in PreparedData.open(corpus).manifest.silos.items()}
    assert state.global_step == 0
    assert state.tokens == 2 * sum(text.values())
    assert state.noise == type(state.noise)()
    for silo, entry in state.ledger.items():
        assert (entry.last_round, entry.position, entry.tokens) == (2, 0, 2 * text[silo])
        assert entry.steps_per_second is None
    assert summary["perplexity"]["final"] == summary["perplexity"]["initial"]


def test_a_cohort_gives_its_own_sums(small_config: Make, corpus: Path, tmp_path: Path) -> None:
    config = small_config(*SUMS, "cohort=2")
    run(config)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    first, second = (event["cohort"] for event in events if event["event"] == "round_started")
    assert first != second
    assert_equal_sums(checkpoint(tmp_path / "run", 2).load_kept(), centralised(config, corpus, first, second))


def rounded(reply: Message) -> Message:
    """Send the sums in float32."""
    groups = decode_groups(reply.content)
    single = {group: {name: t.float() for name, t in tensors.items()} for group, tensors in groups.items()}
    reply.content.update(encode_groups(single))
    return reply


def poisoned(reply: Message) -> Message:
    arrays = reply.content["shared/sums"]
    arrays["count"] = Array("float64", (), RAW, np.float64(math.nan).tobytes())
    return reply


BAD_REPLIES = {
    "error": (lambda reply: Message(Error(2, "disk full"), reply_to=reply), "disk full"),
    "float32": (rounded, "holds torch.float32, expected a sum in float64"),
    "nan": (poisoned, "shared/sums/count holds a value that is not finite"),
    "steps": (with_report(steps=4), "reports 4 steps"),
    "position": (with_report(position=4), "and window 4"),
    "tokens": (with_report(tokens=16), "16 tokens"),
    "loss": (with_report(loss=1.0), "reports a loss, and no steps were ordered"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("case", BAD_REPLIES)
def test_a_silo_that_fails_or_lies_is_no_part_of_the_sums(
    small_config: Make, corpus: Path, tmp_path: Path, case: str
) -> None:
    change, message = BAD_REPLIES[case]
    config = prepare_run(small_config(*SUMS, "rounds=1"))
    run_federation(config, TamperingGrid("beta", change), resume=False, live=False)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (failure,) = [event for line in lines if (event := json.loads(line))["event"] == "silo_failed"]
    assert failure["silo"] == "beta"
    assert message in failure["reason"]
    expected = centralised(config, corpus, ["alpha", "gamma"])
    assert_equal_sums(checkpoint(tmp_path / "run", 1).load_kept(), expected)


class KilledError(BaseException):
    """Ends the process, as far as Photon can tell; tests/federation/test_resume.py kills real ones."""


def test_a_run_that_was_killed_goes_on_to_the_same_sums(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_config(*SUMS, name="whole")
    run(whole)
    config = small_config(*SUMS)
    summed, calls = Sums.statistics, itertools.count(1)

    def dying(*args: Any, **rest: Any) -> Any:
        if next(calls) == 5:  # alpha has answered in round 2, beta is about to
            raise KilledError
        return summed(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Sums, "statistics", dying)
        with pytest.raises(KilledError):
            run(config)
    asked = []
    monkeypatch.setattr(
        Sums,
        "statistics",
        lambda self, model, data, received, **rest: (
            asked.append((data.members, rest["server_round"])) or summed(self, model, data, received, **rest)
        ),
    )
    run(load(tmp_path / "run" / "config.yaml"), resume=True)
    assert asked == [(("beta",), 2), (("gamma",), 2)], "alpha answers from its disk"
    found, expected = (checkpoint(tmp_path / name, 2) for name in ("run", "whole"))
    for group, tensors in expected.load_kept().items():
        for name, tensor in tensors.items():
            assert torch.equal(found.load_kept()[group][name], tensor)
    assert weights_sha256(found.load_params()) == weights_sha256(expected.load_params())


def test_values_of_the_outer_optimizer_stay(small_config: Make, tmp_path: Path) -> None:
    config = small_config(*SUMS)
    run(config)
    at = checkpoint(tmp_path / "run", 2)
    outer = {"momentum_buffer": {name: torch.ones_like(t) for name, t in at.load_params().items()}}
    state = at.state.model_copy(update={"round": 3, "outer_scalars": {"step": 7.0}})
    before = CheckpointStore(tmp_path / "run" / "checkpoints").save(state, at.load_params(), dict(outer))
    after = SumsStrategy(config).aggregate_train(4, before, iter(()))
    assert after.outer_scalars == {"step": 7.0}
    assert all(bool((tensor == 1).all()) for tensor in after.outer["momentum_buffer"].values())
    assert after.weights == {}


def request(**changes: object) -> TrainRequest:
    body = {
        "run_id": "run",
        "model_id": "model-1",
        "round": 1,
        "silo": "alpha",
        "members": ["alpha"],
        "global_step": 0,
        "steps": 0,
        "batch_size": 4,
        "last_round": 0,
        "position": 0,
        "cohort": 1,
    }
    return TrainRequest.model_validate(body | changes)


def message(config: RunConfig, body: TrainRequest, **groups: dict[str, torch.Tensor]) -> Any:
    content = encode_groups({"params": read_params(build_model(config.model, 300, seed=1)), **groups})
    content[BODY] = pack(body, config)
    return content


@pytest.fixture
def node(corpus: Path, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "toys.yaml").write_text(TOYS)
    folders = {"data-dir": str(corpus), "state-dir": str(tmp_path / "state")}
    return {**folders, "policy": str(tmp_path / "toys.yaml")}


def test_a_silo_that_is_asked_twice_reads_its_text_once(
    small_config: Make, corpus: Path, node: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(*SUMS, "federation=deployment")
    first = answer("train", message(config, request()), node)
    monkeypatch.setattr(Sums, "statistics", lambda *_, **__: pytest.fail("it reads its text again"))
    again = answer("train", message(config, request()), node)
    for group, tensors in decode_groups(first).items():
        assert all(torch.equal(decode_groups(again)[group][name], t) for name, t in tensors.items())
    tokens = PreparedData.open(corpus).manifest.silos["alpha"].train.tokens
    report = unpack(first, TrainReport)
    assert (report.steps, report.tokens, report.position) == (0, tokens, 0)
    assert report.loss is None
    assert SiloCounts(Path(node["state-dir"]), "alpha").used()["run"].tokens == tokens


# A worker is shown by default to answer as this process does, in tests/silo/test_worker.py; what, here above.
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="the worker needs Unix sockets")
def test_a_deployed_silos_worker_sums_as_this_process_does(
    small_config: Make, node: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", PATH)
    config = small_config(*SUMS, "federation=deployment")
    try:
        replies = [ask_worker("train", message(config, request()), node, WORKER)]
        kept = Sums().keep(decode_groups(replies[0]), {}, 1)
        following = request(round=2, model_id="model-2", last_round=1)
        replies += [ask_worker("train", message(config, following, **kept), node, WORKER)]
    finally:
        for process in workers(Path(node["state-dir"])):
            process.kill()
            process.wait(10)
    here = {**node, "state-dir": str(tmp_path / "here")}
    for reply, content in zip(
        replies, [message(config, request()), message(config, following, **kept)], strict=True
    ):
        expected, found = decode_groups(answer("train", content, here)), decode_groups(reply)
        assert expected.keys() == found.keys()
        for group, tensors in expected.items():
            assert all(torch.equal(found[group][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (
            "objectives: [CausalLM]",
            r"objectives=\[CausalLM\], and the request asks for tests.objective.toy.Sums",
        ),
        ("max_round_tokens: 1000", "max_round_tokens=1,000, and the request asks for .* tokens in a round"),
        ("max_run_tokens: 1000", "max_run_tokens=1,000"),
        ("secure_aggregation: true", "secure_aggregation=true, and the request asks for"),
        ("privacy: {clip_norm: 1.0}", "privacy=parameters alone, .*the state groups shared/sums"),
    ],
)
def test_a_silos_policy_judges_what_is_read_and_what_leaves(
    small_config: Make, node: dict[str, str], tmp_path: Path, rule: str, says: str
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(TOYS + rule)
    config = small_config(*SUMS, "federation=deployment")
    reply = answer("train", message(config, request()), {**node, "policy": str(policy)})
    with pytest.raises(PhotonError, match=says):
        unpack(reply, TrainReport)


def test_a_silo_answers_no_order_that_does_not_fit_the_objective(
    small_config: Make, node: dict[str, str]
) -> None:
    sums, steps = small_config(*SUMS, "federation=deployment"), small_config("federation=deployment")
    with pytest.raises(PhotonError, match="asks for 4 steps, and a round of this run has 0"):
        answer("train", message(sums, request(steps=4)), node)
    with pytest.raises(PhotonError, match="asks for 0 steps, and a round of this run has 4"):
        answer("train", message(steps, request()), node)
    with pytest.raises(PhotonError, match="the request does not bring shared/means"):
        answer("train", message(sums, request(round=2, last_round=1)), node)


def test_a_silo_sends_nothing_that_its_objective_did_not_promise(
    small_config: Make, node: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(*SUMS, "federation=deployment")
    content = message(config, request())
    given = {"tokens": torch.zeros(320), "count": torch.zeros(())}
    given |= {"hidden": torch.zeros(16), "states": torch.zeros(())}
    for change, says in (
        (lambda t: t.float(), r"shared/sums/tokens is a sum in torch\.float32; use float64"),
        (lambda t: t.double() + math.inf, "shared/sums/tokens holds a value that is not finite"),
        (lambda t: t.double().view(-1, 1), "not of the names and shapes that it says"),
    ):
        sums = {"shared/sums": {name: change(t) for name, t in given.items()}}
        monkeypatch.setattr(Sums, "statistics", lambda *_, sums=sums, **__: sums)
        with pytest.raises(PhotonError, match=says):
            answer("train", content, node)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["objective=causal_lm", "strategy=sums"],
            "Sums adds up sums, and the objective CausalLM takes local steps; use strategy=photon",
        ),
        (
            SUMS[1:],
            "Photon folds what was trained, and the objective Sums takes no steps; use strategy=sums",
        ),
        ([*SUMS, "privacy.clip_norm=1.0"], "Sums: privacy.clip_norm: nothing bounds the sums"),
        (
            [
                *MASKED,
                "link.states=[{_target_: photon.link.lossless.Zstd}]",
            ],
            "Sums: link.states: what is masked looks like noise",
        ),
        (
            [*MASKED, "privacy.ranges={grams: 4.0}"],
            "privacy.ranges.grams: this run has no such sum; did you mean 'gram'",
        ),
        (["privacy.ranges={gram: 4.0}"], "privacy.ranges.gram: this run has no such sum"),
        (
            [*SUMS, "link.uplink_payload=update", "link.downlink_payload=update"],
            "link.downlink_payload=update: parameters do not change",
        ),
        (
            [*SUMS, "link.states=[{_target_: photon.link.quantize.Cast, dtype: bfloat16}]"],
            "link.states: sums travel exactly",
        ),
        ([*SUMS, "federation.tree={north: [alpha, beta]}"], "north is a federation, which answers with"),
    ],
)
def test_what_does_not_go_with_sums_is_refused_before_a_run(overrides: list[str], says: str) -> None:
    with pytest.raises(PhotonError, match=says):
        preflight(compose([*SMALL, "data.path=none", *overrides]))


def test_sums_may_be_compressed_without_loss(small_config: Make, corpus: Path, tmp_path: Path) -> None:
    config = small_config(*SUMS, "link.states=[{_target_: photon.link.lossless.Zstd}]")
    run(config)
    expected = centralised(config, corpus, SILOS, SILOS)
    assert_equal_sums(checkpoint(tmp_path / "run", 2).load_kept(), expected)


def test_islands_say_that_they_have_no_sums(small_config: Make, lone_corpus: Path, tmp_path: Path) -> None:
    config = small_config(*SUMS, "federation=deployment")
    (tmp_path / "toys.yaml").write_text(TOYS)
    node = {"data-dir": str(lone_corpus), "state-dir": str(tmp_path / "state"), "islands": 2}
    node["policy"] = str(tmp_path / "toys.yaml")
    with pytest.raises(PhotonError, match="alone is a federation, which answers with parameters and not"):
        answer("train", message(config, request(silo="alone", members=["alone"])), node)


def test_report_and_watch_tell_of_such_a_run(small_config: Make, tmp_path: Path) -> None:
    run(small_config(*SUMS))
    folder = tmp_path / "run"
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(tmp_path / "report.html")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert "Tokens read" in page
    assert "Training loss" not in page
    done = CliRunner().invoke(app, ["watch", str(folder)])
    assert done.exit_code == 0, done.output
    assert "sums over the silos' text, no local steps" in done.output
    assert "nan" not in done.output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_simulation_gives_the_same_sums(corpus: Path, tmp_path: Path) -> None:
    config = small_run(*SUMS, "federation=simulation", data=corpus, run_dir=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(config.text)
    photon = Path(sys.executable).parent / "photon"
    done = subprocess.run(
        [photon, "train", "--config", str(tmp_path / "config.yaml")],
        env=os.environ | {"PYTHONPATH": PATH, "PHOTON_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = centralised(config, corpus, SILOS, SILOS)
    assert_equal_sums(checkpoint(tmp_path / "run", 2).load_kept(), expected)
