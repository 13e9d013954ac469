"""What a silo says and keeps when its disk takes no more."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from photon.errors import PhotonError
from photon.state.silo import SiloCounts, SiloState, SiloStore, Use


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _state(server_round: int, run: str = "run") -> SiloState:
    groups = {"exp_avg": {"weight": torch.full((10_000,), float(server_round))}}
    return SiloState(run, "model", server_round, 4 * server_round, {}, "{}", "{}", groups)


def test_a_full_disk_is_one_line_and_costs_no_earlier_round(tmp_path: Path) -> None:
    store = SiloStore(tmp_path / "alpha", keep=2)
    reply = {"params": {"weight": torch.ones(10_000)}}
    store.save(_state(1), reply)
    with full_disk(4096), pytest.raises(PhotonError, match="make room on the silo's disk"):
        store.save(_state(2), reply)
    assert [path.name for path in store.folder.iterdir()] == ["round-000001"]
    kept = store.load("run", 1)
    assert kept is not None
    assert torch.equal(kept.groups["exp_avg"]["weight"], torch.ones(10_000))
    store.save(_state(2), reply)
    assert store.reply("run", "model", 2) is not None


def test_the_rounds_that_were_written_last_are_kept_whatever_their_numbers(tmp_path: Path) -> None:
    """A run may have gone back, and the next run of a silo begins at round 1 beside those of the last."""
    store = SiloStore(tmp_path / "alpha", keep=3)

    def after(server_round: int, run: str = "run") -> list[int]:
        store.save(_state(server_round, run), {})
        return [int(path.name[-6:]) for path in sorted(store.folder.iterdir())]

    for server_round in (7, 8, 9):
        after(server_round)
    assert after(3) == [3, 8, 9]
    assert after(4) == [3, 4, 9]
    assert after(5) == [3, 4, 5]
    assert after(1, "next") == [1, 4, 5]
    assert store.load("next", 1) is not None
    # A clock that is set back must not cost what the next request goes on from.
    os.utime(store.folder / "round-000004", ns=(1, 1))
    assert after(5) == [1, 4, 5]
    assert after(6) == [1, 5, 6]


def test_a_count_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    counts = SiloCounts(tmp_path, "alpha")
    counts.add("run", 7, 1)
    with full_disk(0), pytest.raises(PhotonError, match="make room on the silo's disk"):
        counts.add("run", 7, 1)
    assert counts.used() == {"run": Use(tokens=7, releases=1)}
