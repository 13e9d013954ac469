"""Federations within a federation: WorldLM's limits, and runs that are killed at any level."""

import collections
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.state.silo import SiloStore
from photon.telemetry.events import Diagnostics, Event, Notice, SiloFinished
from photon.telemetry.log import read_events
from photon.training.loop import LocalTrainer
from tests.conftest import small_run, write_corpus

TREE = "federation.tree={north: [a, b], south: [c, d]}"
DEEP = "federation.tree={west: {children: {north: [a], east: [b]}}, south: {children: [c, d], rounds: 2}}"
#: SGD, because Adam blows rounding up where a gradient is zero, as that of an attention's key bias is.
BASE = [
    "cohort=null",
    "model.architecture.n_layer=4",
    "rounds=2",
    "local_steps=2",
    "optimizer=sgd",
    "optimizer.lr=0.5",
    "optimizer.momentum=0.9",
    "schedule=constant",
]
#: Uniform attention over the children alone, overwritten on the way down, nothing across.
UNIFORM = [
    "strategy=worldlm",
    "strategy.attention.tau=inf",
    "strategy.attention.include_self_up=false",
    "strategy.down=overwrite",
    "strategy.routed.n_res=0",
]
#: The same without attention.
MEAN = ["strategy=worldlm", "strategy.up=mean", "strategy.down=overwrite", "strategy.routed.n_res=0"]


@pytest.fixture(scope="module")
def four_silos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(
        tmp_path_factory.mktemp("four"), {"a": "abcdefgh", "b": "abcdefgi", "c": "qrstuvwx", "d": "qrstuvwz"}
    )


@pytest.fixture
def config(four_silos: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return configuring(BASE, four_silos, tmp_path)


@pytest.fixture
def train(config: Callable[..., RunConfig]) -> Callable[..., Path]:
    return training(config)


def configuring(base: Sequence[str], data: Path, folder: Path) -> Callable[..., RunConfig]:
    """Return what prepares a run by its name in a folder and more overrides."""

    def make(name: str, *overrides: str) -> RunConfig:
        return prepare_run(small_run(*base, *overrides, data=data, run_dir=folder / name))

    return make


def training(config: Callable[..., RunConfig]) -> Callable[..., Path]:
    """Return what does such a run and returns its folder."""

    def run(name: str, *overrides: str) -> Path:
        chosen = config(name, *overrides)
        run_inprocess(chosen, answer, resume=False)
        return Path(str(chosen.run_dir))

    return run


@pytest.fixture(scope="module")
def hierfavg(four_silos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return what HierFAVG on the tree ends with."""
    train = training(configuring(BASE, four_silos, tmp_path_factory.mktemp("hierfavg")))
    return params_of(train("run", TREE, "strategy=hierfavg"))


@pytest.fixture(scope="module")
def flat_mean(four_silos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return what FedAvg with equal weights ends with, without a tree."""
    train = training(configuring(BASE, four_silos, tmp_path_factory.mktemp("flat")))
    return params_of(train("run", "strategy=photon", "strategy.weighting=uniform"))


def params_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return CheckpointStore(run_dir / "checkpoints").latest()[0].load_params()


def key_layers_of(silo_folder: Path) -> dict[str, torch.Tensor]:
    """Return the key layers that a silo has kept from its last round."""
    last = max(int(path.name.removeprefix("round-")) for path in silo_folder.glob("round-*"))
    state = json.loads((silo_folder / f"round-{last:06d}" / "state.json").read_text())
    kept = SiloStore(silo_folder, keep=9).load(state["run_id"], last)
    assert kept is not None
    return kept.groups["local/personal"]


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=name)


def per_node(run_dir: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run_dir / "summary.json").read_text())["perplexity"]["per_node"]
    return found


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [pytest.param(TREE, marks=pytest.mark.slow), DEEP])
def test_uniform_attention_and_overwriting_is_hierfavg(train: Callable[..., Path], tree: str) -> None:
    world, hier = train("world", tree, *UNIFORM), train("hier", tree, "strategy=hierfavg")
    assert_close(params_of(world), params_of(hier))


