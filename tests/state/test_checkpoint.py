"""A checkpoint counts once it is what was to be written, and is never half of one."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.errors import PhotonError, RunError
from photon.state import checkpoint as module
from photon.state.checkpoint import CheckpointStore, LedgerEntry, ServerState
from photon.state.tensors import load_groups


def state(server_round: int, **more: Any) -> ServerState:
    return ServerState(
        run_id="run",
        round=server_round,
        global_step=0,
        tokens=0,
        vocab_size=8,
        sequence_length=2,
        tokenizer_sha256="",
        **more,
    )


def model(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4,), value)}


def write(store: CheckpointStore, server_round: int, loss: float | None = None, **more: Any) -> None:
    groups = {"outer": {"momentum": model(float(server_round))}, "averaged": {}} | more
    with store.writing(state(server_round), model(float(server_round)), **groups) as written:
        written.state.validation_loss = loss


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"outer_scalars": {"step": math.nan}}, "outer_scalars.step: Input should be a valid number"),
        ({"local_scalars": {"step": math.inf}}, "local_scalars.step: Input should be a valid number"),
        ({"tokens": -1}, "tokens: Input should be greater than or equal to 0"),
    ],
)
def test_numbers_that_cannot_be_read_back_cost_the_round(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    told: list[int] = []
    with (
        pytest.raises(RunError, match=rf"^round 2 does not count, .* cannot be read back: {message}$"),
        store.writing(state(2).model_copy(update=wrong), model(2.0), {}, {}, lambda: told.append(2)),
    ):
        pass
    assert not told
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
    assert store.latest()[0].state.round == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", ["params", "momentum", "kept"])
def test_values_that_are_not_finite_cost_the_round(tmp_path: Path, group: str, value: float) -> None:
    groups = {name: model(2.0) for name in ("params", "momentum", "kept")}
    groups[group]["weight"][3] = value
    store = CheckpointStore(tmp_path)
    with (
        pytest.raises(RunError, match=rf"^round 2 does not count, .*: {group}/weight is not finite"),
        store.writing(
            state(2),
            groups["params"],
            {"momentum": groups["momentum"]},
            {},
            kept={"kept": groups["kept"], "count": {"rows": torch.ones(2, dtype=torch.int64)}},
        ),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_values_that_are_large_are_no_reason(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with store.writing(state(1), model(3e38), {}, {}):
        pass
    assert store.verified(1).load_params()["weight"][0] == torch.tensor(3e38)


def test_a_file_that_is_not_what_was_written_costs_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, groups: Any) -> None:
        save(path, groups)
        path.write_bytes(path.read_bytes()[:-1])

    save = module.save_groups
    monkeypatch.setattr(module, "save_groups", half)
    with pytest.raises(RunError, match=r"^round 1 does not count, .*: outer.safetensors \(Error while"):
        write(CheckpointStore(tmp_path), 1)


def dying_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that ends the process, as far as it can be seen, when it is called once more."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("calls", range(4))
def test_death_within_a_removal_leaves_no_part_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The files of a folder go one by one: without its outer state a checkpoint would look sound."""
    store = CheckpointStore(tmp_path)
    for server_round in (1, 2, 3):
        write(store, server_round)
    write(CheckpointStore(tmp_path, keep=9), 4)
    with monkeypatch.context() as patch:
        patch.setattr(shutil.os, "unlink", dying_after(calls, shutil.os.unlink))
        with pytest.raises(KeyboardInterrupt):
            store.discard_after(2)
    assert store.rounds() in ([2, 3], [2])
    for server_round in store.rounds():
        store.verified(server_round)
    store.latest()
    assert not list(tmp_path.glob(".*"))


def test_what_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, permanent_every=4, keep_best=True)
    losses = {0: 9.0, 1: 3.0, 2: None, 3: 2.0, 4: 5.0, 5: math.nan, 6: 2.0, 7: 4.0, 8: 1.0, 9: 4.0, 10: 4.0}
    for server_round, loss in losses.items():
        write(store, server_round, loss)
        if server_round == 7:
            assert store.rounds() == [3, 4, 6, 7], "not yet the best: as good as the one before"
    assert store.rounds() == [4, 8, 9, 10]
    assert store.load(8).state.validation_loss == 1.0
    write(CheckpointStore(tmp_path, keep=1), 11)
    # The newest that was evaluated stays, too: the guard may have to go back to it.
    assert store.rounds() == [10, 11]


def test_the_parameters_of_the_round_before_are_kept_with_those_that_need_them(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, permanent_every=2)
    for server_round in range(4):
        write(store, server_round, with_previous=True)
    assert store.rounds() == [2, 3]
    assert torch.equal(store.verified(2).load_previous_params()["weight"], torch.ones(4))
    linked = tmp_path / "round-000003" / "previous.safetensors"
    assert linked.samefile(tmp_path / "round-000002" / "params.safetensors"), "no second copy on the disk"
    (tmp_path / "round-000002" / "previous.safetensors").unlink()
    with pytest.raises(PhotonError, match=r"needs the parameters of round 1, which are not kept; go back"):
        store.load(2).load_previous_params()


def test_nobody_is_counted_on_after_going_back_further_than_silos_keep(tmp_path: Path) -> None:
    known = LedgerEntry(last_round=4)
    for to, expected in ((4, 4), (3, 4), (2, 0)):
        store = CheckpointStore(tmp_path / str(to), keep=2, permanent_every=1)
        for server_round in (2, 3, 4):
            with store.writing(state(server_round, ledger={"alpha": known}), model(1.0), {}, {}):
                pass
        store.set_aside_after(to, store.aside_for(to))
        assert store.rounds()[-1] == to
        assert store.verified(to).last_round_of("alpha") == expected
        assert store.load(to).last_round_of("beta") == 0


def test_two_that_go_back_in_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    names = []
    for _ in range(2):
        for server_round in (1, 2):
            write(store, server_round)
        names.append(store.aside_for(1))
        store.set_aside_after(1, names[-1])
    assert names[0] != names[1]
    for folder in names:
        assert load_groups(folder / "round-000002" / "params.safetensors")
