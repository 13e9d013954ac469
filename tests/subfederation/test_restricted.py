"""Restricted vocabularies in whole runs: whose rows are trained, how they are averaged, and what stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.federation.admission import Asked, problem_with
from photon.models.vocabulary import pack_vocabulary, unpack_vocabulary
from photon.state.checkpoint import Checkpoint, CheckpointStore
from photon.state.silo import SiloStore
from photon.strategy.contract import Contract, Leaving
from photon.telemetry.events import Diagnostics, RoundStarted, SiloFinished
from photon.telemetry.log import read_events
from photon.training.loop import LocalTrainer
from tests.conftest import write_corpus
from tests.samples import train_report, train_request
from tests.subfederation.test_member import (
    TREE,
    configuring,
    killed_and_resumed,
    params_of,
    per_node,
    training,
)

EMBEDDING = "transformer.wte.weight"
RESTRICTED = ["strategy=worldlm", "strategy.embeddings=restricted"]
#: FedAvg: no key layers, and nothing across.
SHARED = ["strategy=fedper", "strategy.key_fraction=0", "strategy.embeddings=restricted"]
BASE = [
    "cohort=null",
    "model.architecture.n_layer=2",
    "rounds=2",
    "local_steps=2",
    "optimizer.weight_decay=0.1",
    "schedule=constant",
    "checkpoint.keep=9",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(
        tmp_path_factory.mktemp("four"), {"a": "abcdefgh", "b": "abcdefij", "c": "qrstuvwx", "d": "qrstuvyz"}
    )


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    return configuring(BASE, data, tmp_path)


@pytest.fixture
def train(config: Callable[..., RunConfig]) -> Callable[..., Path]:
    return training(config)


def rows_of(data: Path, *silos: str, rows: int = 320) -> torch.Tensor:
    """Return which rows are of tokens in silos' training windows, found in another way than Photon does."""
    found = torch.zeros(rows, dtype=torch.bool)
    for silo in silos:
        windows = np.load(data / "silos" / silo / "train.npy").astype(np.int64)
        found[torch.from_numpy(np.unique(windows))] = True
    return found


def embedding(run_dir: Path, server_round: int) -> torch.Tensor:
    return at(run_dir, server_round).load_params()[EMBEDDING]


def at(run_dir: Path, server_round: int) -> Checkpoint:
    return CheckpointStore(run_dir / "checkpoints").load(server_round)


def trained_by(folder: Path, checkpoint: Checkpoint, server_round: int) -> torch.Tensor:
    reply = SiloStore(folder, keep=9).reply(checkpoint.state.run_id, checkpoint.state.model_id, server_round)
    assert reply is not None
    return reply[1]["params"][EMBEDDING]


def test_a_row_is_averaged_over_the_silos_that_have_it(train: Callable[..., Path], data: Path) -> None:
    """Σ_c w_c Δ_c [c has row] / Σ_c w_c [c has row], with weights of their own."""
    run_dir = train("run", *SHARED, "strategy.backbone_weights=samples", "rounds=1")
    begin, before, after = at(run_dir, 0), embedding(run_dir, 0), embedding(run_dir, 1)
    total = torch.zeros(len(before), dtype=torch.float64)
    change = torch.zeros(before.shape, dtype=torch.float64)
    for silo in "abcd":
        has = rows_of(data, silo)
        sent = trained_by(run_dir / "silos" / silo, begin, 1)
        assert torch.equal(sent[~has], before[~has]), "decay and moments do not move other rows"
        assert not torch.equal(sent[has], before[has])
        total += has
        change += has[:, None] * (sent - before)
    assert set(total.tolist()) >= {0.0, 1.0, 2.0, 4.0}, "the corpus has rows of all kinds"
    expected = before + torch.where(total[:, None] > 0, change / total[:, None], 0.0)
    torch.testing.assert_close(after.double(), expected, rtol=0, atol=1e-7)
    assert torch.equal(after[total == 0], before[total == 0])