@pytest.mark.slow
def test_with_the_node_itself_in_the_softmax_it_is_not(
    train: Callable[..., Path], hierfavg: dict[str, torch.Tensor]
) -> None:
    world = params_of(train("world", TREE, *UNIFORM, "strategy.attention.include_self_up=true"))
    assert set(world) == set(hierfavg)
    with pytest.raises(AssertionError):
        assert_close(world, hierfavg)


@pytest.mark.slow
def test_on_a_balanced_tree_it_is_fedavg(
    train: Callable[..., Path], flat_mean: dict[str, torch.Tensor]
) -> None:
    assert_close(params_of(train("world", TREE, *MEAN)), flat_mean)


def test_weighted_by_leaves_it_is_fedavg_on_any_tree(
    train: Callable[..., Path], flat_mean: dict[str, torch.Tensor]
) -> None:
    uneven = "federation.tree={north: [a, b, c], south: [d]}"
    world = train("world", uneven, *UNIFORM, "strategy.backbone_weights=leaves")
    assert_close(params_of(world), flat_mean)


def test_a_region_can_have_key_layers_as_one(train: Callable[..., Path]) -> None:
    """Nothing of them crosses the root; within a region it is FedAvg of the whole model."""
    rules = "strategy: {down: overwrite, up: mean}"
    tree = f"federation.tree={{north: {{children: [a, b], {rules}}}, south: {{children: [c, d], {rules}}}}}"
    folder = train("regional", tree, "strategy=fedper", "strategy.embeddings=key")
    regions = {}
    for region, leaves in {"north": "ab", "south": "cd"}.items():
        regions[region] = params_of(folder / "silos" / region)
        trained = [key_layers_of(folder / "silos" / region / "silos" / leaf) for leaf in leaves]
        assert any("wte" in name for name in trained[0])
        for name, one in trained[0].items():
            assert not torch.equal(one, trained[1][name])
            torch.testing.assert_close(regions[region][name], (one + trained[1][name]) / 2, rtol=0, atol=1e-6)
    for name in trained[0]:
        assert not torch.equal(regions["north"][name], regions["south"][name])


def test_a_tree_of_depth_one_is_flat(train: Callable[..., Path]) -> None:
    tree = train("tree", "strategy=worldlm", "federation.tree={a: null, b: null, c: null, d: null}")
    flat = train("flat", "strategy=worldlm")
    assert_close(params_of(tree), params_of(flat), atol=0)
    assert per_node(tree) == per_node(flat)


@pytest.mark.slow
def test_only_oneself_is_fedper(train: Callable[..., Path]) -> None:
    """With down=none key layers keep to themselves; FedPer does not even send them."""
    tree = train("tree", TREE, "strategy=fedper")
    flat = train("flat", "strategy=fedper", "link.keep_received=false")
    seen = train("seen", TREE, "strategy=worldlm", "strategy.down=none", "strategy.routed.n_res=0")
    assert_close(key_layers_of(seen / "silos/north/silos/a"), key_layers_of(tree / "silos/north/silos/a"))
    assert_close(params_of(tree), params_of(flat))
    for silo, where in {"a": "north", "d": "south"}.items():
        assert_close(
            key_layers_of(tree / "silos" / where / "silos" / silo), key_layers_of(flat / "silos" / silo)
        )
        assert per_node(tree)[silo] == pytest.approx(per_node(flat)[silo], rel=1e-5)
    finished = [e for e in read_events(flat / "events.jsonl") if isinstance(e, SiloFinished)]
    first, second = (e for e in finished if e.silo == "a")
    assert second.bytes_down < first.bytes_down, "key layers come once, to begin with"
    assert second.group_bytes_up == second.group_bytes_down


def test_no_key_layers_is_hierarchical_fedavg(
    train: Callable[..., Path], hierfavg: dict[str, torch.Tensor]
) -> None:
    world = train("world", TREE, "strategy=worldlm", "strategy.key_fraction=0")
    assert_close(params_of(world), hierfavg, atol=0)


