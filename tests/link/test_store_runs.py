"""Whole runs through a store: equal to those inside messages, resumed, and robust to changed objects."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from photon.link.records import HEADER
from photon.link.store import open_store
from photon.link.transport import SiloLink
from photon.telemetry.events import RoundFinished, SiloFinished
from photon.telemetry.log import read_events
from tests.link.stored import flip_last_byte, keys

SMALL_RUN = ["cohort=2", "rounds=2", "outer=diloco", "link.keep_received=false"]


@pytest.mark.few(1)
def test_a_run_through_a_store_equals_one_inside_messages(
    run_small: Callable[..., dict[str, Any]], place: tuple[str, bool], tmp_path: Path
) -> None:
    url, presigned = place
    inside = run_small(*SMALL_RUN, name="inline")
    by_reference = run_small(
        *SMALL_RUN,
        "link.transport=store",
        f"link.store.url={url}",
        f"link.store.presigned={presigned}",
        name="store",
    )
    assert by_reference["weights_sha256"] == inside["weights_sha256"]
    assert by_reference["perplexity"] == inside["perplexity"]
    for events in (tmp_path / "inline" / "events.jsonl", tmp_path / "store" / "events.jsonl"):
        sizes = [(e.bytes_up, e.bytes_down) for e in read_events(events) if isinstance(e, RoundFinished)]
        assert len(sizes) == 2
        # Two replies and two orders of a model of 32 kB; references add some kilobytes.
        parameters = 4 * sum(t.numel() for t in small_params(tmp_path / "inline").values())
        for up, down in sizes:
            assert 2 * parameters < up < 2 * parameters + 30_000
            assert 2 * parameters < down < 2 * parameters + 40_000
    assert open_store(url).folders(run_id(tmp_path / "store")) == [], "nothing is left in the store"


def test_a_run_through_a_store_goes_on_after_a_crash(
    small_config: Callable[..., Any],
    run_small: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from photon.engine.inprocess import run_inprocess
    from photon.federation import federation
    from photon.federation.run import prepare_run
    from photon.node import answer

    expected = run_small(*SMALL_RUN, name="inline")
    folder = tmp_path / "store"
    config = prepare_run(small_config(*SMALL_RUN, "link.transport=store", f"link.store.url={folder}"))
    advance = federation.advance

    def dying(config: Any, before: Any, *rest: Any) -> Any:
        if before.round == 1:
            raise RuntimeError("the server dies")
        return advance(config, before, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(federation, "advance", dying)
        with pytest.raises(RuntimeError, match="the server dies"):
            run_inprocess(config, answer, resume=False)
    left = keys(folder)
    assert len([key for key in left if "round-000002/up-" in key]) == 2
    summary = run_inprocess(config, answer, resume=True)
    assert summary["weights_sha256"] == expected["weights_sha256"]
    assert keys(folder) == []


def test_a_reply_that_is_changed_in_the_store_is_rejected_and_the_round_goes_on(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = SiloLink.send
    calls: list[str] = []

    def tampered(self: SiloLink, *args: Any) -> RecordDict:
        records = send(self, *args)
        calls.append(json.loads(records[HEADER]["object"])["key"])
        if len(calls) == 2:
            flip_last_byte(tmp_path / "store" / calls[-1])
        return records

    monkeypatch.setattr(SiloLink, "send", tampered)
    summary = run_small(
        "cohort=3", "rounds=2", "link.transport=store", f"link.store.url={tmp_path / 'store'}"
    )
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert summary["failures"] == 1
    assert '"rejected"' in events
    assert "is not what was sent" in events
    assert sum(isinstance(e, SiloFinished) for e in read_events(tmp_path / "run" / "events.jsonl")) == 5


def small_params(run_dir: Path) -> dict[str, torch.Tensor]:
    from photon.state.checkpoint import CheckpointStore

    return CheckpointStore(run_dir / "checkpoints").latest()[0].load_params()


def run_id(run_dir: Path) -> str:
    from photon.state.checkpoint import CheckpointStore

    return CheckpointStore(run_dir / "checkpoints").latest()[0].state.run_id


def test_a_reply_may_hold_more_groups_than_its_order(run_small: Any, tmp_path: Path) -> None:
    """The first order of Local Adam brings parameters; the reply holds both moments, too."""
    summary = run_small(
        "strategy=local-adam",
        "model.architecture.n_embd=192",
        "rounds=1",
        "local_steps=2",
        "link.transport=store",
        f"link.store.url={tmp_path / 'store'}",
    )
    assert summary["failures"] == 0
    per_silo = summary["bytes"]["per_silo"]["alpha"]
    assert per_silo["up"] > 2 * per_silo["down"] + 2**20