def test_a_row_that_the_cohort_lacks_stays_whatever_the_outer_optimizer_keeps(
    train: Callable[..., Path], data: Path
) -> None:
    run_dir = train("run", *SHARED, "outer=diloco", "+outer.weight_decay=0.1", "cohort=1", "rounds=5")
    cohorts = [e.cohort for e in read_events(run_dir / "events.jsonl") if isinstance(e, RoundStarted)]
    moved = 0
    for server_round, cohort in enumerate(cohorts, start=1):
        has = rows_of(data, *cohort)
        before, after = embedding(run_dir, server_round - 1), embedding(run_dir, server_round)
        assert torch.equal(after[~has], before[~has])
        assert not torch.equal(after[has], before[has])
        momentum = at(run_dir, server_round).load_outer()["momentum_buffer"][EMBEDDING]
        moved += int((momentum[~has] != 0).any())
    assert moved, "there was momentum that would have moved rows"


def test_a_rounding_link_moves_no_row_that_nobody_has(train: Callable[..., Path], data: Path) -> None:
    run_dir = train("run", *SHARED, "link=bf16", "outer=diloco")
    nobody = ~rows_of(data, *"abcd")
    momentum = at(run_dir, 2).load_outer()["momentum_buffer"][EMBEDDING]
    assert torch.equal(embedding(run_dir, 2)[nobody], embedding(run_dir, 0)[nobody])
    assert momentum[~nobody].any()
    assert not momentum[nobody].any(), "a pseudo-gradient of zero"


@pytest.mark.parametrize("strategy", ["worldlm", pytest.param("fedper", marks=pytest.mark.slow)])
def test_silos_with_every_token_train_as_with_whole_embeddings(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, data: Path, strategy: str
) -> None:
    size = PreparedData.open(data).manifest.vocab_size
    overrides = [TREE, f"strategy={strategy}", f"model.vocab_size={size}", "federation.inner_rounds=2"]
    whole = train("whole", *overrides)
    ones = np.ones(size, dtype=np.int64)
    monkeypatch.setattr(PreparedData, "unigram", lambda *_: ones)
    restricted = train("restricted", *overrides, "strategy.embeddings=restricted")
    for name, tensor in params_of(whole).items():
        assert torch.equal(params_of(restricted)[name], tensor), name
    assert per_node(restricted) == per_node(whole)


def test_a_federation_has_the_rows_of_its_children(train: Callable[..., Path], data: Path) -> None:
    run_dir = train("run", TREE, *RESTRICTED)
    north, south = rows_of(data, "a", "b"), rows_of(data, "c", "d")
    figures = [e.values for e in read_events(run_dir / "events.jsonl") if isinstance(e, Diagnostics)]
    assert figures[-1]["vocabulary/north"] == int(north.sum())
    assert figures[-1]["vocabulary/south"] == int(south.sum())
    before, after = embedding(run_dir, 1), embedding(run_dir, 2)
    below = {name: embedding(run_dir / "silos" / name, 2) for name in ("north", "south")}
    alone = {"north": north & ~south, "south": south & ~north}
    for name, rows in alone.items():
        assert rows.any()
        assert torch.equal(after[rows], below[name][rows]), "its mean is that of the only one that has it"
    both = north & south
    torch.testing.assert_close(
        after[both], (below["north"][both] + below["south"][both]) / 2, rtol=0, atol=1e-7
    )
    nobody = ~(north | south)
    assert torch.equal(after[nobody], before[nobody])


def test_the_rows_of_a_federation_are_those_of_all_its_rounds_in_an_order(
    train: Callable[..., Path], data: Path
) -> None:
    tree = "federation.tree={north: {children: [a, b, c], cohort: 1, rounds: 2}, south: [d]}"
    run_dir = train("run", tree, *RESTRICTED)
    inside = read_events(run_dir / "silos" / "north" / "events.jsonl")
    cohorts = [e.cohort[0] for e in inside if isinstance(e, RoundStarted)]
    assert len(cohorts) == 4
    assert cohorts[0] != cohorts[1] or cohorts[2] != cohorts[3], "the seed draws different members"
    figures = [e.values for e in read_events(run_dir / "events.jsonl") if isinstance(e, Diagnostics)]
    told = [values["vocabulary/north"] for values in figures if "vocabulary/north" in values]
    assert told == [int(rows_of(data, *cohorts[:2]).sum()), int(rows_of(data, *cohorts[2:]).sum())]