@pytest.mark.slow
def test_nothing_but_key_layers_is_local_training(train: Callable[..., Path]) -> None:
    tree = train("tree", TREE, "strategy=local")
    alone = train("alone", "strategy=photon", "federation.tree={a: null}")
    assert_close(key_layers_of(tree / "silos" / "north" / "silos" / "a"), params_of(alone), atol=0)
    assert per_node(tree)["a"] == pytest.approx(per_node(alone)["a"])


def test_inner_rounds_are_hierfavgs_second_period(train: Callable[..., Path]) -> None:
    """With one federation below, twice as many rounds above with one each below are the same."""
    one = "federation.tree={north: [a, b]}"
    inner = train("inner", one, "strategy=hierfavg", "federation.inner_rounds=2", "rounds=2")
    outer = train("outer", one, "strategy=hierfavg", "rounds=4")
    assert_close(params_of(inner), params_of(outer), atol=0)


# --- text of a federation's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_federation_trains_on_its_own_text_before_its_silos_or_beside_them(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    original = LocalTrainer.train
    starts: list[dict[str, torch.Tensor]] = []
    ends: list[dict[str, torch.Tensor]] = []

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        starts.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        result = original(self, *args, **kwargs)
        ends.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return result

    monkeypatch.setattr(LocalTrainer, "train", recording)
    tree = "federation.tree={north: {children: [a], data: d}}"
    train("own", tree, "strategy=worldlm", f"strategy.schedule={schedule}", "rounds=1")
    assert len(starts) == 2
    if schedule == "sequential":
        assert_close(starts[1], ends[0], atol=0)
    else:
        assert_close(starts[1], starts[0], atol=0)


def test_beside_its_silos_it_is_one_more_of_them(train: Callable[..., Path]) -> None:
    rules = ["strategy=worldlm", "strategy.key_fraction=0", "strategy.schedule=parallel"]
    own = train("own", *rules, "federation.tree={a: null, b: null}", "federation.server_silo=d")
    flat = train("flat", *rules, "federation.tree={a: null, b: null, d: null}")
    assert_close(params_of(own), params_of(flat), atol=0)


# --- what travels -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_routed_layers_travel_to_another_federation_and_stay_in_their_budget(
    train: Callable[..., Path],
) -> None:
    run_dir = train("world", TREE, "strategy=worldlm", "strategy.routed.n_res=1", "rounds=3")
    events = read_events(run_dir / "events.jsonl")
    finished = [e for e in events if isinstance(e, SiloFinished)]
    received = [e for e in finished if e.group_bytes_down.get("shared/routed-1")]
    assert {e.round for e in received} == {2, 3}, "what was chosen in a round travels in the next"
    assert not any(
        group > "shared/routed-1" for e in finished for group in e.group_bytes_down if "resid" in group
    )
    block = sum(tensor.nbytes for name, tensor in params_of(run_dir).items() if ".h.3." in name)
    below = [run_dir / "silos" / name for name in ("north", "south")]
    told = [check_routes(read_events(folder / "events.jsonl"), block) for folder in (run_dir, *below)]
    assert told[0] == 4, "one of each of the two key blocks in rounds 2 and 3"
    assert sum(told[1:]) == 4, "and each goes on to one of the silos"
    state = CheckpointStore(run_dir / "checkpoints").latest()[0].state
    blocks = [tag.block for tag in state.routed]
    assert sorted(blocks) == ["2", "3"], "one for each of the two key blocks"
    weights = [e.values for e in events if isinstance(e, Diagnostics) and "attention/3/north" in e.values]
    assert len(weights) == 3
    for values in weights:
        assert sum(values[f"attention/3/{who}"] for who in ("self", "north", "south")) == pytest.approx(1)


