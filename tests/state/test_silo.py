"""What a silo says and keeps when its disk takes no more."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
    return SiloState(run, "model", server_round, 4 * server_round, {}, "{}", "{}", groups=groups)


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


def test_what_a_round_went_on_from_stays_while_what_follows_is_rejected(tmp_path: Path) -> None:
    """The server says which round it accepted last; a silo cannot know how long that will be."""
    store = SiloStore(tmp_path / "alpha", keep=3)

    def after(server_round: int, accepted: int) -> list[int]:
        store.save(replace(_state(server_round), accepted=accepted), {})
        return [int(path.name[-6:]) for path in sorted(store.folder.iterdir())]

    after(1, 0)
    for server_round in range(2, 8):
        assert after(server_round, 1)[0] == 1
    # The seventh is accepted, and nothing can go back to before it any more.
    assert after(8, 7) == [6, 7, 8]
    assert after(9, 8) == [7, 8, 9]


def test_the_server_may_go_back_to_where_another_round_was_the_last_accepted_one(tmp_path: Path) -> None:
    """It keeps one checkpoint less than a silo keeps rounds: here those of rounds 6 to 8."""
    store = SiloStore(tmp_path / "alpha", keep=4)
    for server_round, accepted in ((1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2), (8, 7)):
        store.save(replace(_state(server_round), accepted=accepted), {})
    assert store.load("run", 2) is not None, "round 7 goes on from round 2"
    store.save(replace(_state(9), accepted=8), {})
    assert store.load("run", 2) is None


@pytest.mark.parametrize(
    "name", ["state.json", "optimizer.safetensors", "link.safetensors", "reply.safetensors"]
)
def test_a_flipped_bit_of_a_round_is_noticed(tmp_path: Path, name: str) -> None:
    store = SiloStore(tmp_path / "alpha", keep=2)
    state = replace(
        _state(1), text="hash", scalars={"step": 4.0}, link={"residual": {"weight": torch.ones(3)}}
    )
    store.save(state, {"params": {"weight": torch.ones(10)}})
    assert store.reply("run", "model", 1) is not None
    file = store.folder / "round-000001" / name
    whole = file.read_bytes()
    for place in (len(whole) // 3, len(whole) - 3):
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        assert store.reply("run", "model", 1) is None
        assert (store.load("run", 1) is None) == (name != "reply.safetensors")
    file.write_bytes(whole)
    assert store.reply("run", "model", 1) is not None
    (store.folder / "round-000001" / "blake3.json").unlink()
    assert store.load("run", 1) is None


def test_a_round_of_an_earlier_version_has_no_seal(tmp_path: Path) -> None:
    store = SiloStore(tmp_path / "alpha", keep=2)
    store.save(_state(1), {"params": {"weight": torch.ones(10)}})
    folder = store.folder / "round-000001"
    numbers = json.loads((folder / "state.json").read_text())
    del numbers["text"], numbers["accepted"]
    (folder / "state.json").write_text(json.dumps(numbers))
    (folder / "blake3.json").unlink()
    assert store.reply("run", "model", 1) is not None
