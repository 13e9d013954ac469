"""The gate: the request of its steps, and what an aggregator may try at a silo that has a policy."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ConfigRecord, RecordDict

import photon.node
from photon import worker
from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.engine.inprocess import InProcessGrid
from photon.errors import PhotonError
from photon.federation.assignment import DESCRIPTION
from photon.federation.run import prepare_run, run_federation
from photon.link.frames import Frame
from photon.link.messages import (
    BODY,
    AdvertiseKeys,
    Body,
    Describe,
    Description,
    EvaluateReport,
    EvaluateRequest,
    Masking,
    SiloInfo,
    TrainReport,
    TrainRequest,
    pack,
    unpack,
)
from photon.link.records import decode_groups, encode_groups
from photon.link.request import MAX_BODY, MAX_CONFIG
from photon.link.transport import SiloLink
from photon.models.build import build_model
from photon.node import answer
from photon.silo.policy import SiloPolicy
from photon.silo.service import SiloNode
from photon.silo.site import read_settings
from photon.state.silo import SiloCounts
from photon.subfederation import gateway
from photon.subfederation.member import Member
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events
from tests.conftest import SEQUENCE_LENGTH

#: An order of two steps of four windows.
TOKENS = 2 * 4 * SEQUENCE_LENGTH
KINDS = {"train": TrainRequest, "evaluate": EvaluateRequest}


def request(silo: str = "alpha", **changes: Any) -> TrainRequest:
    fields = {
        "run_id": "run",
        "model_id": "model-1",
        "round": 1,
        "silo": silo,
        "members": [silo],
        "global_step": 0,
        "steps": 2,
        "batch_size": 4,
        "last_round": 0,
        "position": 0,
        "cohort": 3,
    }
    return TrainRequest.model_validate(fields | changes)


def message(body: Body, config: RunConfig | str) -> RecordDict:
    """Return what brings a body, the parameters of a first model, and a configuration or its text."""
    text = config if isinstance(config, str) else config.text
    content = RecordDict()
    if isinstance(body, TrainRequest | EvaluateRequest):
        content = encode_groups({"params": PARAMS})
    content[BODY] = ConfigRecord({**pack(body), "config": text})
    return content


def kind_of(body: Body) -> Any:
    return next((kind for kind, of in KINDS.items() if isinstance(body, of)), "query")


PARAMS: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def config(small_config: Callable[..., RunConfig]) -> Iterator[RunConfig]:
    config = small_config("local_steps=2", "link=dense")
    model = build_model(config.model, 300, seed=0)
    PARAMS.update({name: p.detach().clone() for name, p in model.named_parameters()})
    yield config
    PARAMS.clear()


@pytest.fixture
def change(config: RunConfig) -> Callable[..., str]:
    """Return what edits keys of the run's configuration and returns its text."""

    def changed(**sections: Any) -> str:
        values = yaml.safe_load(config.text)
        for section, new in sections.items():
            old = values[section]
            values[section] = {**old, **new} if isinstance(old, dict) and "_target_" not in new else new
        return yaml.safe_dump(values, sort_keys=False)

    return changed