def check_routes(events: list[Event], block: int) -> int:
    """Check the routes of each round against the bytes of routed layers, ``block`` each; return how many."""
    routes = [
        (event.round, re.fullmatch(r"routed/(\w+)/([\w/]+)>(\w+)", name), value)
        for event in events
        if isinstance(event, Diagnostics)
        for name, value in event.values.items()
        if name.startswith("routed")
    ]
    finished = [event for event in events if isinstance(event, SiloFinished)]
    sent = {(event.round, event.silo): event.group_bytes_down.get("shared/routed-1", 0) for event in finished}
    told = collections.Counter((number, found[3]) for number, found, _ in routes if found)
    assert {who: count * block for who, count in told.items()} == {
        w: size for w, size in sent.items() if size
    }
    for _, found, similarity in routes:
        assert found is not None
        assert found[2].partition("/")[0] != found[3], "a block never goes back to where it came from"
        assert -1 <= similarity <= 1
    return len(routes)


def test_a_node_sets_rules_of_its_own(train: Callable[..., Path]) -> None:
    tree = "federation.tree={north: {children: [a, b], cohort: 1, outer: diloco}, south: [c, d]}"
    run_dir = train("own", tree, "strategy=worldlm")
    north = CheckpointStore(run_dir / "silos" / "north" / "checkpoints").latest()[0]
    south = CheckpointStore(run_dir / "silos" / "south" / "checkpoints").latest()[0]
    assert "momentum_buffer" in north.load_outer()
    assert not south.load_outer()
    trained = [
        e for e in read_events(run_dir / "silos" / "north" / "events.jsonl") if isinstance(e, SiloFinished)
    ]
    assert len(trained) == 2, "one silo a round"


def test_a_tree_without_data_is_refused(config: Callable[..., RunConfig]) -> None:
    with pytest.raises(PhotonError, match=r"x has no data.*there are a, b, c, d"):
        run_inprocess(
            config("run", "federation.tree={north: [a, x]}", "strategy=worldlm"), answer, resume=False
        )


