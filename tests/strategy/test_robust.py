"""Robust folds against direct formulas, at their breakdown points, and in whole runs with every strategy."""

import itertools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run
from photon.link.encoding import SparseTensor
from photon.node import answer
from photon.preflight import preflight
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.strategy import robust
from photon.strategy.base import strategy_of
from photon.strategy.robust import Fold, fold_robustly
from photon.strategy.scaffold import CONTROL
from photon.telemetry.events import Diagnostics, RoundFinished, SiloFailed
from photon.telemetry.log import read_events
from tests.conftest import composed

Run = Callable[..., dict[str, Any]]
Groups = dict[str, dict[str, torch.Tensor]]
SHAPES = {"weight": (7, 5), "bias": (5,), "scale": (), "none": (0, 3)}


def replies(count: int, seed: int = 0, *, far: dict[int, float] | None = None) -> dict[str, Groups]:
    """Return random replies near one another; those in ``far`` are multiplied by so much."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        {key: torch.randn(size, generator=generator) for key, size in SHAPES.items()} for _ in range(count)
    ]
    for index, factor in (far or {}).items():
        made[index] = {key: tensor * factor for key, tensor in made[index].items()}
    return {f"silo-{index}": {"params": one} for index, one in enumerate(made)}


def flat(groups: Groups) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in groups["params"].values()]).double()


def stacked(items: dict[str, Groups]) -> torch.Tensor:
    return torch.stack([flat(groups) for groups in items.values()])


def fold(items: dict[str, Groups], sent: Groups | None = None, block: int = robust.BLOCK, **keys: Any) -> Any:
    return fold_robustly(items, Fold(**keys), sent or {}, block)


def scores(vectors: torch.Tensor, liars: int) -> list[float]:
    """Return Krum's scores by its definition."""
    each = []
    for i, own in enumerate(vectors):
        squares = sorted(float(((own - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        each.append(sum(squares[: len(vectors) - liars - 2]))
    return each


# --- direct formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 12])
def test_the_median_of_each_coordinate(count: int) -> None:
    """Of an even number the mean of the two in the middle, where torch.median takes the lower."""
    items = replies(count)
    folded = fold(items, rule="median")
    expected = torch.quantile(stacked(items), 0.5, dim=0)
    torch.testing.assert_close(flat(folded.groups), expected, rtol=1e-6, atol=1e-7)
    assert {key: tensor.shape for key, tensor in folded.groups["params"].items()} == SHAPES
    assert folded.replies == count
    assert folded.weights == {}


@pytest.mark.parametrize(("count", "liars"), [(5, 0), (5, 1), (8, 2), (9, 3), (12, 5)])
def test_the_trimmed_mean_of_each_coordinate(count: int, liars: int) -> None:
    items = replies(count)
    ordered = stacked(items).sort(dim=0).values
    expected = ordered[liars : count - liars].mean(0)
    folded = fold(items, rule="trimmed-mean", liars=liars)
    torch.testing.assert_close(flat(folded.groups), expected, rtol=1e-5, atol=1e-6)
    vectors = stacked(items)
    within = (vectors >= ordered[liars]) & (vectors <= ordered[count - liars - 1])
    assert folded.figures == {
        "liars_bearable/all": liars,
        **{f"counted/silo-{k}": pytest.approx(float(row.double().mean())) for k, row in enumerate(within)},
    }


@pytest.mark.parametrize(("count", "liars"), [(3, 0), (5, 1), (8, 2), (9, 3)])
def test_krum_and_multi_krum_choose_by_score(count: int, liars: int) -> None:
    for seed in range(5):
        items = replies(count, seed)
        by_score = scores(stacked(items), liars)
        order = sorted(range(count), key=lambda k: by_score[k])
        one = fold(items, rule="krum", liars=liars)
        assert torch.equal(flat(one.groups), stacked(items)[order[0]])
        assert one.weights == {f"silo-{order[0]}": 1.0}
        several = fold(items, rule="multi-krum", liars=liars)
        chosen = sorted(order[: count - liars])
        expected = stacked(items)[chosen].mean(0)
        torch.testing.assert_close(flat(several.groups), expected, rtol=1e-5, atol=1e-6)
        assert several.weights == {f"silo-{k}": pytest.approx(1 / len(chosen)) for k in chosen}
        assert several.figures == {
            "liars_bearable/all": liars,
            **{f"counted/silo-{k}": float(k in chosen) for k in range(count)},
        }


@pytest.mark.parametrize("bound", [None, 0.5, 1e6])
@pytest.mark.parametrize("of", ["parameters", "update"])
def test_the_norm_bounded_mean(of: str, bound: float | None) -> None:
    items = replies(6, far={2: 9.0, 4: 0.3})
    sent = replies(1, seed=9)["silo-0"] if of == "parameters" else {}
    start = flat(sent) if sent else torch.zeros(())
    moves = stacked(items) - start
    norms = moves.norm(dim=1)
    most = bound or statistics.median(norms.tolist())
    factors = (most / norms).clamp(max=1.0)
    folded = fold(items, sent, rule="norm-bounded-mean", norm_bound=bound)
    expected = start + (moves * factors[:, None]).mean(0)
    torch.testing.assert_close(flat(folded.groups), expected, rtol=1e-5, atol=1e-5)
    counted = [folded.figures[f"counted/silo-{k}"] for k in range(6)]
    assert counted == pytest.approx(factors.tolist(), rel=1e-5)


RULES: list[dict[str, Any]] = [
    {"rule": "median"},
    {"rule": "trimmed-mean", "liars": 2},
    {"rule": "krum", "liars": 1},
    {"rule": "multi-krum", "liars": 1},
    {"rule": "norm-bounded-mean"},
]
by_rule = pytest.mark.parametrize("keys", RULES, ids=lambda keys: keys["rule"])


@by_rule
def test_updates_fold_as_parameters(keys: dict[str, Any]) -> None:
    items, sent = replies(6), replies(1, seed=9)["silo-0"]
    updates = {
        name: {"params": {key: sent["params"][key] - t for key, t in groups["params"].items()}}
        for name, groups in items.items()
    }
    params, update = fold(items, sent, **keys), fold(updates, **keys)
    torch.testing.assert_close(flat(params.groups), flat(sent) - flat(update.groups), rtol=1e-5, atol=1e-5)
    assert params.weights == update.weights


@by_rule
def test_blocks_of_any_size_give_the_same_bits(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than a block of all replies is in memory."""
    items, sent = replies(7), replies(1, seed=9)["silo-0"]
    whole, largest, original = fold(items, sent, **keys), [0], robust._blocks

    def watched(*arguments: Any) -> Any:
        for where, rows in original(*arguments):
            largest[0] = max(largest[0], (where.stop - where.start) * 7)
            yield where, rows

    monkeypatch.setattr(robust, "_blocks", watched)
    for block in (1, 50, 100, 1000):
        folded = fold(items, sent, block, **keys)
        assert torch.equal(flat(folded.groups), flat(whole.groups))
        assert folded.figures == pytest.approx(whole.figures)
        assert 0 < largest[0] <= max(block, 7)


@by_rule
def test_equal_replies_stay_as_they_are(keys: dict[str, Any]) -> None:
    (item,) = replies(1).values()
    folded = fold({f"silo-{k}": item for k in range(6)}, item, **keys)
    assert torch.equal(flat(folded.groups), flat(item))
    one = fold({"alone": item}, item, **keys)
    assert torch.equal(flat(one.groups), flat(item))
    one.groups["params"]["weight"].zero_()
    assert item["params"]["weight"].abs().sum() > 0, "no memory is shared with a reply"


@by_rule
def test_what_a_sparse_reply_leaves_out_is_zero(keys: dict[str, Any]) -> None:
    def sparse(seed: int) -> SparseTensor:
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(35, generator=generator)[:20]
        return SparseTensor(torch.Size((7, 5)), places, torch.randn(20, generator=generator))

    tensors = [sparse(seed) for seed in range(5)]
    dense = {f"{k}": {"params": {"w": tensor.dense()}} for k, tensor in enumerate(tensors)}
    mixed: Any = {f"{k}": {"params": {"w": t.dense() if k == 2 else t}} for k, t in enumerate(tensors)}
    for block in (30, robust.BLOCK):
        folded = fold(mixed, None, block, **keys).groups["params"]["w"]
        torch.testing.assert_close(folded, fold(dense, **keys).groups["params"]["w"])


@by_rule
def test_each_state_group_is_folded_by_itself(keys: dict[str, Any]) -> None:
    """One who lies in one group alone gains nothing by being honest in the other."""
    items, states = replies(7), replies(7, seed=1, far={3: 1e4})
    both = {name: {**items[name], "exp_avg": states[name]["params"]} for name in items}
    folded = fold(both, **keys)
    for group, of_group in (("params", items), ("exp_avg", states)):
        alone = fold(of_group, **keys).groups["params"]
        assert all(torch.equal(folded.groups[group][key], tensor) for key, tensor in alone.items())
    honest = torch.stack([flat(states[name]) for name in items if name != "silo-3"])
    assert flat({"params": folded.groups["exp_avg"]}).abs().max() <= 1.01 * honest.abs().max()


# --- breakdown points -------------------------------------------------------------------------------

#: What liars send in place of honest vectors of size about 1: (index of the liar, honest vectors) → vector.
LIES: dict[str, Callable[[int, torch.Tensor], torch.Tensor]] = {
    "huge": lambda liar, honest: torch.full_like(honest[0], 1e30 * (-1) ** liar),
    "all on one side": lambda liar, honest: torch.full_like(honest[0], -1e6 - liar),
    "equal, reversed": lambda liar, honest: -honest.mean(0),
    "just beyond": lambda liar, honest: honest.max(0).values + 1e-3 * liar,
    "zero": lambda liar, honest: torch.zeros_like(honest[0]),
}
by_lie = pytest.mark.parametrize("lie", LIES.values(), ids=LIES)


def with_liars(count: int, liars: int, lie: Any, seed: int = 0) -> tuple[dict[str, Groups], torch.Tensor]:
    """Return replies of a single tensor, the first of which lie, and the honest ones."""
    honest = torch.randn(count - liars, 40, generator=torch.Generator().manual_seed(seed)) + 1.0
    vectors = [*(lie(liar, honest) for liar in range(liars)), *honest]
    return {f"{k}": {"params": {"w": vector}} for k, vector in enumerate(vectors)}, honest.double()


@by_lie
@pytest.mark.parametrize(("count", "liars"), [(3, 1), (4, 1), (7, 3), (8, 3)])
def test_median_and_trimmed_mean_stay_among_the_honest(count: int, liars: int, lie: Any) -> None:
    items, honest = with_liars(count, liars, lie)
    for keys in ({"rule": "median"}, {"rule": "trimmed-mean", "liars": liars}):
        result = flat(fold(items, **keys).groups)
        assert (result >= honest.min(0).values - 1e-6).all()
        assert (result <= honest.max(0).values + 1e-6).all()


def test_half_of_the_replies_break_the_median_and_one_breaks_the_mean() -> None:
    """The bounds above are no accident of what was sent."""
    items, honest = with_liars(6, 3, LIES["all on one side"])
    assert (flat(fold(items, rule="median").groups) < honest.min(0).values - 1e5).all()
    items, honest = with_liars(6, 1, LIES["all on one side"])
    assert (flat(fold(items, rule="trimmed-mean", liars=0).groups) < honest.min(0).values - 1e5).all()


@by_lie
@pytest.mark.parametrize(("count", "liars"), [(5, 1), (7, 2), (10, 3)])
def test_krum_is_no_farther_from_an_honest_reply_than_they_are_from_one_another(
    count: int, liars: int, lie: Any
) -> None:
    for seed in range(5):
        items, honest = with_liars(count, liars, lie, seed)
        folded = fold(items, rule="krum", liars=liars)
        bound = min(
            sum(sorted(float(((one - other) ** 2).sum()) for other in honest)[1 : count - liars - 1])
            for one in honest
        )
        distance = min(float((flat(folded.groups) - one).norm()) for one in honest)
        assert distance <= 1e-6 + bound**0.5


@pytest.mark.parametrize("name", ["huge", "all on one side"])
def test_krum_picks_honest_replies_and_too_many_liars_win(name: str) -> None:
    items, _ = with_liars(7, 2, LIES[name])
    (chosen,) = fold(items, rule="krum", liars=2).weights
    assert int(chosen) >= 2
    assert all(int(each) >= 2 for each in fold(items, rule="multi-krum", liars=2).weights)
    # Four who agree, where two were reckoned with.
    items, _ = with_liars(7, 4, lambda liar, honest: torch.full_like(honest[0], 50.0))
    (chosen,) = fold(items, rule="krum", liars=2).weights
    assert int(chosen) < 4


@by_lie
@pytest.mark.parametrize(("count", "liars"), [(3, 1), (7, 3), (8, 3)])
def test_liars_move_the_norm_bounded_mean_by_their_share(count: int, liars: int, lie: Any) -> None:
    items, honest = with_liars(count, liars, lie)
    norms = honest.norm(dim=1)
    # With a bound that is given, against the same round with honest replies in the liars' place.
    given = fold(items, rule="norm-bounded-mean", norm_bound=3.0)
    other = {**items, **{f"{k}": {"params": {"w": honest[0].float()}} for k in range(liars)}}
    without = fold(other, rule="norm-bounded-mean", norm_bound=3.0)
    moved = (flat(given.groups) - flat(without.groups)).norm()
    assert moved <= 2 * liars * 3.0 / count + 1e-5
    # With the median as the bound, no farther than honest replies themselves would go.
    assert flat(fold(items, rule="norm-bounded-mean").groups).norm() <= norms.max() + 1e-5
    assert max(stacked(items).norm(dim=1)) >= norms.max() or moved < norms.max()


@pytest.mark.parametrize(
    ("keys", "bears"),
    [
        ({"rule": "median"}, [0, 0, 1, 1, 2, 2, 3]),
        ({"rule": "trimmed-mean", "liars": 2}, [0, 0, 1, 1, 2, 2, 2]),
        ({"rule": "krum", "liars": 2}, [0, 0, 0, 0, 1, 1, 2]),
        ({"rule": "norm-bounded-mean"}, [0, 0, 1, 1, 2, 2, 3]),
    ],
    ids=lambda keys: keys["rule"] if isinstance(keys, dict) else "",
)
def test_with_missing_replies_a_round_bears_fewer_liars(keys: dict[str, Any], bears: list[int]) -> None:
    items = replies(7)
    for count, bearable in enumerate(bears, 1):
        folded = fold(dict(itertools.islice(items.items(), count)), **keys)
        assert folded.figures["liars_bearable/all"] == bearable
        assert flat(folded.groups).isfinite().all()


# --- runs -------------------------------------------------------------------------------------------

UNIFORM = "strategy.weighting=uniform"
MEDIAN = "strategy.fold.rule=median"


def replies_of(run_dir: Path, server_round: int = 1) -> list[Groups]:
    return [load_groups(file) for file in sorted(run_dir.glob(f"silos/*/round-{server_round:06d}/reply.*"))]


def median_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.quantile(torch.stack(tensors).double(), 0.5, dim=0).float()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=robust", "link.uplink_payload=update"],
        ["strategy=local-adam", UNIFORM],
        ["strategy=scaffold"],
        ["strategy=streaming-diloco", "strategy.fragments=2", "outer=fedavg", "rounds=2"],
        ["strategy=topk", UNIFORM, "strategy.sparsity=0.5", "link=dense"],
        ["strategy=fedper", "strategy.key_blocks=[ln_f]"],
    ],
    ids=" ".join,
)
def test_strategies_fold_what_silos_sent_by_the_median(
    overrides: list[str], run_small: Run, tmp_path: Path
) -> None:
    run_small("rounds=1", *overrides, MEDIAN, "cohort=3", "checkpoint.keep=3")
    run_dir = tmp_path / "run"
    store = CheckpointStore(run_dir / "checkpoints")
    before, after, sent = store.load(0).load_params(), store.load(1), replies_of(run_dir)
    assert len(sent) == 3
    params = after.load_params()
    assert sent[0]["params"]
    for key in sent[0]["params"]:
        expected = median_of([groups["params"][key] for groups in sent])
        if "link.uplink_payload=update" in overrides:
            expected = before[key] - expected
        torch.testing.assert_close(params[key], expected, rtol=1e-5, atol=1e-6, msg=key)
    for group in set(sent[0]) - {"params"}:
        found = after.load_kept()[CONTROL] if group == CONTROL else after.load_averaged(group)
        for key, tensor in found.items():
            expected = median_of([groups[group][key] for groups in sent])
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7, msg=f"{group}/{key}")
    events = list(read_events(run_dir / "events.jsonl"))
    figures = next(event.values for event in events if isinstance(event, Diagnostics))
    assert {"counted/alpha", "counted/beta", "counted/gamma"} <= set(figures)
    assert figures["liars_bearable/all"] == 1.0
    # These go by the silos' shares of a mean, and there is none.
    assert next(event.silo_cosine for event in events if isinstance(event, RoundFinished)) is None


def lie(monkeypatch: pytest.MonkeyPatch, silo: str, factor: float) -> None:
    """Let a silo send its update times ``factor``."""
    from photon.silo import train

    original = train.encoded

    def encoded(leaves, start, received, feedback, request, config):
        if request.silo == silo:
            params = {
                key: torch.lerp(start.reference[key], tensor, factor)
                for key, tensor in leaves["params"].items()
            }
            leaves = {**leaves, "params": params}
        return original(leaves, start, received, feedback, request, config)

    monkeypatch.setattr(train, "encoded", encoded)


def test_one_liar_of_three_ruins_the_mean_and_not_the_median(
    run_small: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unjudged = ("federation.admission.norm_factor=null", "federation.guard.action=off")
    chosen = ("cohort=3", "rounds=2", "optimizer.lr=0.03", UNIFORM, *unjudged)
    honest = run_small(*chosen, name="honest")["perplexity"]
    lie(monkeypatch, "beta", -30.0)
    mean = run_small(*chosen, name="mean")["perplexity"]
    median = run_small(*chosen, MEDIAN, name="median")["perplexity"]
    assert mean["final"] > 10 * honest["initial"]
    assert median["final"] < 1.3 * honest["final"]
    events = read_events(tmp_path / "median" / "events.jsonl")
    figures = [event.values for event in events if isinstance(event, Diagnostics)]
    counted = [[of[f"counted/{silo}"] for silo in ("alpha", "beta", "gamma")] for of in figures]
    assert len(counted) == 2
    assert all(beta == min(alpha, beta, gamma) for alpha, beta, gamma in counted)


def test_a_round_with_a_missing_reply_goes_on(
    run_small: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from photon.silo import train

    original = train.fit

    def fails(request: Any, *arguments: Any) -> Any:
        if (request.silo, request.round) == ("beta", 2):
            raise RuntimeError("out of memory")
        return original(request, *arguments)

    monkeypatch.setattr(train, "fit", fails)
    run_small("cohort=3", "rounds=3", "strategy=robust", "strategy.fold.liars=1", "federation.quorum=2")
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert [event.silo for event in events if isinstance(event, SiloFailed)] == ["beta"]
    borne = [event.values["liars_bearable/all"] for event in events if isinstance(event, Diagnostics)]
    assert borne == [1.0, 0.0, 1.0]


# --- what is refused --------------------------------------------------------------------------------

PHOTON = "photon.Photon"
KRUM = {"rule": "krum", "liars": 1}
TOPK = {"_target_": "photon.link.codecs.TopK"}
TREE = {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"], "c": ["c1", "c2", "c3"]}


def configured(kind: str, fold: dict[str, Any], **changed: Any) -> RunConfig:
    """Return a configuration that is not checked: a strategy, its arguments and keys by their sections."""
    base = composed("strategy=robust", "cohort=null").model_dump(by_alias=True)
    arguments = {"weighting": "uniform"} if kind == PHOTON else {}
    arguments |= changed.pop("strategy", {})
    sections = {
        key: {**base[key], **value} if isinstance(value, dict) else value for key, value in changed.items()
    }
    component = {"_target_": f"photon.strategy.{kind}", "fold": fold, **arguments}
    return RunConfig.model_validate({**base, **sections, "strategy": component})


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "weights": (
        PHOTON,
        {"rule": "median"},
        {"strategy": {"weighting": "tokens"}},
        "weighting=tokens: fold.rule=median counts silos alike",
    ),
    "no liars": (PHOTON, {"rule": "krum"}, {}, "strategy.fold.liars: not set; krum needs to know how many"),
    "mean": (PHOTON, {"liars": 1}, {}, "strategy.fold.liars=1: rule=mean bears none"),
    "bound": (PHOTON, {"rule": "median", "norm_bound": 1.0}, {}, "rule=median bounds no norms"),
    "typo": (PHOTON, {"rule": "medan"}, {}, "strategy.fold.rule='medan'"),
    "key": (PHOTON, {"liers": 1}, {}, "strategy.fold.liers: unknown key; did you mean 'liars'"),
    "cohort": (PHOTON, KRUM, {"cohort": 4}, "fold.rule=krum needs a cohort of 5, and it has 4; lower"),
    "expected silos": (
        PHOTON,
        {"rule": "median", "liars": 2},
        {"federation": {"silos": 4}},
        "fold.rule=median needs a cohort of 5, and it has 4",
    ),
    "secure": (
        PHOTON,
        {"rule": "median"},
        {"privacy": {"secure_aggregation": True}, "link": {"uplink_payload": "update"}},
        "fold.rule=median looks at replies one by one, which privacy.secure_aggregation hides",
    ),
    "second moments": (
        PHOTON,
        {**KRUM, "rule": "multi-krum"},
        {"strategy": {"local_state": "sync"}},
        "multi-krum keeps no second moment of a liar's from being negative",
    ),
    "codec": (PHOTON, {"rule": "median"}, {"link": {"uplink": [TOPK]}}, "under the codec topk most silos"),
    "named codec": (
        PHOTON,
        {"rule": "trimmed-mean", "liars": 1},
        {"link": {"uplink_by_name": [{"names": "mlp", "codecs": [TOPK]}]}},
        "under the codec topk most silos",
    ),
    "vocabularies": (
        "worldlm.WorldLM",
        {"rule": "median"},
        {"strategy": {"embeddings": "restricted"}},
        "embeddings=restricted: fold.rule=median compares whole replies",
    ),
    "counts": (
        "worldlm.WorldLM",
        {"rule": "median"},
        {"strategy": {"backbone_weights": "leaves"}},
        "backbone_weights=leaves: fold.rule=median counts children alike",
    ),
    "sums": ("sums.Sums", {"rule": "median"}, {}, "strategy.fold: unknown key"),
    "tree": (
        PHOTON,
        {"rule": "trimmed-mean", "liars": 1},
        {"federation": {"tree": TREE}},
        "b: strategy.fold.liars: needs 3 participants in a round, and there are 2",
    ),
}


@pytest.mark.parametrize(("kind", "fold", "changed", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused(
    kind: str, fold: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(PhotonError, match=re.escape(message)) as refused:
        preflight(configured(kind, fold, **changed))
    assert "\n" not in str(refused.value)


def test_too_few_silos_are_noticed_before_the_first_round(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config("strategy=robust", "strategy.fold.liars=2", "cohort=null")
    with pytest.raises(PhotonError, match="needs 5 participants in a round, and there are 3"):
        run_inprocess(prepare_run(config), answer, resume=False)
    assert not list((tmp_path / "run").glob("checkpoints/round-*"))


def test_a_node_of_a_tree_with_few_children_may_have_another_fold() -> None:
    two = {"children": TREE["b"], "strategy": {"fold": {"rule": "mean"}}}
    tree = {"federation": {"tree": {**TREE, "b": two}}}
    preflight(configured(PHOTON, {"rule": "trimmed-mean", "liars": 1}, **tree))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("fedprox.FedProx", {"weighting": "uniform"}),
        ("flash.Flash", {"weighting": "uniform"}),
        ("sparsyfed.SparsyFed", {"weighting": "uniform"}),
        ("zerofl.ZeroFL", {"weighting": "uniform"}),
        ("worldlm.WorldLM", {}),
    ],
)
def test_strategies_that_take_means_take_a_fold(kind: str, arguments: dict[str, Any]) -> None:
    config = preflight(configured(kind, {"rule": "median", "liars": 1}, strategy=arguments, cohort=4))
    strategy = strategy_of(config)
    assert (strategy.holds_replies, strategy.least_cohort, strategy.folds_mean) == (True, 3, False)


def test_krum_takes_sparse_updates_and_the_mean_promises_what_it_did() -> None:
    krum = strategy_of(preflight(configured(PHOTON, KRUM, link={"uplink": [TOPK]}, cohort=5)))
    assert (krum.holds_replies, krum.least_cohort, krum.folds_mean) == (True, 5, False)
    mean = strategy_of(preflight(configured(PHOTON, {}, cohort=1)))
    assert (mean.holds_replies, mean.least_cohort, mean.folds_mean) == (False, 1, True)
