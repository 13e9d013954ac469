"""Requests broken by hand, as an aggregator may send them to a silo: each is one clear line, at once."""

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import ConfigRecord
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from photon.config import folders
from photon.config.compose import parse
from photon.config.expression import expression
from photon.config.schema import RunConfig
from photon.errors import PhotonError, RefusedError
from photon.link.messages import BODY, EvaluateRequest, TrainReport, TrainRequest, pack, unpack
from photon.link.records import encode_groups
from photon.models.build import build_model
from photon.node import answer
from photon.silo import names
from photon.silo.policy import NO_POLICY, SiloPolicy
from photon.silo.service import SiloNode
from photon.silo.size import sizes_of
from photon.silo.work import idle_steps
from photon.state.places import MAX_PLACES, Place
from photon.state.silo import MAX_RUNS, USES, SiloCounts, Use, uses_of_silos

Make = Callable[..., RunConfig]
STREAMING = "photon.strategy.streaming.StreamingDiLoCo"
ARCHITECTURE = ("model", "architecture")


@pytest.fixture
def config(small_config: Make) -> RunConfig:
    return small_config("local_steps=2", "link=dense", "rounds=100")


@pytest.fixture
def params(config: RunConfig) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in build_model(config.model, 300, seed=0).named_parameters()}