@pytest.mark.parametrize(
    ("north", "message"),
    [
        ("{children: [a], outer: dilco}", "north: outer=dilco: no such option; did you mean 'diloco'"),
        ("{children: [a], strategy: {key_fracton: 0.5}}", "did you mean 'key_fraction'"),
        ("{children: [a], privacy: {noise_multiplier: 1.0}}", "north: .*clip_norm"),
        ("{children: [a], privacy: {clip_nrm: 1.0}}", "north: clip_nrm"),
        ("{children: [a], link: {inline_limit_mb: -1}}", "north: inline_limit_mb"),
        ("{children: [a, b], quorum: 3}", "north: quorum=3 is larger than the 2 that train"),
        ("{children: [a, b], cohort: 1, quorum: 2}", "north: quorum=2 is larger than the 1 that train"),
        ("{children: [a, b], cohort: 1}", "north: privacy.secure_aggregation: the sum over one silo is its"),
    ],
)
def test_rules_that_cannot_be_are_refused_before_anything_starts(
    config: Callable[..., RunConfig], north: str, message: str
) -> None:
    secure = ["privacy=secure", "privacy.allow_unmasked=true", "link.uplink_payload=update"]
    masked = secure if "secure" in message else []
    with pytest.raises(PhotonError, match=message):
        config("run", f"federation.tree={{north: {north}, south: [c]}}", "strategy=worldlm", *masked)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=local-adam"], "north is a federation, which has no states"),
        (["strategy=centralized"], "north is a federation, whose text"),
        (["strategy=streaming-diloco"], "north is a federation, which keeps no fragments"),
        (["link.uplink_payload=update", "link.downlink_payload=update"], "north is a federation, to which"),
    ],
)
def test_what_needs_silos_is_refused_over_federations(
    config: Callable[..., RunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        config("run", "federation.tree={north: [a], south: [c]}", *overrides)


def test_noise_at_a_border_is_that_of_the_border_alone(train: Callable[..., Path]) -> None:
    """What north sends is clipped to its bound; within north nothing is."""
    bound = 1e-3
    tree = f"federation.tree={{north: {{children: [a, b], privacy: {{clip_norm: {bound}}}}}, south: [c, d]}}"
    run_dir = train("private", tree, "strategy=hierfavg", "rounds=1")
    finished = {
        event.silo: event.update_norm
        for event in read_events(run_dir / "events.jsonl")
        if isinstance(event, SiloFinished)
    }
    assert finished["north"] == pytest.approx(bound, rel=1e-3)
    assert finished["south"] > 10 * bound
    inside = [
        e for e in read_events(run_dir / "silos" / "north" / "events.jsonl") if isinstance(e, SiloFinished)
    ]
    assert min(event.update_norm for event in inside) > 10 * bound
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["privacy"]["epsilon"]) == {"north"}


@pytest.mark.few(1)
@pytest.mark.parametrize("strategy", [pytest.param("hierfavg", marks=pytest.mark.slow), "worldlm", "fedper"])
def test_a_tree_under_secure_aggregation_gives_the_same_mean(
    train: Callable[..., Path], strategy: str
) -> None:
    """Every federation of the tree learns the sum of its children's backbones alone, to rounding."""
    rules = [TREE, f"strategy={strategy}", "link.uplink_payload=update", "rounds=2"]
    secure = ["privacy=secure", f"privacy.allow_unmasked={str(strategy == 'worldlm').lower()}"]
    secured, plain = train("secured", *rules, *secure), train("plain", *rules)
    assert_close(params_of(secured), params_of(plain), atol=1e-5)


# --- crashes ------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    """Ends the process, as far as Photon can tell."""


@pytest.mark.parametrize("strategy", [pytest.param("worldlm", marks=pytest.mark.slow), "hierfavg"])
def test_a_tree_killed_at_any_level_goes_on_as_if_nothing_had_been(
    config: Callable[..., RunConfig],
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
) -> None:
    """The n-th local training kills it: between silos, between rounds of a federation, or of the root."""
    overrides = [TREE, f"strategy={strategy}", "federation.inner_rounds=2", "outer=diloco"]
    whole = train("whole", *overrides)
    for calls in (3, 10, 16):
        folder = killed_and_resumed(
            config(f"killed-{calls}", *overrides), monkeypatch, LocalTrainer, "train", calls
        )
        assert_close(params_of(folder), params_of(whole), atol=0)
        for node in ("north", "south"):
            assert_close(params_of(folder / "silos" / node), params_of(whole / "silos" / node), atol=0)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(
    config: Callable[..., RunConfig], train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of the root and of both federations are written in turn; any of them may be the last."""
    from photon.state import checkpoint

    overrides = [TREE, "strategy=worldlm"]
    whole = train("whole", *overrides)
    for calls in (2, 5, 7):
        folder = killed_and_resumed(
            config(f"killed-{calls}", *overrides), monkeypatch, checkpoint, "sync_files", calls
        )
        assert_close(params_of(folder), params_of(whole), atol=0)


def killed_and_resumed(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, calls: int
) -> Path:
    """Kill a run at the n-th call of a function, resume it, and return its folder."""
    original, count = getattr(owner, function), [0]

    def dying(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise KilledError
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, dying)
        with pytest.raises(KilledError):
            run_inprocess(config, answer, resume=False)
    run_inprocess(config, answer, resume=True)
    return Path(str(config.run_dir))


def test_a_federation_that_has_lost_everything_begins_anew(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from photon.federation.federation import Federation

    chosen = config("run", TREE, "strategy=worldlm", "rounds=3")
    folder = Path(str(chosen.run_dir))
    original = Federation._round

    def losing(self: Any, checkpoint: Any) -> Any:
        if self.run_dir == folder and checkpoint.state.round == 1:
            shutil.rmtree(folder / "silos" / "south")
        return original(self, checkpoint)

    monkeypatch.setattr(Federation, "_round", losing)
    summary = run_inprocess(chosen, answer, resume=False)
    assert summary["failures"] == 0
    notices = [e.message for e in read_events(folder / "events.jsonl") if isinstance(e, Notice)]
    assert len(notices) == 1
    assert notices[0].startswith("round 2: south had lost its local state")