@pytest.mark.few(1)
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_text_of_a_federations_own_counts(train: Callable[..., Path], data: Path, schedule: str) -> None:
    tree = "federation.tree={north: {children: [a], data: c}, south: [b]}"
    run_dir = train("run", tree, *RESTRICTED, f"strategy.schedule={schedule}", "rounds=1")
    told = at(run_dir / "silos" / "north", 1).state.vocabulary
    assert told is not None
    assert torch.equal(unpack_vocabulary(told, 320), rows_of(data, "a", "c"))
    only = rows_of(data, "c") & ~rows_of(data, "a", "b")
    assert only.any()
    assert not torch.equal(embedding(run_dir, 1)[only], embedding(run_dir, 0)[only])


@pytest.mark.slow
def test_a_killed_tree_goes_on_as_if_nothing_had_been(
    config: Callable[..., RunConfig], train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [TREE, *RESTRICTED, "federation.inner_rounds=2", "outer=diloco"]
    whole = train("whole", *overrides)
    for calls in (3, 14):
        killed = config(f"killed-{calls}", *overrides)
        folder = killed_and_resumed(killed, monkeypatch, LocalTrainer, "train", calls)
        for name, tensor in params_of(whole).items():
            assert torch.equal(params_of(folder)[name], tensor), name
        assert per_node(folder) == per_node(whole)


def test_the_vocabulary_is_what_travels_beside_and_it_is_counted(train: Callable[..., Path]) -> None:
    def finished(run_dir: Path) -> list[SiloFinished]:
        return [e for e in read_events(run_dir / "events.jsonl") if isinstance(e, SiloFinished)]

    whole = finished(train("whole", "strategy=worldlm", "rounds=1"))
    restricted = finished(train("restricted", *RESTRICTED, "rounds=1"))
    packed = len(pack_vocabulary(torch.ones(320, dtype=torch.bool)))
    assert packed == 56
    for one, other in zip(restricted, whole, strict=True):
        assert one.group_bytes_up == other.group_bytes_up
        # Numbers of the report have more or fewer digits.
        assert abs(one.bytes_up - other.bytes_up - packed) < 40
        assert one.group_bytes_down == other.group_bytes_down


def test_own_models_are_measured_also_on_tokens_that_they_have_never_seen(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PreparedData.windows

    def swapped(self: Any, silo: str, split: Any) -> np.ndarray:
        return original(self, {"a": "c"}.get(silo, silo) if split == "validation" else silo, split)

    monkeypatch.setattr(PreparedData, "windows", swapped)
    found = per_node(train("run", *RESTRICTED, "rounds=1"))
    assert np.isfinite(list(found.values())).all()
    assert found["a"] > found["b"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy=secure", "link.uplink_payload=update"], "without strategy.embeddings=restricted"),
        (["privacy=gaussian", "privacy.clip_norm=1", "privacy.noise_multiplier=1"], "no noise hides"),
        (["strategy.key_fraction=1"], "key_fraction=1: nothing is shared"),
        (
            ["federation.tree={north: {children: [a], privacy: {clip_norm: 1, noise_multiplier: 1}}}"],
            "north: privacy.noise_multiplier: with strategy.embeddings=restricted",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_starts(
    config: Callable[..., RunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        config("run", *RESTRICTED, *overrides)


def test_embeddings_cannot_be_key_layers_and_restricted(train: Callable[..., Path]) -> None:
    with pytest.raises(PhotonError, match=r"transformer\.wte\.weight would be a key layer"):
        train("run", *RESTRICTED, "strategy.key_blocks=['wte']", "rounds=1")


def test_a_reply_must_tell_its_vocabulary() -> None:
    request, report = train_request(), train_report()
    params = {"params": {"w": torch.ones(8, 2)}}
    shapes = {"w": torch.Size((8, 2))}
    contract = Contract({"params": shapes}, {"params": Leaving("parameters", shapes)})

    def problem(vocabulary: str | None, rows: int | None = 8) -> str | None:
        told = report.model_copy(update={"vocabulary": vocabulary})
        asked = Asked(request, contract, None, {}, None, 16, 0, local_steps=2)
        return problem_with(told, params, asked, rows=rows)

    assert problem(pack_vocabulary(torch.ones(8, dtype=torch.bool))) is None
    assert problem(None) == "it tells no vocabulary; set strategy.embeddings alike at every node"
    unasked = problem(pack_vocabulary(torch.ones(8, dtype=torch.bool)), rows=None)
    assert unasked is not None
    assert "a vocabulary that was not asked for" in unasked
    assert problem(None, rows=None) is None
    assert problem("AAAA") == "its vocabulary has 3 bytes, 8 rows need 1"