@pytest.fixture
def node(corpus: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what makes the node config of a deployed silo, with a policy if there are rules."""

    def made(rules: Mapping[str, Any] | None = None) -> dict[str, Any]:
        own = {"data-dir": str(corpus), "state-dir": str(tmp_path / "state")}
        if rules is not None:
            (tmp_path / "policy.yaml").write_text(json.dumps(rules))
            own["policy"] = str(tmp_path / "policy.yaml")
        return own

    return made


@pytest.fixture
def ask(config: RunConfig, params: dict[str, torch.Tensor]) -> Callable[..., TrainReport]:
    """Send a train request, of a text or with keys of the configuration changed."""

    def sent(
        node_config: dict[str, Any],
        edits: Mapping[tuple[str, ...], Any] | None = None,
        text: str | None = None,
        tensors: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> TrainReport:
        fields = {"run_id": "run", "model_id": "m", "round": 1, "silo": "alpha", "members": ["alpha"]}
        fields |= {"global_step": 0, "steps": 2, "batch_size": 4, "last_round": 0, "position": 0, "cohort": 3}
        body = pack(TrainRequest.model_validate(fields | changes))
        content = encode_groups({"params": params, **(tensors or {})})
        content[BODY] = ConfigRecord({**body, "config": text or edited(config, edits or {})})
        return unpack(answer("train", content, node_config), TrainReport)

    return sent


def edited(config: RunConfig, edits: Mapping[tuple[str, ...], Any]) -> str:
    values = yaml.safe_load(config.text)
    for keys, value in edits.items():
        place = values
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
    return yaml.safe_dump(values, sort_keys=False)


def one_line(error: PhotonError) -> str:
    told = str(error)
    assert "\n" not in told
    assert len(told) < 1000
    return told


# --- texts --------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)
TEXTS = {
    "aliases": (BOMB, "anchors and aliases"),
    "an alias of itself": ("a: &a [*a]", "anchors and aliases"),
    "a merge": ("a: &a {b: 1}\nc: {<<: *a}", "anchors and aliases"),
    "depth of lists": ("a: " + "[" * 20_000, "more than 64 deep"),
    "depth of mappings": ("a: " + "{a: " * 60_000, "more than 64 deep"),
    "depth of lines": ("\n".join(" " * i + "a:" for i in range(900)), "more than 64 deep"),
    "width": ("a: [" + ",".join("1" * 400_000) + "]", "more than 20,000 values"),
    "a tag of Python": ("a: !!python/object/apply:os.system [x]", "the tag tag:yaml.org,2002:python/object"),
    "a tag of YAML": ("a: !!binary AAAA", "the tag tag:yaml.org,2002:binary"),
    "digits": ("rounds: " + "9" * 6000, "not a valid configuration (Exceeds the limit"),
    "hexadecimal": ("rounds: 0x" + "f" * 5000, "a whole number of 20000 bits"),
    "base sixty": ("rounds: 1" + ":59" * 3000, "a whole number of 17722 bits"),
    "no date": ("a: 2001-99-99", "not a valid configuration (month must be"),
    "no time zone": ("a: 2001-12-14t21:59:43-99:99", "not a valid configuration (offset must be"),
    "two documents": ("--- a\n--- b", "not a valid configuration"),
    "half a letter": ("\ud800", "not a valid configuration"),
    "a list as a key": ("? [a]\n: b", "not a valid configuration"),
    "no mapping": ("- rounds", "expected a mapping of keys"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_a_bomb_is_refused_before_it_is_built(case: str) -> None:
    text, told = TEXTS[case]
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PhotonError) as refused:
        parse(text)
    assert told in one_line(refused.value)
    assert time.process_time() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_what_photon_writes_is_read_back(small_config: Make) -> None:
    same = {"lr": 1.0, "betas": [0.9, 0.9]}
    config = small_config("federation.tree={north: [alpha, beta]}")
    twice = config.model_copy(update={"transition": None})
    values = {**twice.optimizer.as_mapping(), "a": same, "b": same}
    twice = twice.model_copy(update={"optimizer": type(config.optimizer).model_validate(values)})
    assert parse(twice.text) == twice


def test_a_tree_in_a_file_is_read_where_the_run_is_started_alone(small_config: Make, tmp_path: Path) -> None:
    (tmp_path / "tree.yaml").write_text("north: [alpha]\n")
    config = small_config(f"federation.tree={tmp_path / 'tree.yaml'}")
    assert config.federation.root is not None
    assert config.federation.root.silos() == ["alpha"]
    (tmp_path / "secret").write_text("hunter2")
    for path in (tmp_path / "tree.yaml", tmp_path / "secret", tmp_path / "nothing"):
        with pytest.raises(PhotonError, match="a file, and a configuration that came from elsewhere") as told:
            parse(edited(config, {("federation", "tree"): str(path)}))
        assert "hunter2" not in str(told.value)


# --- names --------------------------------------------------------------------------------------------------

NAMES = [
    (("optimizer",), "os.system"),
    (("optimizer",), "photon.cli.main"),
    (("optimizer",), "photon.strategy.photon.Photon"),
    (("optimizer",), "torch.optim..AdamW"),
    (("optimizer",), ".torch.optim.AdamW"),
    (("optimizer",), "torch.optim.АdamW"),
    (("optimizer",), "torch.optim_.AdamW"),
    (("optimizer",), "AdamW"),
    (("optimizer",), "torch.hub.load"),
    (("outer",), "photon.deployment.local.serve"),
    (("schedule",), "a_stranger.D"),
    (("strategy",), "a_stranger.S"),
    (("objective",), "a_stranger.O"),
    (("link", "uplink"), "a_stranger.C"),
    (("link", "states"), "codecs.CodecInfo"),
    (("link", "downlink"), "photon.objective.causal_lm.CausalLM"),
    (("telemetry", "listeners"), "a_stranger.listen"),
]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the file that a module writes as soon as it is imported."""
    mark = tmp_path / "imported"
    (tmp_path / "a_stranger.py").write_text(
        f"open({str(mark)!r}, 'w')\nimport torch\nclass O(torch.optim.SGD): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield mark
    sys.modules.pop("a_stranger", None)


@pytest.mark.parametrize(("where", "target"), NAMES)
@pytest.mark.parametrize("rules", [None, {}], ids=["no policy", "a policy"])
def test_nothing_is_imported_that_is_not_registered(
    where: tuple[str, ...],
    target: str,
    rules: dict[str, Any] | None,
    ask: Any,
    node: Any,
    stranger: Path,
) -> None:
    section: Any = {"_target_": target}
    section = [section] if len(where) > 1 else section
    with pytest.raises(RefusedError, match="is not registered there; known are") as refused:
        ask(node(rules), {where: section})
    one_line(refused.value)
    assert not stranger.exists()


def test_nodes_of_a_tree_and_transitions_name_nothing_else(ask: Any, node: Any, stranger: Path) -> None:
    child = {"children": {"alpha": None}}
    for edit in (
        {"outer": {"_target_": "a_stranger.O"}},
        {"strategy": {"_target_": "a_stranger.O"}},
        {"link": {"uplink": [{"_target_": "a_stranger.O"}]}},
    ):
        with pytest.raises(RefusedError, match=r"federation.tree: north: .*is not registered there"):
            ask(node(), {("federation", "tree"): {"north": {**child, **edit}}})
    transition = {"step": 2, "optimizer": {"_target_": "a_stranger.O"}}
    with pytest.raises(PhotonError, match=r"transition.optimizer._target_: the optimizer stays the run's"):
        ask(node(), {("transition",): transition})
    assert not stranger.exists()


@pytest.mark.parametrize("option", ["../../etc/x", "${oc.env:HOME}", "a,b", "[diloco]", "diloco lr=1", ""])
def test_a_node_of_the_tree_names_an_option_and_no_path(option: str, ask: Any, node: Any) -> None:
    for key in ("outer", "link"):
        with pytest.raises(PhotonError, match=f"{key}=.*not the name of a file in conf/{key}"):
            ask(node(), {("federation", "tree"): {"north": {"children": {"alpha": None}, key: option}}})


@pytest.mark.parametrize("rule", [{"modules": ["a_stranger"]}, {"optimizers": ["a_stranger.O"]}])
def test_what_the_policy_names_is_taken(rule: dict[str, Any], ask: Any, node: Any, stranger: Path) -> None:
    assert ask(node(rule), {("optimizer",): {"_target_": "a_stranger.O", "lr": 0.1}}).steps == 2
    assert stranger.exists()


def test_what_a_package_has_registered_is_taken(
    config: RunConfig, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = {"photon.optimizers": frozenset({"a_stranger.O"})}
    monkeypatch.setattr(names, "_registered", lambda group: registered.get(group, frozenset()))
    own = parse(edited(config, {("optimizer",): {"_target_": "a_stranger.O"}}))
    SiloPolicy().check_components("alpha", own)
    with pytest.raises(RefusedError, match=r"strategy\._target_="):
        SiloPolicy().check_components(
            "alpha", parse(edited(config, {("strategy",): {"_target_": "a_stranger.O"}}))
        )
    assert not stranger.exists()


def test_entry_points_are_read_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[photon.optimizers]\nmine = my_lab.optim:Mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names._registered.cache_clear()
    assert "my_lab.optim.Mine" in names._registered("photon.optimizers")
    names._registered.cache_clear()


def test_every_preset_is_registered() -> None:
    for group in ("optimizer", "outer", "schedule", "strategy", "objective", "link", "telemetry"):
        for option in sorted((folders.conf_dir() / group).glob("*.yaml")):
            values = yaml.safe_load(option.read_text()) or {}
            for where, kind, target in names._within(values, group, group):
                assert names._is_known(names.KINDS[kind], target, [], []), (option, where, target)


# --- models and sizes ---------------------------------------------------------------------------------------


def iterating(body: int, iterations: int) -> dict[str, int]:
    """Return the section of a model whose body is applied several times."""
    return {"head_blocks": 1, "body_blocks": body, "tail_blocks": 1, "train_iterations": iterations}


MODELS = [
    ({(*ARCHITECTURE, "n_layer"): 2000}, "max_layers=256, and the request asks for model.architecture"),
    ({(*ARCHITECTURE, "n_layer"): 10**12}, "max_layers=256"),
    ({(*ARCHITECTURE, "n_embd"): 10**9}, "max_width=131,072"),
    ({(*ARCHITECTURE, "n_inner"): 10**9}, "max_width=131,072"),
    ({(*ARCHITECTURE, "n_head"): 10**6}, "max_experts=1,024"),
    ({(*ARCHITECTURE, "n_positions"): 10**9}, "max_sequence_length=1,048,576"),
    ({(*ARCHITECTURE, "layer_types"): ["x"] * 300}, "max_layers=256"),
    ({("model", "vocab_size"): 10**9}, "max_vocabulary=1,048,576"),
    ({("model", "sequence_length"): 10**9}, "max_sequence_length=1,048,576"),
    ({("training", "batch_size"): 10**9}, "max_batch_size=16,384"),
    ({("evaluation", "batch_size"): 10**9}, "max_batch_size=16,384"),
    ({("training", "processes"): 64, ("training", "batch_size"): 64}, "max_processes=16"),
    (
        {("strategy",): {"_target_": STREAMING, "fragments": 10**9}},
        "strategy.fragments=1000000000: the model",
    ),
    ({ARCHITECTURE: {"model_type": "llama", "num_hidden_layers": 20_000}}, "max_layers=256"),
    (
        {(*ARCHITECTURE, "n_layer"): 7, ("model", "abbie"): iterating(5, 64)},
        "max_layers=256, and the request asks for model.abbie.train_iterations=322",
    ),
    ({("model", "abbie"): iterating(5, 10**9)}, "model.abbie.train_iterations"),
    ({("model", "abbie"): iterating(10**12, 1)}, "max_layers=256"),
    ({ARCHITECTURE: {"model_type": "abbie_gpt2", "train_iterations": 2}}, "give the type of its blocks"),
    ({ARCHITECTURE: {"model_type": "mixtral", "num_local_experts": 10**6}}, "max_experts=1,024"),
    ({ARCHITECTURE: {"model_type": "xlm", "emb_dim": 2048, "max_position_embeddings": 10**6}}, "one by one"),
    (
        {ARCHITECTURE: {"model_type": "gpt2", "n_layer": 200, "n_embd": 2**17, "n_head": 64}},
        "model: more than ",
    ),
    ({ARCHITECTURE: {"model_type": "gpt2", "auto_map": {"AutoModel": "x"}}}, "not taken from elsewhere"),
    ({ARCHITECTURE: {"model_type": "gpt2", "attn_implementation": "x"}}, "not taken from elsewhere"),
    ({ARCHITECTURE: {"model_type": "gpt2", "rope": {"_attn_implementation": "x"}}}, "not taken"),
    ({ARCHITECTURE: {"model_type": "gpt2", "activation_function": "some/one"}}, "a path or the name"),
    ({ARCHITECTURE: {"model_type": "gpt2", "{0.__class__}": 10**9}}, "max_width=131,072"),
    ({ARCHITECTURE: {"model_type": "../../etc"}}, "a path or the name"),
    ({ARCHITECTURE: None, ("model", "config_file"): "/dev/zero"}, "model.config_file: a request brings"),
    ({ARCHITECTURE: None, ("model", "warm_start"): "/etc"}, "model.warm_start: a request brings"),
]


@pytest.mark.parametrize(("edits", "told"), MODELS)
def test_a_model_that_is_too_large_or_not_described_is_not_built(
    edits: dict[tuple[str, ...], Any], told: str, ask: Any, node: Any
) -> None:
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PhotonError, match=re.escape(told)) as refused:
        ask(node(), edits, batch_size=edits.get(("training", "batch_size"), 4))
    one_line(refused.value)
    assert time.process_time() - begin < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_counts_of_small_models_are_those_of_the_names(config: RunConfig) -> None:
    """Every kind of causal model that transformers has, as it describes itself, is within the bounds."""
    known = {
        "llama": "num_hidden_layers",
        "opt": "num_hidden_layers",
        "gpt2": "n_layer",
        "mamba2": "n_groups",
    }
    for kind, field in known.items():
        assert field in set(vars(CONFIG_MAPPING[kind]())) | set(CONFIG_MAPPING[kind].attribute_map)
        own = config.model_copy(
            update={"model": config.model.model_copy(update={"architecture": {field: 300}})}
        )
        assert ("max_layers", f"model.architecture.{field}", 300) in list(sizes_of(own))
    wide = {"hidden_size_per_layer_input": 300, "hidden_size": 300, "rope_theta": 10**9, "tie": True}
    own = config.model_copy(update={"model": config.model.model_copy(update={"architecture": wide})})
    found = {where.rpartition(".")[2]: rule for rule, where, _ in sizes_of(own) if "architecture" in where}
    assert found == dict.fromkeys(("hidden_size_per_layer_input", "hidden_size"), "max_width")


def test_the_operator_raises_a_bound(ask: Any, node: Any) -> None:
    edits = {(*ARCHITECTURE, "n_layer"): 2}
    with pytest.raises(RefusedError, match="max_layers=1"):
        ask(node({"max_layers": 1}), edits)
    assert NO_POLICY.max_layers == SiloPolicy().max_layers == 256


REQUESTS = [
    ({"position": 2**48 + 1}, "position: larger than"),
    ({"steps": 2**60}, "steps: larger than"),
    ({"batch_size": 10**9}, "batches of 1000000000, and those of this run have 4"),
    ({"steps": 0}, "asks for 0 steps"),
    ({"round": 101}, "of round 101, and the run has 100"),
    ({"silo": "counts.lock"}, "pooling=true"),
    ({"members": ["nobody"]}, "pooling=true"),
    ({"run_id": ""}, "run_id: empty"),
    ({"run_id": "a\nb"}, "run_id: has a sign that is not printed"),
    ({"fixed": {"fixed/x": "0" * 64}}, "the request has the fixed groups"),
    ({"base_hash": "x", "last_round": 5, "round": 6}, "has lost the parameters of round 5"),
    ({"tensors": {"exp_avg": {"transformer.wte.weight": torch.zeros(1)}}}, "exp_avg"),
    ({"tensors": {"params": {"nope": torch.zeros(1)}}}, "nope"),
    ({"tensors": {"params": {}}}, "starts from all parameters"),
]


@pytest.mark.parametrize(("changes", "told"), REQUESTS)
def test_a_request_that_cannot_be_is_one_line(
    changes: dict[str, Any], told: str, ask: Any, node: Any
) -> None:
    with pytest.raises(PhotonError) as refused:
        ask(node(), **changes)
    assert told in one_line(refused.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: y")])
def test_too_little_memory_is_one_line(
    error: Exception, ask: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(SiloNode, "train", fails)
    with pytest.raises(PhotonError, match="train: there is not enough memory here for what is asked"):
        ask(node())


def test_a_batch_that_does_not_fit_is_not_made(ask: Any, node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("photon.files.memory.memory_bytes", lambda: 2 * 4 * 16 * 300 - 1)
    with pytest.raises(PhotonError, match="a micro-batch of 4 sequences takes 0 GiB"):
        ask(node())
    assert ask(node(), {("training", "micro_batch_size"): 2}, model_id="m2").steps == 2


def test_expressions_take_linear_time(ask: Any, node: Any) -> None:
    entry = [{"names": "(a|aa|.)*(.*.*.*)*$x", "codecs": []}]
    begin = time.process_time()
    assert ask(node(), {("link", "uplink_by_name"): entry}).steps == 2
    assert time.process_time() - begin < 3
    for text in ("(", "(?=a)", "(a)\\1", "a{1000}{1000}", "x" * 2000):
        with pytest.raises(PhotonError, match="here: "):
            expression(text, "here")


def test_expressions_of_presets_choose_what_pythons_do(config: RunConfig) -> None:
    texts = {"wte|wpe|embed", "transformer.h.1.", r"h\.[01]\.", r"^transformer\.wte"}
    for option in (folders.conf_dir() / "link").glob("*.yaml"):
        values = yaml.safe_load(option.read_text())
        texts |= {entry["names"] for entry in values.get("uplink_by_name") or ()}
    assert len(texts) > 4
    chosen_ones = []
    presets = [yaml.safe_load(file.read_text()) for file in (folders.conf_dir() / "model").glob("*.yaml")]
    kinds = {preset["architecture"]["model_type"] for preset in presets if preset.get("architecture")}
    for kind in kinds:
        layers = CONFIG_MAPPING[kind].attribute_map.get("num_hidden_layers", "num_hidden_layers")
        model = config.model.model_copy(update={"architecture": {"model_type": kind, layers: 2}})
        found = [name for name, _ in build_model(model, 300, seed=0, device="meta").named_parameters()]
        for text in texts:
            own, theirs = expression(text, "names"), re.compile(text)
            assert [bool(own.search(n)) for n in found] == [bool(theirs.search(n)) for n in found]
            chosen_ones += [name for name in found if own.search(name)]
    assert chosen_ones


# --- how little, and where ----------------------------------------------------------------------------------

FEW = [
    ({}, {"steps": 1}, {("training", "batch_size"): 1}, "min_round_windows=8, .* on 1 window"),
    ({}, {"steps": 1}, {}, "min_round_windows=8, .* on 4 window"),
    ({"min_round_tokens": 129}, {}, {}, "min_round_tokens=129, .* on 128 tokens"),
    ({"min_local_steps": 3}, {}, {}, "min_local_steps=3, .* 2 local steps"),
    ({"min_round_windows": 9}, {}, {}, "min_round_windows=9, .* on 8 window"),
    (
        {"min_round_windows": 10**6},
        {"steps": 10**6},
        {("local_steps",): 10**6},
        "min_round_windows=1,000,000",
    ),
]


@pytest.mark.parametrize(("rules", "changes", "edits", "told"), FEW)
def test_an_update_of_too_little_text_is_refused(
    rules: dict[str, Any],
    changes: dict[str, Any],
    edits: dict[tuple[str, ...], Any],
    told: str,
    ask: Any,
    node: Any,
    tmp_path: Path,
) -> None:
    batch = edits.get(("training", "batch_size"), 4)
    with pytest.raises(RefusedError, match=told):
        ask(node(rules), edits, batch_size=batch, **changes)
    assert not (tmp_path / "state" / "alpha" / "counts.json").exists()
    everything = {"min_round_windows": None, "chosen_positions": True}
    if changes.get("steps", 2) < 10:
        assert ask(node(everything), edits, batch_size=batch, **changes).steps


def test_steps_that_stand_still_do_not_count(ask: Any, node: Any) -> None:
    """Three steps at a rate of 0 and one that learns are a gradient of its windows."""
    wsd = {"_target_": "photon.training.schedule.WsdSchedule", "steps": 101, "warmup_steps": 0}
    edits = {("schedule",): {**wsd, "decay_fraction": 0.0}, ("local_steps",): 4}
    with pytest.raises(RefusedError, match=r"min_round_windows=8, .* on 4 window"):
        ask(node({}), edits, steps=4, global_step=100)
    assert ask(node({}), edits, steps=4, global_step=20).steps == 4


def test_a_warm_up_counts(small_config: Make) -> None:
    config = small_config(
        "schedule=cosine", "rounds=100", "local_steps=100", "model.recipe.warmup_steps=1000"
    )
    assert idle_steps(config, 0, 100) <= 2
    assert idle_steps(config, 5000, 100) == 0
    assert idle_steps(config, 9990, 10**9) < 10**9


def test_a_validation_loss_is_of_enough_windows(
    config: RunConfig, params: dict[str, torch.Tensor], node: Any
) -> None:
    content = encode_groups({"params": params})
    body = pack(EvaluateRequest(round=1, silo="alpha"))
    content[BODY] = ConfigRecord({**body, "config": edited(config, {("evaluation", "sequences"): 1})})
    refused = answer("evaluate", content, node({}))[BODY]
    assert "min_round_windows=8, and the request asks for a loss on 1 window" in str(refused["refused"])  # type: ignore[index]


def test_the_aggregator_does_not_choose_the_place(ask: Any, node: Any) -> None:
    """What Photon's servers ask for passes; a place of their choice does not, whatever the run is called."""
    own = node({})
    ask(own, position=0, model_id="m0")
    ask(own, round=2, last_round=1, position=8, model_id="m1")
    ask(own, round=3, last_round=1, position=8, model_id="m2")  # its reply was lost
    ask(own, round=4, last_round=3, position=16, model_id="m3")
    ask(own, round=3, last_round=1, position=8, model_id="m4")  # resumed from an earlier checkpoint
    ask(own, run_id="second", position=0)
    for run_id, position in (("run", 17), ("run", 1), ("run", 2**40), ("second", 16), ("third", 8)):
        with pytest.raises(RefusedError, match="chosen_positions=false, and the request asks for window"):
            ask(own, run_id=run_id, position=position, model_id="x", round=9, last_round=8)
    ask(node({"chosen_positions": True}), run_id="third", position=8, model_id="x")


def test_a_silo_that_has_lost_all_believes_what_it_is_told_once(ask: Any, node: Any) -> None:
    own = node({})
    assert ask(own, round=9, last_round=8, position=64).state_lost
    ask(own, round=10, last_round=9, position=72, model_id="n")
    with pytest.raises(RefusedError, match="window 80 in the first round that the silo knows of this run"):
        ask(own, run_id="other", round=9, last_round=8, position=80)


def test_the_same_text_again_needs_updates_between(ask: Any, node: Any) -> None:
    own = node({"min_repeat_rounds": 2})
    ask(own, position=0, model_id="a")
    ask(own, position=0, model_id="b")  # the same round again: its reply was lost
    with pytest.raises(RefusedError, match=r"min_repeat_rounds=2, .* the same text after 0 updates"):
        ask(own, run_id="second", position=0, model_id="c")
    ask(own, round=2, position=8, model_id="d")
    with pytest.raises(RefusedError, match="after 1 updates"):
        ask(own, run_id="second", position=0, model_id="c")
    ask(own, round=3, position=16, model_id="e")
    ask(own, run_id="second", position=0, model_id="c")


# --- counts -------------------------------------------------------------------------------------------------


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    counts = SiloCounts(tmp_path, "alpha")
    for number in range(MAX_PLACES + 5):
        counts.add("run", 1, 1, Place("alpha", number * 8, number * 8 + 8))
    counts.add("run", 1, 1, Place("alpha", 5 * 8 + 64 * 8 - 8, 5 * 8 + 64 * 8))
    assert len(counts.used()["run"].places) == MAX_PLACES
    uses = {f"run-{number}": Use(2, 1) for number in range(MAX_RUNS)}
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "counts.json").write_bytes(USES.dump_json(uses))
    beta = SiloCounts(tmp_path, "beta")
    beta.add("run-0", 1, 1)
    beta.add("new", 5, 1)
    found = beta.used()
    assert len(found) == MAX_RUNS + 1
    assert found[""] == Use(2, 1), "run-1, which was used the longest time ago"
    assert "run-0" in found
    assert sum(use.tokens for use in found.values()) == 2 * MAX_RUNS + 6
    assert set(uses_of_silos(tmp_path)) == {"alpha", "beta"}


@pytest.mark.parametrize("content", [b"", b"{", b'{"run": {"tokens": -', b"[]", b"\xff"])
def test_a_damaged_count_is_no_count_of_zero(content: bytes, ask: Any, node: Any, tmp_path: Path) -> None:
    ask(node({}))
    file = tmp_path / "state" / "alpha" / "counts.json"
    file.write_bytes(content)
    with pytest.raises(PhotonError, match="the silo's count cannot be read; put it back"):
        ask(node({}), model_id="n")
    assert file.read_bytes() == content


def test_a_count_of_which_a_bit_has_changed_is_no_smaller_count(ask: Any, node: Any, tmp_path: Path) -> None:
    ask(node({}))
    file = tmp_path / "state" / "alpha" / "counts.json"
    whole = file.read_bytes()
    (use,) = SiloCounts(tmp_path / "state", "alpha").used().values()
    places = [index for index in range(len(whole)) if whole[index : index + 1].isdigit()]
    for index in places:
        other = b"%d" % ((int(whole[index : index + 1]) + 1) % 10)
        file.write_bytes(whole[:index] + other + whole[index + 1 :])
        with pytest.raises(PhotonError, match="the silo's count cannot be read; put it back"):
            SiloCounts(tmp_path / "state", "alpha").used()
    file.write_bytes(whole)
    assert list(SiloCounts(tmp_path / "state", "alpha").used().values()) == [use]


def test_a_wide_tree_is_checked_in_bounded_time(ask: Any, node: Any) -> None:
    own = {
        f"n{i}": {"children": {f"c{i}": None}, "outer": {"_target_": "torch.optim.SGD", "lr": i + 1.0}}
        for i in range(101)
    }
    with pytest.raises(PhotonError, match="more than 100 nodes that each have settings of their own"):
        ask(node(), {("federation", "tree"): own})
