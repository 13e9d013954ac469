"""The fold equals the batch mean, is exact where it must be, and depends on nothing but cohort order."""

import numpy as np
import pytest
import torch

from photon.link.encoding import SparseTensor
from photon.strategy.fold import WeightedMean


def replies(count: int, seed: int = 0) -> list[dict[str, dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "params": {
                "weight": torch.randn(7, 5, generator=generator),
                "bias": torch.randn(5, generator=generator),
            }
        }
        for _ in range(count)
    ]


def fold(items: list, weights: list[float]) -> dict[str, dict[str, torch.Tensor]]:
    mean = WeightedMean()
    for groups, weight in zip(items, weights, strict=True):
        mean.add(groups, weight)
    return mean.result()


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [3, 1, 8, 2], [1e6, 1, 1, 5e5]])
def test_equals_numpys_weighted_average(weights: list[float]) -> None:
    items = replies(4)
    result = fold(items, weights)
    for name in ("weight", "bias"):
        stacked = np.stack([item["params"][name].double().numpy() for item in items])
        expected = np.average(stacked, axis=0, weights=weights)
        np.testing.assert_allclose(result["params"][name].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_one_reply_is_copied_bit_for_bit() -> None:
    (item,) = replies(1)
    result = fold([item], [3.0])
    assert torch.equal(result["params"]["weight"], item["params"]["weight"])
    result["params"]["weight"].zero_()
    assert item["params"]["weight"].abs().sum() > 0, "the accumulator must not share memory with a reply"


def test_equal_replies_stay_exact() -> None:
    (item,) = replies(1)
    result = fold([item] * 7, [1.0, 2.0, 3.0, 0.1, 5.0, 6.0, 7.0])
    assert torch.equal(result["params"]["weight"], item["params"]["weight"])


def test_low_precision_replies_are_summed_in_float32() -> None:
    items = [{"params": {"w": torch.full((4,), value, dtype=torch.bfloat16)}} for value in (1.0, 1.0078125)]
    result = fold(items, [1.0, 1.0])["params"]["w"]
    assert result.dtype == torch.float32
    assert torch.allclose(result, torch.full((4,), 1.00390625), atol=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_refuses_a_weight_that_is_not_positive(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        WeightedMean().add(replies(1)[0], weight)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [3, 1, 8, 2]])
def test_a_reply_counts_for_its_rows_alone(weights: list[float]) -> None:
    """Of seven rows one has no reply, one the first, one the last, one all, and the others some."""
    items = replies(4)
    has = np.array(
        [[0, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1]], bool
    )
    mean = WeightedMean()
    for item, weight, rows in zip(items, weights, has, strict=True):
        mean.add(item, weight, {"weight": torch.from_numpy(rows)})
    result = mean.result()["params"]
    plain = fold(items, weights)["params"]
    stacked = np.stack([item["params"]["weight"].double().numpy() for item in items])
    shares = np.array(weights)[:, None] * has
    expected = (shares[..., None] * stacked).sum(0) / np.maximum(shares.sum(0), 1e-9)[:, None]
    np.testing.assert_allclose(result["weight"].numpy()[1:], expected[1:], rtol=1e-5, atol=1e-6)
    assert torch.equal(result["weight"][0], items[0]["params"]["weight"][0]), "as in the first"
    assert torch.equal(result["weight"][1], items[0]["params"]["weight"][1]), "of one reply, exactly"
    assert torch.equal(result["weight"][2], items[3]["params"]["weight"][2])
    assert torch.equal(result["bias"], plain["bias"])


def test_replies_that_count_for_all_rows_fold_as_if_nothing_had_been_said() -> None:
    items, weights = replies(5), [3.0, 1.0, 8.0, 2.0, 0.7]
    mean = WeightedMean()
    for item, weight in zip(items, weights, strict=True):
        mean.add(item, weight, {"weight": torch.ones(7, dtype=torch.bool)})
    assert torch.equal(mean.result()["params"]["weight"], fold(items, weights)["params"]["weight"])


def sparse(seed: int) -> SparseTensor:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(35, generator=generator)[:6]
    return SparseTensor(torch.Size((7, 5)), indices, torch.randn(6, generator=generator))


@pytest.mark.parametrize("dense_at", [None, 0, 1, 3])
def test_sparse_replies_fold_as_dense_ones(dense_at: int | None) -> None:
    """Also where one of them comes dense, at any place."""
    items, weights = [sparse(seed) for seed in range(4)], [3.0, 1.0, 8.0, 2.0]
    mixed = [{"params": {"w": t.dense() if k == dense_at else t}} for k, t in enumerate(items)]
    stacked = np.stack([item.dense().double().numpy() for item in items])
    expected = np.average(stacked, axis=0, weights=weights)
    np.testing.assert_allclose(fold(mixed, weights)["params"]["w"].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dense_at", [None, 0, 1, 3])
def test_a_mean_over_senders_leaves_out_who_sent_nothing(dense_at: int | None) -> None:
    """Value by value; one that nobody sent is zero, and a reply that comes dense has sent all."""
    items, weights = [sparse(seed) for seed in range(4)], [3.0, 1.0, 8.0, 2.0]
    mean = WeightedMean(over_senders=True)
    for number, (item, weight) in enumerate(zip(items, weights, strict=True)):
        whole = number == dense_at
        mean.add({"params": {"w": item.dense() if whole else item}, "exp_avg": {"w": item}}, weight)
    assert mean.nbytes == 3 * 4 * 35, "a sum of each group, and who sent what of the parameters"
    result = mean.result()
    expected = np.zeros(35)
    for place in range(35):
        values = [
            (float(item.dense().view(-1)[place]), weight)
            for number, (item, weight) in enumerate(zip(items, weights, strict=True))
            if number == dense_at or place in item.indices.tolist()
        ]
        if values:
            expected[place] = sum(v * w for v, w in values) / sum(w for _, w in values)
    np.testing.assert_allclose(result["params"]["w"].view(-1).numpy(), expected, rtol=1e-5, atol=1e-6)
    if dense_at is None:
        assert (expected == 0).any(), "there is a value that nobody has sent"
    of_all = np.average([item.dense().double().numpy() for item in items], axis=0, weights=weights)
    np.testing.assert_allclose(result["exp_avg"]["w"].numpy(), of_all, rtol=1e-5, atol=1e-6)
