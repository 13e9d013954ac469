import numpy as np
import pytest
import torch

from photon.data.loader import BatchStream, WindowStream


def windows(count: int, length: int = 4, start: int = 0, dtype: str = "uint16") -> np.ndarray:
    """Make windows that tell their own index in every token."""
    return np.repeat(np.arange(start, start + count), length).reshape(count, length).astype(dtype)


def indices(batch: torch.Tensor) -> list[int]:
    assert (batch == batch[:, :1]).all()
    return batch[:, 0].tolist()


def test_each_epoch_takes_every_window_once_in_another_order():
    stream = WindowStream([windows(23)], seed=5)
    epochs = [[i for _ in range(23) for i in indices(stream.next_batch(1))] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(23))


def test_batches_that_reach_into_the_next_epoch_lose_and_repeat_nothing():
    by_one = WindowStream([windows(10)], seed=1)
    expected = [indices(by_one.next_batch(1))[0] for _ in range(84)]
    by_seven = WindowStream([windows(10)], seed=1)
    assert [i for _ in range(12) for i in indices(by_seven.next_batch(7))] == expected
    assert indices(WindowStream([windows(10)], seed=1).next_batch(84)) == expected


@pytest.mark.parametrize("position", [0, 3, 10, 11, 29])
def test_a_stream_opened_at_a_position_continues_the_uninterrupted_one(position):
    whole = WindowStream([windows(7), windows(3, start=7)], seed=9)
    if position:
        whole.next_batch(position)
    resumed = WindowStream([windows(7), windows(3, start=7)], seed=9, position=position)
    assert resumed.position == whole.position == position
    assert torch.equal(resumed.next_batch(6), whole.next_batch(6))
    assert resumed.epoch == pytest.approx((position + 6) / 10)


def test_setting_the_position_back_replays():
    stream = WindowStream([windows(10)], seed=2)
    first = stream.next_batch(25)
    stream.position = 0
    assert torch.equal(stream.next_batch(25), first)


def test_several_arrays_are_their_concatenation(tmp_path):
    parts = [windows(5), windows(0), windows(1, start=5), windows(9, start=6)]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", part)
    mapped = [
        np.load(tmp_path / f"{number}.npy", mmap_mode="r" if len(parts[number]) else None)
        for number in range(4)
    ]
    apart, together = WindowStream(mapped, seed=3), WindowStream([np.concatenate(parts)], seed=3)
    assert apart.total == 15
    for _ in range(5):
        assert torch.equal(apart.next_batch(7), together.next_batch(7))


@pytest.mark.parametrize(("dtype", "highest"), [("uint16", 65535), ("uint32", 100_000)])
def test_ids_keep_their_value_as_int64(dtype, highest):
    batch = WindowStream([np.full((3, 8), highest, dtype=dtype)], seed=0).next_batch(2)
    assert batch.dtype == torch.int64
    assert batch.shape == (2, 8)
    assert (batch == highest).all()


def test_the_seed_decides_the_order_and_no_global_generator_is_touched():
    state = np.random.get_state()[1].copy()
    first = WindowStream([windows(50)], seed=0).next_batch(50)
    assert not torch.equal(first, WindowStream([windows(50)], seed=1).next_batch(50))
    assert np.array_equal(state, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("arrays", "seed", "position"),
    [
        ([], 0, 0),
        ([windows(0)], 0, 0),
        ([windows(2, 4), windows(2, 5)], 0, 0),
        ([windows(2)], -1, 0),
        ([windows(2)], 0, -1),
    ],
)
def test_impossible_streams_are_refused(arrays, seed, position):
    with pytest.raises(ValueError, match=r"window|negative"):
        WindowStream(arrays, seed, position)
    with pytest.raises(ValueError, match="at least one"):
        WindowStream([windows(2)], 0).next_batch(0)


def test_arrays_that_go_together_are_read_in_one_order() -> None:
    pair = BatchStream({"a": [windows(10)], "b": [windows(10) + 1]}, seed=4, position=3)
    batch = pair.next_batch(9)
    assert torch.equal(batch["b"], batch["a"] + 1)
    assert torch.equal(batch["a"], WindowStream([windows(10)], seed=4, position=3).next_batch(9))
    assert pair.position == 12
    with pytest.raises(ValueError, match="arrays a, b: they must have the same number of windows"):
        BatchStream({"a": [windows(10)], "b": [windows(9)]}, seed=4)
