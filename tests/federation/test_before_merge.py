"""What a silo brings: the loss of its own model before the last merge that it is part of."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from photon.config.schema import RunConfig
from photon.data.prepared import PreparedData
from photon.federation.cohort import LastTurns, draw_cohort
from photon.link.messages import SiloInfo, TrainRequest
from photon.models.build import build_model
from photon.silo.evaluate import before_merge
from photon.silo.policy import NO_POLICY
from photon.silo.site import SiloSite
from photon.state.checkpoint import LedgerEntry, ServerState
from photon.state.silo import SiloStore
from photon.state.tensors import load_groups
from photon.strategy.base import strategy_of
from photon.telemetry.events import Evaluated, RoundStarted, SiloEvaluation, SiloFinished
from photon.telemetry.log import read_events
from photon.training.groups import read_params, write_params


def brought(run_dir: Path) -> dict[str, list[tuple[int, SiloEvaluation]]]:
    """Return in which rounds silos have told what."""
    found: dict[str, list[tuple[int, SiloEvaluation]]] = {}
    for event in read_events(run_dir / "events.jsonl"):
        if isinstance(event, SiloFinished):
            for name, told in event.before_merge.items():
                found.setdefault(name, []).append((event.round, told))
    return found


def loss_by_hand(config: RunConfig, params: dict[str, torch.Tensor], silo: str) -> float:
    """Return the mean loss on a silo's validation windows, window by window."""
    data = PreparedData.open(Path(str(config.data.path)))
    model = build_model(config.model, data.manifest.vocab_size, seed=0)
    write_params(model, params)
    model.eval()
    windows = data.windows(silo, "validation")
    count = min(int(config.evaluation.sequences or len(windows)), len(windows))
    losses = []
    with torch.no_grad():
        for index in range(count):
            tokens = torch.tensor(windows[index * len(windows) // count].astype("int64"))[None]
            logits = model(input_ids=tokens[:, :-1]).logits
            losses.append(nn.functional.cross_entropy(logits[0], tokens[0, 1:]).double())
    return float(torch.stack(losses).mean())


def test_it_is_the_loss_of_what_the_silo_trained(
    run_small: Callable[..., dict[str, Any]], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run_small()
    found, config = brought(tmp_path / "run"), small_config()
    assert sorted(found) == ["alpha", "beta", "gamma"]
    run_id = next(e for e in read_events(tmp_path / "run" / "events.jsonl")).run_id  # type: ignore[attr-defined]
    for silo, ((server_round, told),) in found.items():
        assert server_round == 3
        state = SiloStore(tmp_path / "run" / "silos" / silo, keep=3).load(run_id, 3)
        assert state is not None
        file = SiloStore(tmp_path / "run" / "silos" / silo, keep=3).reply_file(3)
        reply = {name.partition("/")[0]: tensor for name, tensor in load_groups(file)["params"].items()}
        assert told["loss"] == pytest.approx(loss_by_hand(config, reply, silo), abs=1e-6)


def test_of_one_silo_alone_it_is_what_the_merge_gives(
    run_small: Callable[..., dict[str, Any]], lone_corpus: Path, tmp_path: Path
) -> None:
    run_small("cohort=1", data=lone_corpus)
    events = read_events(tmp_path / "run" / "events.jsonl")
    last = [event for event in events if isinstance(event, Evaluated)][-1]
    ((_, told),) = brought(tmp_path / "run")["alone"]
    assert told == pytest.approx(last.per_silo["alone"], rel=1e-6)


def test_each_silo_tells_once_in_its_last_round(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("cohort=1", "rounds=6")
    cohorts = [
        (event.round, name)
        for event in read_events(tmp_path / "run" / "events.jsonl")
        if isinstance(event, RoundStarted)
        for name in event.cohort
    ]
    last = {name: number for number, name in cohorts}
    assert {name: [number for number, _ in told] for name, told in brought(tmp_path / "run").items()} == {
        name: [number] for name, number in last.items()
    }
    assert len(set(last.values())) > 1, "cohorts of one: silos have their last rounds one by one"


def test_who_has_its_last_turn_is_found_as_by_drawing_all_later_rounds(
    small_config: Callable[..., RunConfig],
) -> None:
    """Though silos come and go, and some are in quarantine for a while."""
    rounds, rng = 12, random.Random(0)
    config = small_config("cohort=2", f"rounds={rounds}")
    strategy = strategy_of(config)
    everybody = [SiloInfo.model_construct(name=name) for name in "abcdefg"]
    turns, ledger, seen = LastTurns(config, strategy), dict[str, LedgerEntry](), 0
    for server_round in range(1, rounds + 1):
        silos = [silo for silo in everybody if rng.random() > 0.1] if rng.random() < 0.4 else everybody
        if rng.random() < 0.3:
            until = server_round + rng.randint(0, 4)
            ledger = {**ledger, rng.choice("abcdefg"): LedgerEntry(quarantined_until=until)}
        cohort = draw_cohort(config, strategy, silos, server_round, ledger)
        later = {
            one.name
            for number in range(server_round + 1, rounds + 1)
            for one in draw_cohort(config, strategy, silos, number, ledger)
        }
        before = ServerState.model_construct(round=server_round - 1, ledger=ledger)
        found = turns.of(silos, before, rounds, cohort)
        assert found == {one.name for one in cohort} - later
        seen += len(found)
    assert seen >= 2


def test_the_run_is_the_same_without(run_small: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    told = run_small("rounds=2", name="told")
    silent = run_small("rounds=2", "evaluation.before_merge=false", name="silent")
    assert brought(tmp_path / "told")
    assert not brought(tmp_path / "silent")
    assert told["weights_sha256"] == silent["weights_sha256"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["privacy=gaussian", "privacy.noise_multiplier=0.5"],
        ["strategy=centralized", "cohort=1"],
    ],
    ids=["noise", "pooled"],
)
def test_where_nothing_is_told(
    overrides: list[str], run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("rounds=1", *overrides)
    assert brought(tmp_path / "run") == {}


def test_a_policy_that_keeps_validation_figures_keeps_this_one(
    small_config: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    config = small_config()
    vocab_size = PreparedData.open(corpus).manifest.vocab_size
    request = TrainRequest(
        run_id="run",
        model_id="model",
        round=1,
        silo="alpha",
        members=["alpha"],
        global_step=0,
        steps=1,
        batch_size=1,
        last_round=0,
        position=0,
        cohort=1,
        before_merge=True,
    )

    def told(**policy: Any) -> dict[str, Any]:
        own = read_params(build_model(config.model, vocab_size, seed=0))
        site = SiloSite(corpus, tmp_path, None, NO_POLICY.model_copy(update=policy), config.privacy)
        return dict(before_merge(request, own, None, site, config))

    assert sorted(told()) == ["alpha"]
    assert told(share_validation=False) == {}
    assert told(min_round_windows=9) == {}, "of eight windows"


def test_silos_within_a_tree_tell_through_their_federation(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("federation.tree={north: [alpha, beta], south: [gamma]}", "rounds=2", "cohort=null")
    found = brought(tmp_path / "run")
    assert {name: [number for number, _ in told] for name, told in found.items()} == {
        "alpha": [2],
        "beta": [2],
        "gamma": [2],
    }


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=sparsyfed"],
        ["strategy=lordo"],
        ["strategy=fedper"],
        ["strategy=local-adam"],
        ["privacy=secure", "link.uplink_payload=update", "strategy.weighting=uniform"],
        ["link=topk-100x"],
    ],
    ids=lambda value: value[0],
)
def test_whatever_the_strategy_silos_tell(
    overrides: list[str], run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("rounds=2", *overrides)
    found = brought(tmp_path / "run")
    assert sorted(found) == ["alpha", "beta", "gamma"]
    assert all(0 < told["loss"] < 10 for ((_, told),) in found.values())
