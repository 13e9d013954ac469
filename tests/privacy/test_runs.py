"""Clipping and noise in whole runs: what leaves a silo, what the summary says of it, what is refused."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.client_app import answer
from photon.config.schema import RunConfig
from photon.engine.inprocess import InProcessGrid, run_inprocess
from photon.errors import PhotonError
from photon.federation.run import prepare_run, run_federation
from photon.privacy.accountant import epsilon
from photon.state.checkpoint import CheckpointStore
from photon.state.tensors import load_groups
from photon.telemetry.events import Diagnostics, Event, Notice, RoundStarted, SiloFailed, SiloFinished
from photon.telemetry.log import read_events
from photon.telemetry.summary import build_summary, privacy_figures

Run = Callable[..., dict[str, Any]]
NOISY = ["privacy=gaussian", "privacy.clip_norm=0.01", "privacy.noise_multiplier=2"]


def events_of(run_dir: Path, kind: type[Event]) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


def reply_of(run_dir: Path, silo: str, server_round: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "silos" / silo / f"round-{server_round:06d}"
    return load_groups(folder / "reply.safetensors")["params"]


def update_of(run_dir: Path, silo: str, server_round: int) -> torch.Tensor:
    """Return what the reply says that changed since the parameters that were sent."""
    sent = CheckpointStore(run_dir / "checkpoints").load(server_round - 1).load_params()
    reply = reply_of(run_dir, silo, server_round)
    return torch.cat([(sent[name] - reply[name]).flatten().double() for name in sorted(sent)])


def test_a_bound_that_is_never_reached_changes_nothing(run_small: Run) -> None:
    plain = run_small("cohort=2", "rounds=2", name="plain")
    bounded = run_small("cohort=2", "rounds=2", "privacy.clip_norm=1e9", name="bounded")
    assert bounded["weights_sha256"] == plain["weights_sha256"]
    assert plain["privacy"] is None
    # Clipping alone promises nothing.
    assert set(bounded["privacy"]["epsilon"].values()) == {None}
    assert privacy_figures(bounded["privacy"])[0] == "no ε"


def test_what_leaves_a_silo_is_clipped(run_small: Run, tmp_path: Path) -> None:
    run_small("cohort=3", "rounds=1", name="plain")
    run_small("cohort=3", "rounds=1", "privacy.clip_norm=0.01", "telemetry.diagnostics=true", name="clipped")
    (diagnostics,) = events_of(tmp_path / "clipped", Diagnostics)
    for silo in ("alpha", "beta", "gamma"):
        update, whole = update_of(tmp_path / "clipped", silo, 1), update_of(tmp_path / "plain", silo, 1)
        assert float(update.norm()) == pytest.approx(0.01, rel=1e-3)
        assert float(torch.dot(update, whole) / update.norm() / whole.norm()) == pytest.approx(1, abs=1e-4)
        told = diagnostics.values[f"update_norm_before_clip/{silo}"]
        assert told == pytest.approx(float(whole.norm()), rel=1e-4)


def test_noise_leaves_with_the_update_and_the_summary_says_what_it_is_worth(
    run_small: Run, tmp_path: Path
) -> None:
    summary = run_small("cohort=2", "checkpoint.keep=4", *NOISY)
    for silo, accepted in summary["privacy"]["epsilon"].items():
        rounds = [event.round for event in events_of(tmp_path / "run", SiloFinished) if event.silo == silo]
        assert accepted == pytest.approx(epsilon(2.0, len(rounds), 1e-5))
        update = update_of(tmp_path / "run", silo, rounds[-1])
        sigma = 2 * 0.01
        assert float(update.square().mean()) == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / len(update)))
    shown, where = privacy_figures(summary["privacy"])
    assert shown == f"ε ≤ {max(summary['privacy']['epsilon'].values()):.3g}"
    assert "δ = 1e-05" in where


def test_with_a_seed_a_run_repeats_itself_and_without_it_does_not(run_small: Run) -> None:
    runs = {
        name: run_small("cohort=2", "rounds=1", *NOISY, f"privacy.seed={seed}", name=name)["weights_sha256"]
        for name, seed in {"a": 1, "b": 1, "c": 2, "d": "null", "e": "null"}.items()
    }
    assert runs["a"] == runs["b"]
    assert len(set(runs.values())) == 4


def test_a_round_that_is_asked_for_again_brings_no_new_noise(
    small_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two draws of noise on one update would let the aggregator average them."""
    from photon.federation import federation

    writing = federation.CheckpointStore.writing

    def dying(self: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.round == 2:
            raise RuntimeError("the server dies")
        return writing(self, state, *rest, **more)

    config = prepare_run(small_config("cohort=3", "rounds=2", *NOISY))
    with monkeypatch.context() as patch:
        patch.setattr(federation.CheckpointStore, "writing", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            run_inprocess(config, answer, resume=False)
    before = {silo: reply_of(tmp_path / "run", silo, 2) for silo in ("alpha", "beta", "gamma")}
    summary = run_inprocess(config, answer, resume=True)
    for silo, reply in before.items():
        after = reply_of(tmp_path / "run", silo, 2)
        assert all(torch.equal(reply[name], after[name]) for name in reply)
        assert summary["privacy"]["epsilon"][silo] == pytest.approx(epsilon(2.0, 2, 1e-5))


def test_an_order_without_an_accepted_reply_counts_unless_it_was_refused(
    run_small: Run, tmp_path: Path
) -> None:
    run_small("cohort=2", "rounds=2", *NOISY)
    events = read_events(tmp_path / "run" / "events.jsonl")
    (lost,) = [e for e in events_of(tmp_path / "run", SiloFinished) if e.silo == "beta"][-1:]
    began = next(e for e in events if isinstance(e, RoundStarted))
    failed = SiloFailed(round=3, silo="beta", kind="deadline", reason="late")

    def of_beta(*more: Event) -> float:
        return build_summary([*events, *more], weights_sha256=None)["privacy"]["epsilon"]["beta"]

    releases = lost.privacy["releases"]
    again = dataclasses.replace(began, round=3, cohort=["beta"])
    assert of_beta() == pytest.approx(epsilon(2.0, releases, 1e-5))
    assert of_beta(again, failed) == pytest.approx(epsilon(2.0, releases + 1, 1e-5))
    refused = dataclasses.replace(failed, kind="refused")
    assert of_beta(again, refused) == pytest.approx(epsilon(2.0, releases, 1e-5))
    newcomer = dataclasses.replace(began, round=3, cohort=["delta"])
    summary = build_summary([*events, newcomer], weights_sha256=None)
    assert summary["privacy"]["epsilon"]["delta"] == pytest.approx(epsilon(2.0, 1, 1e-5))


def test_parts_of_the_parameters_are_bounded_from_what_the_aggregator_knows(
    run_small: Run, tmp_path: Path
) -> None:
    """What a silo trained in rounds without a release is within the bound of the release that brings it."""
    strategy = ["strategy=streaming-diloco", "strategy.fragments=2", "strategy.mixing=0.5"]
    run_small("cohort=3", "rounds=4", "privacy.clip_norm=0.01", *strategy)
    norms = [event.update_norm for event in events_of(tmp_path / "run", SiloFinished)]
    assert len(norms) == 12
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)


# --- a silo's own policy ------------------------------------------------------------------------------


@pytest.fixture
def federate(
    small_config: Callable[..., RunConfig], silo_folders: dict[str, Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Train alpha and beta on nodes of their own; beta has a rule for its updates."""

    def run(rule: dict[str, float], *overrides: str, name: str = "run") -> dict[str, Any]:
        policy = tmp_path / "policy.yaml"
        policy.write_text(json.dumps({"privacy": rule}))
        nodes: dict[int, dict[str, Any]] = {
            number: {"data-dir": str(data), "state-dir": str(tmp_path / name / "state" / silo)}
            for number, (silo, data) in enumerate(silo_folders.items(), start=1)
        }
        nodes[2]["policy"] = str(policy)
        config = prepare_run(small_config("cohort=2", "rounds=1", *overrides, name=name))
        return run_federation(config, InProcessGrid(answer, nodes), resume=False, live=False)

    return run


@pytest.mark.parametrize(
    ("rule", "run", "expected"),
    [
        ({"clip_norm": 0.01, "noise_multiplier": 2}, [], {"beta": (0.01, 2)}),
        ({"clip_norm": 0.01, "noise_multiplier": 2}, ["clip_norm=1"], {"alpha": (1, 0), "beta": (0.01, 2)}),
        (
            {"clip_norm": 1, "noise_multiplier": 0.5},
            ["clip_norm=0.01", "noise_multiplier=3"],
            {"alpha": (0.01, 3), "beta": (0.01, 3)},
        ),
        (
            {"clip_norm": 0.001},
            ["clip_norm=0.01", "noise_multiplier=3"],
            {"alpha": (0.01, 3), "beta": (0.001, 3)},
        ),
    ],
)
def test_a_silo_applies_the_stronger_of_its_own_rule_and_the_runs(
    federate: Any, tmp_path: Path, rule: dict[str, float], run: list[str], expected: dict[str, Any]
) -> None:
    summary = federate(rule, *(f"privacy.{key}" for key in run))
    finished = {event.silo: event for event in events_of(tmp_path / "run", SiloFinished)}
    told = {
        silo: (event.privacy["clip_norm"], event.privacy["noise_multiplier"])
        for silo, event in finished.items()
        if event.privacy
    }
    assert told == expected
    coordinates = summary["parameters"]
    for silo, (clip, noise) in expected.items():
        # The noise is far larger than the update.
        norm = clip * math.sqrt(1 + noise**2 * coordinates)
        assert finished[silo].update_norm <= norm * 1.1
        if noise:
            assert finished[silo].update_norm >= norm * 0.9
            assert summary["privacy"]["epsilon"][silo] == pytest.approx(epsilon(noise, 1, 1e-5))


def test_the_aggregator_cannot_choose_the_noise_of_a_silos_own_rule(federate: Any) -> None:
    rule = {"clip_norm": 0.01, "noise_multiplier": 2}
    first, second = (federate(rule, "privacy.seed=1", name=name)["weights_sha256"] for name in ("a", "b"))
    assert first != second


def test_a_rule_refuses_what_would_leave_beside_the_parameters(federate: Any, tmp_path: Path) -> None:
    federate({"clip_norm": 1.0}, "strategy=local-adam", "cohort=null")
    assert {event.silo for event in events_of(tmp_path / "run", SiloFinished)} == {"alpha"}
    (told,) = (event.message for event in events_of(tmp_path / "run", Notice) if "refused" in event.message)
    assert "privacy=parameters alone, and the request asks for the state groups exp_avg" in told


def test_a_rule_with_noise_refuses_a_sparse_model(federate: Any, tmp_path: Path) -> None:
    federate({"clip_norm": 1.0, "noise_multiplier": 1.0}, "strategy=topk", "cohort=null")
    assert {event.silo for event in events_of(tmp_path / "run", SiloFinished)} == {"alpha"}
    assert [event for event in events_of(tmp_path / "run", Notice) if "a sparse model" in event.message]


# --- what cannot work ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["privacy.noise_multiplier=1"], "privacy.noise_multiplier=1 is in units of privacy.clip_norm"),
        (["privacy.clip_norm=0"], "privacy.clip_norm=0"),
        (["privacy=gaussian", "privacy.delta=1"], "privacy.delta=1"),
        (["privacy=gaussian", "privacy.delta=0"], "privacy.delta=0"),
        (["privacy=gaussian", "strategy=local-adam"], "strategy.local_state=sync"),
        (["privacy=gaussian", "strategy=sparsyfed"], "noise would fill a sparse model"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    small_config: Callable[..., RunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(PhotonError, match=message):
        small_config(*overrides)
