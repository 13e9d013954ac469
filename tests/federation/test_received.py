"""A model that a silo has measured is not sent to it again, and nothing else changes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.state import kept_files, received
from photon.state.received import MOST_KEPT, ReceivedModels, tensors_hash
from photon.state.silo import SiloCounts
from photon.strategy.contract import PARAMS
from photon.telemetry.events import Evaluated, SiloFailed, SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
OFF = "link.keep_received=false"
TREE = "federation.tree={north: [alpha, beta], gamma: null}"
CAST = "{_target_: photon.link.codecs.Cast, dtype: bfloat16}"


def told(run_dir: Path, kind: type) -> list[Any]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, kind)]


def model_bytes(run_dir: Path) -> int:
    return sum(event.group_bytes_up[PARAMS] for event in told(run_dir, SiloFinished)[:1])


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method",
    [
        ["cohort=2"],
        ["cohort=2", f"link.downlink=[{CAST}]"],
        ["cohort=2", "strategy=desloc"],
        ["cohort=null", TREE],
        ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"],
    ],
    ids=["plain", "lossy", "states", "tree", "secure"],
)
def test_a_run_ends_the_same_with_fewer_bytes(method: list[str], run_small: Run, tmp_path: Path) -> None:
    once, again = run_small(*method, name="once"), run_small(*method, OFF, name="again")
    for figure in ("weights_sha256", "perplexity", "tokens", "failures"):
        assert once[figure] == again[figure], figure
    assert once["bytes"]["up"] == pytest.approx(again["bytes"]["up"], rel=0.02)
    assert not any(PARAMS in event.group_bytes_down for event in told(tmp_path / "once", SiloFinished))
    assert all(PARAMS in event.group_bytes_down for event in told(tmp_path / "again", SiloFinished))
    assert once["bytes"]["down"] < 0.8 * again["bytes"]["down"]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "method",
    [
        ["strategy=streaming-diloco", "strategy.fragments=2", "cohort=null"],
        ["strategy=centralized"],
        ["link=top1of32", "link.downlink_payload=update", "cohort=null"],
    ],
    ids=["parts", "pooled", "changes"],
)
def test_what_is_not_the_measured_model_is_sent(method: list[str], run_small: Run, tmp_path: Path) -> None:
    once, again = run_small(*method, name="once"), run_small(*method, OFF, name="again")
    assert once["weights_sha256"] == again["weights_sha256"]
    sent = [event for event in told(tmp_path / "once", SiloFinished) if event.round == 2]
    assert all(PARAMS in event.group_bytes_down for event in sent)


def test_each_model_is_sent_to_each_silo_once_and_the_first_to_none(run_small: Run, tmp_path: Path) -> None:
    run_small("cohort=2", "rounds=3")
    size = model_bytes(tmp_path / "run")
    sizes = {event.round: event.bytes_down for event in told(tmp_path / "run", Evaluated)}
    # It is made from the seed by each.
    assert sizes[0] < size
    for server_round in (1, 2, 3):
        assert 3 * size < sizes[server_round] < 4 * size + 20_000


@pytest.mark.few(2)
@pytest.mark.parametrize("harm", ["removed", "damaged"])
@pytest.mark.parametrize("method", [[], ["privacy=secure", "strategy.weighting=uniform"]], ids=["", "secure"])
def test_a_silo_that_has_lost_it_is_sent_it_and_the_round_counts(
    harm: str, method: list[str], run_small: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    common = ["cohort=2", "link.uplink_payload=update", *method]
    whole = run_small(*common, name="whole")
    load, calls = ReceivedModels.load, []

    def losing(self: ReceivedModels, sha: str) -> Any:
        calls.append(sha)
        file = self._files._path(self._name(sha))
        if len(calls) == 6 and file.exists():
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.unlink() if harm == "removed" else file.write_bytes(content)
        return load(self, sha)

    monkeypatch.setattr(ReceivedModels, "load", losing)
    lost = run_small(*common, name="lost")
    assert len(calls) > 6
    assert lost["weights_sha256"] == whole["weights_sha256"]
    assert not told(tmp_path / "lost", SiloFailed)
    brought = [event for event in told(tmp_path / "lost", SiloFinished) if PARAMS in event.group_bytes_down]
    assert brought, "the silo was sent what it had lost"
    for silo in {event.silo for event in told(tmp_path / "lost", SiloFinished)}:
        used = [
            {run: use.releases for run, use in SiloCounts(tmp_path / name / "silos", silo).used().items()}
            for name in ("lost", "whole")
        ]
        # Words that it is lost are no update, and are not counted as one.
        assert list(used[0].values()) == list(used[1].values())


def test_a_silo_that_says_so_twice_fails(run_small: Run, tmp_path: Path, monkeypatch: Any) -> None:
    from photon.silo import arriving

    original = arriving.kept_params

    def never(request: Any, site: Any, config: Any, contract: Any) -> Any:
        if (request.silo, request.round) == ("beta", 2):
            raise arriving._lost(request.silo)
        return original(request, site, config, contract)

    monkeypatch.setattr("photon.node.kept_params", never)
    summary = run_small("cohort=null", "federation.max_failures=1")
    failed = told(tmp_path / "run", SiloFailed)
    assert [(event.round, event.silo, event.kind) for event in failed] == [(2, "beta", "error")]
    assert failed[0].reason == "beta does not have the model that it was not sent"
    assert summary["status"] == "finished"


def test_what_a_silo_cannot_build_from_the_seed_it_is_sent(
    run_small: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = run_small("cohort=2", name="whole")
    monkeypatch.setattr("photon.silo.arriving.read_params", lambda model: {"other": torch.zeros(1)})
    other = run_small("cohort=2", name="other")
    assert other["weights_sha256"] == whole["weights_sha256"]
    first = next(event for event in told(tmp_path / "other", Evaluated) if event.round == 0)
    # What one silo of a site was sent the others have.
    size = model_bytes(tmp_path / "other")
    assert size < first.bytes_down < 2 * size
    assert not told(tmp_path / "other", SiloFailed)


def test_a_reply_goes_through_the_store_though_the_request_brings_nothing(
    run_small: Run, tmp_path: Path
) -> None:
    store = ["link.transport=auto", "link.inline_limit_mb=0.001", f"link.store.url={tmp_path / 'store'}"]
    plain = run_small("cohort=2", name="plain")
    stored = run_small("cohort=2", *store, name="stored")
    assert stored["weights_sha256"] == plain["weights_sha256"]
    sent = told(tmp_path / "stored", SiloFinished)
    assert not any(PARAMS in event.group_bytes_down for event in sent)


def model(value: float) -> Mapping[str, torch.Tensor]:
    return {"w": torch.full((3, 2), value), "b": torch.full((2,), value)}


def test_a_hash_is_not_believed_and_the_disk_is_bounded(tmp_path: Path) -> None:
    kept = ReceivedModels(tmp_path, "run")
    assert not kept.keep(model(1), tensors_hash(model(2)))
    assert not (tmp_path / received.FOLDER).exists(), "nothing of that is kept"
    for number in range(MOST_KEPT + 3):
        assert kept.keep(model(number), tensors_hash(model(number)))
    assert len(list((tmp_path / received.FOLDER).iterdir())) == MOST_KEPT
    newest = tensors_hash(model(MOST_KEPT + 2))
    found = kept.load(newest)
    assert found is not None
    assert torch.equal(found["w"], model(MOST_KEPT + 2)["w"])
    assert kept.load(tensors_hash(model(0))) is None
    assert ReceivedModels(tmp_path, "another run").load(newest) is None
    (file,) = [
        path
        for path in (tmp_path / received.FOLDER).iterdir()
        if path == kept._files._path(kept._name(newest))
    ]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert kept.load(newest) is None
    assert not file.exists()


def test_a_full_disk_costs_nothing_but_bytes(run_small: Run, monkeypatch: Any, tmp_path: Path) -> None:
    whole = run_small("cohort=2", name="whole")

    def full(path: Path, groups: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_files, "save_groups", full)
    poor = run_small("cohort=2", name="poor")
    assert poor["weights_sha256"] == whole["weights_sha256"]
    assert all(PARAMS in event.group_bytes_down for event in told(tmp_path / "poor", SiloFinished))
    assert not told(tmp_path / "poor", SiloFailed)


def test_names_types_and_shapes_are_hashed_too() -> None:
    one = torch.arange(6.0)
    hashes = {
        tensors_hash({"w": one}),
        tensors_hash({"v": one}),
        tensors_hash({"w": one.view(2, 3)}),
        tensors_hash({"w": one.view(torch.int32)}),
    }
    assert len(hashes) == 4