@pytest.fixture
def node(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what makes the node config of a deployed node with all silos' text, of keys and rules."""

    def made(rules: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        settings = {"data-dir": str(corpus), "state-dir": str(tmp_path / "state"), **keys}
        if rules is not None:
            (tmp_path / "policy.yaml").write_text(json.dumps(rules))
            settings["policy"] = str(tmp_path / "policy.yaml")
        return settings

    return made


def refusal(body: Body, config: RunConfig | str, node_config: dict[str, Any]) -> str:
    """Return the one line with which a node refuses."""
    record = answer(kind_of(body), message(body, config), node_config)[BODY]
    assert isinstance(record, ConfigRecord)
    assert list(record) == ["refused"], "it was answered"
    assert "\n" not in str(record["refused"])
    return str(record["refused"])


def trained(body: TrainRequest, config: RunConfig | str, node_config: dict[str, Any]) -> TrainReport:
    return unpack(answer("train", message(body, config), node_config), TrainReport)


def counted(tmp_path: Path) -> dict[str, int]:
    """Return the tokens that were counted for each silo, in all runs and all folders of the node."""
    found: Counter[str] = Counter()
    for file in (tmp_path / "state").rglob("counts.json"):
        found[file.parent.name] += sum(
            use["tokens"] for use in json.loads(file.read_text())["content"].values()
        )
    return dict(found)


# --- the request of the steps -------------------------------------------------------------------------------

STEPS = [
    (photon.node, "read_request"),
    (photon.node, "parse"),
    (SiloPolicy, "check_names"),
    (SiloNode, "check_asked"),
    (photon.node, "preflight"),
    (SiloPolicy, "check_run"),
    (SiloPolicy, "check_train_request"),
    (photon.node, "contract_asked"),
    (SiloNode, "cost"),
    (SiloPolicy, "check_cost"),
    (SiloCounts, "add"),
    (SiloLink, "receive"),
    (SiloNode, "train"),
    (SiloLink, "send"),
]
NAMES = [name for _, name in STEPS]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return where the steps of the gate are noted as they begin."""
    begun: list[str] = []

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            begun.append(name)
            return original(*args, **kwargs)

        return step

    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    return begun


def test_an_order_that_is_welcome_takes_the_steps_in_their_order(
    config: RunConfig, node: Callable[..., dict[str, Any]], steps: list[str]
) -> None:
    assert trained(request(), config, node({})).steps == 2
    assert steps == NAMES


@pytest.mark.parametrize(
    ("last", "rules", "edit", "changes"),
    [
        ("read_request", {}, {}, {"run_id": "r" * 300}),
        ("read_request", {}, {}, {"position": 2**60}),
        ("read_request", {}, {}, {"members": ["alpha", "alpha"]}),
        ("parse", {}, {"rounds": "many"}, {}),
        ("check_names", {"models": ["llama"]}, {}, {}),
        ("check_names", {"strategies": ["Other"]}, {}, {}),
        ("check_asked", {}, {}, {"silo": "alias", "members": ["alpha"]}),
        ("check_asked", {}, {}, {"members": ["alpha", "beta"]}),
        ("preflight", {}, {"optimizer": {"_target_": "torch.optim.AdamW", "lrr": 1.0}}, {}),
        ("check_run", {"max_parameters": 100}, {}, {}),
        ("check_train_request", {"min_cohort": 4}, {}, {}),
        ("check_train_request", {"secure_aggregation": True}, {}, {}),
        ("contract_asked", {}, {}, {"masking": Masking(attempt="a" * 32, silos=[])}),
        ("check_cost", {"max_local_steps": 1}, {}, {}),
        ("check_cost", {"max_run_tokens": TOKENS - 1}, {}, {}),
        ("receive", {}, {"model": {"sequence_length": SEQUENCE_LENGTH + 1}}, {}),
    ],
)
def test_nothing_runs_after_the_step_that_refuses(
    last: str,
    rules: dict[str, Any],
    edit: dict[str, Any],
    changes: dict[str, Any],
    change: Callable[..., str],
    node: Callable[..., dict[str, Any]],
    steps: list[str],
    tmp_path: Path,
) -> None:
    content = message(request(**changes), change(**edit))
    with pytest.raises(PhotonError) as refused:
        unpack(answer("train", content, node(rules)), TrainReport)
    assert "\n" not in str(refused.value)
    assert steps == NAMES[: NAMES.index(last) + 1]
    assert counted(tmp_path) == ({"alpha": TOKENS} if "add" in steps else {})


@pytest.mark.parametrize(("key", "most"), [("config", MAX_CONFIG), ("body", MAX_BODY)])
def test_what_is_too_large_is_not_even_read(
    key: str, most: int, config: RunConfig, node: Callable[..., dict[str, Any]], steps: list[str]
) -> None:
    content = message(request(), config)
    content[BODY][key] += " " * most  # type: ignore[index, operator]
    with pytest.raises(PhotonError, match=f"^message: its {key} has more than {most:,} bytes$"):
        answer("train", content, node({}))
    assert steps == ["read_request"]


def test_a_message_of_no_known_type_is_refused(
    config: RunConfig, node: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(PhotonError, match="'dance' is no type of message"):
        answer("dance", message(Describe(), config), node())  # type: ignore[arg-type]


# --- names ------------------------------------------------------------------------------------------------

BODIES: list[Body] = [Describe(), request(), EvaluateRequest(round=1, silo="alpha")]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that a module writes as soon as it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "a_stranger.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("a_stranger", None)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
@pytest.mark.parametrize(
    ("rules", "edit"),
    [
        ({"optimizers": ["AdamW"]}, {"optimizer": {"_target_": "a_stranger.AdamW2"}}),
        ({"strategies": ["Photon"]}, {"strategy": {"_target_": "a_stranger.Photon2"}}),
        (
            {"strategies": ["Photon"]},
            {
                "federation": {
                    "tree": {"n": {"children": ["alpha"], "strategy": {"_target_": "a_stranger.S"}}}
                }
            },
        ),
    ],
)
def test_what_the_policy_does_not_name_is_not_imported(
    body: Body,
    rules: dict[str, Any],
    edit: dict[str, Any],
    change: Callable[..., str],
    node: Callable[..., dict[str, Any]],
    stranger: Path,
) -> None:
    assert f"refused by {getattr(body, 'silo', 'the node')}'s policy: " in refusal(
        body, change(**edit), node(rules)
    )
    assert "is not registered there" in refusal(body, change(**edit), node())
    assert not stranger.exists()
    with pytest.raises(PhotonError):
        answer(kind_of(body), message(body, change(**edit)), node({"modules": ["a_stranger"]}))
    assert stranger.exists(), "where the policy names it, it is: so the test above could fail"


# --- which participants a node has ------------------------------------------------------------------------


def test_a_silo_goes_by_its_own_name_alone(config: RunConfig, node: Callable[..., dict[str, Any]]) -> None:
    said = refusal(request("alias", members=["alpha"]), config, node())
    assert "the request is for alias, on the text of alpha" in said
    assert "pooling=true" in said
    assert "pooling=true" in refusal(request("alpha", members=["alpha", "beta"]), config, node())
    keys = AdvertiseKeys(attempt="a" * 32, run_id="r", model_id="m", round=1, silo="other")
    assert "pooling=true" in refusal(keys, config, node())
    assert "pooling=true" in refusal(EvaluateRequest(round=1, silo="other"), config, node())
    assert trained(request("beta"), config, node()).silo == "beta", "one of several silos at a node"


def test_text_is_pooled_where_the_operator_allows_it(
    config: RunConfig, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = trained(request("centralized", members=["alpha", "beta"]), config, node(pooling=True))
    assert report.tokens == TOKENS
    assert counted(tmp_path) == {"alpha": TOKENS, "beta": TOKENS}, "all may be of either"
    with pytest.raises(PhotonError, match="has no silo 'nobody'"):
        answer("train", message(request("x", members=["nobody"]), config), node(pooling=True))


@pytest.mark.parametrize("worker", [True, False])
def test_whatever_a_silo_is_called_its_own_tokens_count(
    config: RunConfig, node: Callable[..., dict[str, Any]], tmp_path: Path, worker: bool
) -> None:
    own = node({"max_run_tokens": 2 * TOKENS}, pooling=True, worker=worker)
    trained(request("alpha"), config, own)
    trained(request("alias1", members=["alpha"]), config, own)
    for name in ("alias2", "alpha"):
        said = refusal(request(name, members=["alpha"], model_id="model-2"), config, own)
        assert said.startswith("refused by alpha's policy: max_run_tokens=256")
    assert counted(tmp_path) == {"alpha": 2 * TOKENS}


def test_tokens_are_limited_over_runs(config: RunConfig, node: Callable[..., dict[str, Any]]) -> None:
    own = node({"max_run_tokens": 2 * TOKENS})
    for run in ("one", "two"):
        trained(request(run_id=run), config, own)
    said = refusal(request(run_id="three"), config, own)
    assert "max_run_tokens=256, and the request asks for 384 tokens so far, in all runs counted" in said


# --- counts -----------------------------------------------------------------------------------------------


def test_what_crashed_is_counted_and_what_is_kept_is_not_counted_again(
    config: RunConfig, node: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        assert counted(tmp_path) == {"alpha": TOKENS}, "before the silo works"
        raise RuntimeError("the silo dies")

    with monkeypatch.context() as patch:
        patch.setattr(SiloNode, "train", dies)
        with pytest.raises(RuntimeError, match="the silo dies"):
            trained(request(), config, node({}))
    first = trained(request(), config, node({}))
    assert counted(tmp_path) == {"alpha": 2 * TOKENS}
    again = trained(request(), config, node({"max_run_tokens": 1}))
    assert again.model_copy(update={"seconds": first.seconds}) == first, "it is on the disk"
    assert counted(tmp_path) == {"alpha": 2 * TOKENS}


def test_a_kept_reply_does_not_leave_against_the_policy(
    config: RunConfig, node: Callable[..., dict[str, Any]]
) -> None:
    trained(request(), config, node({}))
    assert "secure_aggregation=true" in refusal(request(), config, node({"secure_aggregation": True}))
    assert "min_cohort=3" in refusal(request(cohort=2), config, node({"min_cohort": 3}))


# --- federations of the tree that a run names -------------------------------------------------------------


@pytest.fixture
def tree(change: Callable[..., str]) -> str:
    """A configuration in which `north` is a federation of alpha, of 50 rounds of 64 steps."""
    return change(local_steps=64, federation={"tree": {"north": {"children": ["alpha"], "rounds": 50}}})


NORTH: list[Body] = [request("north", steps=2), EvaluateRequest(round=1, silo="north")]


@pytest.mark.parametrize("body", NORTH, ids=lambda body: type(body).__name__)
def test_a_silo_is_no_federation_because_a_run_says_so(
    body: Body, tree: str, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    said = refusal(body, tree, node({}))
    assert said.startswith(
        "refused by the node of alpha, beta, gamma: the request is for north, a federation"
    )
    assert "branches=true in the node config" in said
    assert not (tmp_path / "state").exists()


def test_it_describes_itself_as_the_silos_that_it_is(tree: str, node: Callable[..., dict[str, Any]]) -> None:
    for keys, names in (({}, ["alpha", "beta", "gamma"]), ({"branches": True}, ["north"])):
        reply = answer("query", message(Describe(), tree), node({}, **keys))
        assert [silo.name for silo in unpack(reply, Description).silos] == names


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"strategies": ["Nothing"]}, "strategies=[Nothing]"),
        ({"models": ["nothing"]}, "models=[nothing]"),
        ({"optimizers": ["Nothing"]}, "optimizers=[Nothing]"),
        ({"max_parameters": 10}, "max_parameters=10"),
        ({"max_local_steps": 3199}, "max_local_steps=3,199, and the request asks for 3,200 local steps"),
        ({"max_round_tokens": 10}, f"asks for {3200 * 4 * SEQUENCE_LENGTH:,} tokens in a round"),
        ({"max_run_tokens": 10}, "refused by alpha's policy: max_run_tokens=10"),
        ({"min_cohort": 1000}, "min_cohort=1,000"),
        ({"secure_aggregation": True}, "secure_aggregation=true"),
    ],
)
def test_a_federation_of_the_tree_is_held_to_the_policy(
    rules: dict[str, Any], words: str, tree: str, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    assert words in refusal(request("north", steps=2), tree, node(rules, branches=True))
    assert counted(tmp_path) == {}
    assert not (tmp_path / "state" / "north").exists()


def test_its_validation_figures_stay_too(tree: str, node: Callable[..., dict[str, Any]]) -> None:
    own = node({"share_validation": False}, branches=True)
    assert "share_validation=false" in refusal(EvaluateRequest(round=1, silo="north"), tree, own)
    (north,) = unpack(answer("query", message(Describe(), tree), own), Description).silos
    assert north.validation_tokens is north.unigram_loss is None
    shared = answer("query", message(Describe(), tree), node({}, branches=True))
    assert unpack(shared, Description).silos[0].validation_tokens


def test_every_cohort_within_is_large_enough(tree: str, node: Callable[..., dict[str, Any]]) -> None:
    """What the round above says of its cohort, the federation could not promise alpha within."""
    with pytest.raises(
        PhotonError, match=r"north: .*refused by alpha's policy: min_cohort=2.* a cohort of 1"
    ):
        trained(request("north"), tree, node({"min_cohort": 2}, branches=True))


def test_a_worker_is_no_second_way_in(
    tree: str, branch: str, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def asked(text: str, **keys: Any) -> RecordDict:
        fields = {"message_type": "train", "node_config": node({"max_local_steps": 8}, **keys)}
        reply, sound = worker._answer(Frame(fields, message(request("north"), text)), tmp_path)
        assert sound
        assert not reply.fields, reply.fields
        return reply.records

    assert "branches=true" in str(asked(tree)[BODY]["refused"])  # type: ignore[index]
    assert "max_local_steps=8" in str(asked(tree, branches=True)[BODY]["refused"])  # type: ignore[index]
    assert unpack(asked(branch, branches=True), TrainReport).tokens == 3 * TOKENS


@pytest.fixture
def branch(change: Callable[..., str]) -> str:
    """A configuration in which `north` is a federation of alpha, of three rounds of two steps."""
    return change(federation={"tree": {"north": {"children": ["alpha"], "rounds": 3}}})


def test_what_leaves_a_federation_is_bounded_as_that_of_a_silo(
    branch: str, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Three rounds that are clipped each could move it three times as far."""
    own = node({"privacy": {"clip_norm": 1e-3}}, branches=True)
    reply = answer("train", message(request("north"), branch), own)
    report = unpack(reply, TrainReport)
    params = decode_groups(reply)["params"]
    moved = sum(float((params[name] - PARAMS[name]).norm()) ** 2 for name in PARAMS) ** 0.5
    assert 0 < moved <= 1e-3 * 1.001
    assert report.privacy is not None
    assert report.privacy.clip_norm == 1e-3
    assert counted(tmp_path) == {"alpha": 3 * TOKENS}, "once, for the silo whose text it is"
    assert report.tokens == 3 * TOKENS


def test_as_a_branch_and_as_itself_a_silo_has_one_count(
    branch: str, node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    own = node({"max_run_tokens": 4 * TOKENS}, branches=True)
    trained(request("north"), branch, own)
    trained(request("north"), branch, own)
    assert counted(tmp_path) == {"alpha": 3 * TOKENS}, "the second was kept"
    trained(request("alpha"), branch, own)
    assert "max_run_tokens=512" in refusal(request("alpha", model_id="model-2"), branch, own)


def test_another_strategy_within_the_tree_would_cost_what_nobody_knows(
    change: Callable[..., str], node: Callable[..., dict[str, Any]]
) -> None:
    rules = {"children": ["alpha"], "strategy": {"_target_": "photon.strategy.centralized.Centralized"}}
    text = change(federation={"tree": {"north": rules}})
    with pytest.raises(PhotonError, match=r"north: strategy\._target_: it is the run's"):
        answer("train", message(request("north"), text), node(branches=True))


def test_the_cost_of_a_tree_is_what_its_silos_train(
    small_config: Callable[..., RunConfig], node: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tree = (
        "federation.tree={west: {children: {north: {children: [alpha], rounds: 3}, beta: null}, rounds: 2}, "
        "gamma: null}"
    )
    config = prepare_run(
        small_config(
            "cohort=null", "rounds=1", "local_steps=2", "strategy=hierfavg", "evaluation.every=9", tree
        )
    )
    own = node({}, branches=True)
    run_federation(config, InProcessGrid(answer, {1: own}), resume=False, live=False)
    events = [
        event
        for file in [tmp_path / "run" / "events.jsonl", *(tmp_path / "state").rglob("events.jsonl")]
        for event in read_events(file)
        if isinstance(event, SiloFinished)
    ]
    tokens: dict[str, int] = {}
    for event in events:
        if event.silo not in ("west", "north"):
            tokens[event.silo] = tokens.get(event.silo, 0) + event.tokens
    # alpha: two rounds of west, three of north in each; beta beside it takes as many steps; so does gamma.
    assert tokens == dict.fromkeys(("alpha", "beta", "gamma"), 6 * TOKENS)
    assert counted(tmp_path) == tokens


# --- other kinds of nodes ---------------------------------------------------------------------------------


def test_what_a_node_may_be_follows_from_the_node_config(
    small_config: Callable[..., RunConfig], node: Callable[..., dict[str, Any]]
) -> None:
    simulated = read_settings({"partition-id": 0, "num-partitions": 1})
    assert simulated.may_branch
    assert simulated.may_pool
    deployed = read_settings({**node(), "partition-id": 0})
    assert not deployed.may_branch
    assert not deployed.may_pool
    for engine in ("inprocess", "simulation"):
        config = small_config(f"federation={engine}", "federation.tree={north: [alpha]}")
        assert "branches=true" in refusal(request("north"), config, {**node(), "partition-id": 0})


def test_a_gateway_is_judged_as_the_federation_that_it_is(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "deployed_connection", lambda *_: None)
    monkeypatch.setattr(Member, "train", lambda *_: pytest.fail("it was let through"))
    (tmp_path / "north.yaml").write_text("name: north\nrounds: 3\nsilos: 2\n")
    told = dict.fromkeys(("train_tokens", "validation_tokens", "unigram_loss", "roofline_flops"), 1)
    words = {"name": "north", "tokenizer_sha256": "0" * 64, "device": ""}
    told |= {"vocab_size": 300, "sequence_length": SEQUENCE_LENGTH}
    described = SiloInfo.model_validate({**told, **words, "federation": True})
    (tmp_path / "state" / "north").mkdir(parents=True)
    (tmp_path / "state" / "north" / DESCRIPTION).write_text(described.model_dump_json())
    own = {"federation": str(tmp_path / "north.yaml"), "state-dir": str(tmp_path / "state")}
    policy = tmp_path / "policy.yaml"
    own["policy"] = str(policy)
    # Three rounds of two steps of four windows, on two members; the request's own figures do not matter.
    for rule, limit in (("max_local_steps", 6), ("max_run_tokens", 2 * 3 * TOKENS)):
        policy.write_text(f"{rule}: {limit - 1}\n")
        assert f"refused by north's policy: {rule}={limit - 1}" in refusal(
            request("north", steps=1), config, own
        )
    with pytest.raises(PhotonError, match="this node is north"):
        answer("train", message(request("alpha"), config), own)


@pytest.mark.parametrize("key", ["branches", "pooling"])
def test_islands_and_gateways_are_neither(key: str, node: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(PhotonError, match="branches and pooling are of a silo with a data-dir"):
        read_settings(node(islands=2, **{key: True}))
    with pytest.raises(PhotonError, match="branches and pooling are of a silo with a data-dir"):
        read_settings({"federation": "north.yaml", "state-dir": "s", key: True})


def test_a_silo_of_islands_goes_by_its_own_name_alone(
    config: RunConfig, silo_folders: dict[str, Path], node: Callable[..., dict[str, Any]]
) -> None:
    own = {**node(), "data-dir": str(silo_folders["alpha"]), "islands": 2}
    with pytest.raises(PhotonError, match="this node is alpha, and the request is for "):
        answer("train", message(request("alias", members=["alpha"]), config), own)


def test_the_runs_own_machine_needs_no_key(
    small_config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    config = small_config("strategy=centralized", "federation.engine=inprocess")
    (tmp_path / "run").mkdir()
    own = {"partition-id": 0, "num-partitions": 1}
    everybody = PreparedData.open(corpus).silo_names
    assert trained(request("centralized", members=everybody), config, own).tokens == TOKENS
    evaluated = answer("evaluate", message(EvaluateRequest(round=1, silo="alpha"), config), own)
    assert unpack(evaluated, EvaluateReport).silo == "alpha"
