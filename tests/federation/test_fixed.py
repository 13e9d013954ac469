"""Groups that are sent once: by hash from then on, checked on arrival and at rest."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.errors import PhotonError
from photon.silo.service import SiloNode
from photon.state.fixed import MOST_KEPT, FixedGroups, group_sha256
from photon.strategy.contract import PARAMS
from photon.strategy.local import LocalMethod
from photon.strategy.photon import Photon
from photon.telemetry.events import SiloFailed, SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
ANCHOR = "fixed/anchor"
ANCHORED = ("strategy._target_=tests.federation.test_fixed.Anchored", "cohort=2", "rounds=5")


class Anchored(Photon):
    """Photon whose silos start half-way between what came and an anchor that never changes."""

    @cached_property
    def local(self) -> LocalMethod:
        return HalfWay(self.config, self.local_state)

    def contract(self, server_round, params, role="silo"):
        whole = super().contract(server_round, params, role)
        return replace(whole, arriving={**whole.arriving, ANCHOR: params})

    def configure_train(self, server_round, checkpoint, cohort):
        requests = super().configure_train(server_round, checkpoint, cohort)
        anchor = {name: torch.full_like(t, 1e-3) for name, t in checkpoint.load_params().items()}
        beside = {id(groups): {**groups, ANCHOR: anchor} for groups in requests.values()}
        return {name: beside[id(groups)] for name, groups in requests.items()}


class HalfWay(LocalMethod):
    def start(self, received, kept, request, data):
        start = super().start(received, kept, request, data)
        params = {name: (t + received[ANCHOR][name]) / 2 for name, t in start.params.items()}
        return replace(start, params=params)


class Always(Anchored):
    """The same, and the anchor comes with every request."""

    def contract(self, server_round, params, role="silo"):
        whole = super().contract(server_round, params, role)
        arriving = {PARAMS: params, "shared/anchor": params}
        return replace(whole, arriving=arriving)

    def configure_train(self, server_round, checkpoint, cohort):
        requests = super().configure_train(server_round, checkpoint, cohort)
        return {
            name: {PARAMS: groups[PARAMS], "shared/anchor": groups[ANCHOR]}
            for name, groups in requests.items()
        }

    @cached_property
    def local(self) -> LocalMethod:
        return HalfWayEach(self.config, self.local_state)


class HalfWayEach(HalfWay):
    def start(self, received, kept, request, data):
        return super().start({**received, ANCHOR: received["shared/anchor"]}, kept, request, data)


def finished(run_dir: Path) -> list[SiloFinished]:
    return [e for e in read_events(run_dir / "events.jsonl") if isinstance(e, SiloFinished)]


def test_it_comes_once_and_is_there_every_time(run_small: Run, tmp_path: Path) -> None:
    once = run_small(*ANCHORED, name="once")
    always = run_small(ANCHORED[0].replace("Anchored", "Always"), *ANCHORED[1:], name="always")
    assert once["weights_sha256"] == always["weights_sha256"]
    seen: set[str] = set()
    for event in finished(tmp_path / "once"):
        assert (ANCHOR in event.group_bytes_down) == (event.silo not in seen), (event.round, event.silo)
        seen.add(event.silo)
    assert len(seen) == 3


@pytest.mark.few(1)
@pytest.mark.parametrize("harm", ["removed", "damaged"])
def test_what_a_silo_has_lost_costs_one_reply(
    harm: str, run_small: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    original, harmed = SiloNode.train, []

    def train(self, request, groups, contract):
        if request.round == 2 and not harmed:
            harmed.append(request.silo)
            (file,) = (self.site.state / request.silo / "fixed").glob("*.safetensors")
            if harm == "removed":
                shutil.rmtree(file.parent)
            else:
                content = bytearray(file.read_bytes())
                content[-1] ^= 1
                file.write_bytes(content)
        return original(self, request, groups, contract)

    monkeypatch.setattr(SiloNode, "train", train)
    summary = run_small(*ANCHORED, "cohort=3", "federation.max_failures=1")
    assert summary["status"] == "finished"
    failed = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFailed)]
    (silo,) = harmed
    assert [(event.round, event.silo) for event in failed] == [(3, silo)]
    assert failed[0].reason == (
        f"{silo} has lost fixed/anchor, which is sent once; its next request after this failure brings it"
    )
    brought = {event.round for event in finished(tmp_path / "run") if ANCHOR in event.group_bytes_down}
    assert brought == {1, 4}


def test_a_resumed_server_sends_it_again(run_small: Run, tmp_path: Path) -> None:
    whole = run_small(*ANCHORED, name="whole")
    run_small(*ANCHORED, "checkpoint.keep=5", name="half")
    for number in (4, 5):
        shutil.rmtree(tmp_path / "half" / "checkpoints" / f"round-{number:06d}")
    assert (
        run_small(*ANCHORED, "checkpoint.keep=5", name="half", resume=True)["weights_sha256"]
        == (whole["weights_sha256"])
    )


def test_a_hash_is_not_believed(tmp_path: Path) -> None:
    groups, other = {ANCHOR: {"w": torch.ones(3)}}, {"w": torch.zeros(3)}
    store = FixedGroups(tmp_path / "fixed")
    with pytest.raises(PhotonError, match="fixed/anchor that came is not what its hash says"):
        store.complete(groups, {ANCHOR: group_sha256(other)}, "alpha")
    with pytest.raises(PhotonError, match="fixed/anchor came without its hash"):
        store.complete(groups, {}, "alpha")
    with pytest.raises(PhotonError, match="alpha has lost fixed/anchor"):
        store.complete({}, {ANCHOR: group_sha256(other)}, "alpha")
    assert not list(tmp_path.rglob("*.safetensors")), "nothing of that is kept"


def test_a_silo_keeps_the_newest_few(tmp_path: Path) -> None:
    store = FixedGroups(tmp_path)
    groups: list[Mapping[str, Mapping[str, torch.Tensor]]] = [
        {ANCHOR: {"w": torch.full((2,), float(n))}} for n in range(MOST_KEPT + 3)
    ]
    for group in groups:
        store.complete(group, {ANCHOR: group_sha256(group[ANCHOR])}, "alpha")
    assert len(list(tmp_path.iterdir())) == MOST_KEPT
    last = groups[-1][ANCHOR]
    assert torch.equal(store.complete({}, {ANCHOR: group_sha256(last)}, "alpha")[ANCHOR]["w"], last["w"])


def test_names_types_and_shapes_are_hashed_too() -> None:
    one = torch.arange(6.0)
    hashes = {
        group_sha256({"w": one}),
        group_sha256({"v": one}),
        group_sha256({"w": one.view(2, 3)}),
        group_sha256({"w": one.view(torch.int32)}),
    }
    assert len(hashes) == 4
