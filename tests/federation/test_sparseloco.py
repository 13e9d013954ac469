"""A whole run over link=sparseloco against SparseLoCo's formulas, value by value."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.link.update import encode_reply
from photon.silo import reply as silo_reply
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

Array = np.ndarray[Any, np.dtype[np.float64]]

DECAY, TOP, TILE = 0.95, 3, 8


def side(length: int) -> int:
    return max(one for one in range(1, TILE + 1) if length % one == 0)


def largest(update: Array) -> Array:
    """Return where the largest values of every tile are."""
    matrix = np.abs(update).reshape(-1, update.shape[-1])
    height, width = side(len(matrix)), side(matrix.shape[1])
    chosen = np.zeros(matrix.shape, dtype=bool)
    for top in range(0, len(matrix), height):
        for left in range(0, matrix.shape[1], width):
            tile = matrix[top : top + height, left : left + width]
            order = np.argsort(-tile.ravel(), kind="stable")[:TOP]
            for place in order:
                chosen[top + place // width, left + place % width] = True
    return chosen.reshape(update.shape)


def two_bits(values: Array) -> Array:
    """Return one of two sizes with the sign of each value, after two turns of Lloyd's algorithm."""
    sizes = np.abs(values)
    middle = sizes.mean()
    for _ in range(2):
        large = sizes >= middle
        high = sizes[large].mean()
        low = sizes[~large].mean() if not large.all() else high
        middle = (low + high) / 2
    return np.where(values < 0, -1, 1) * np.where(large, high, low)


def test_a_run_is_the_formulas(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silos that miss rounds keep what they have lost, and a value that one of two sends is that one's."""
    trained: dict[tuple[int, str], dict[str, Array]] = {}

    def watching(groups: Any, received: Any, link: Any, feedback: Any, *, seed: str) -> Any:
        _, server_round, silo = seed.split("/")
        trained[int(server_round), silo] = {
            name: (received[name] - tensor).double().numpy() for name, tensor in groups["params"].items()
        }
        return encode_reply(groups, received, link, feedback, seed=seed)

    monkeypatch.setattr(silo_reply, "encode_reply", watching)
    tiles = f"{{_target_: photon.link.codecs.TopKTiles, k: {TOP}, tile: {TILE}}}"
    summary = run_small(
        "link=sparseloco",
        f"link.uplink=[{tiles}, {{_target_: photon.link.codecs.TwoBit}}]",
        "rounds=4",
        "cohort=2",
        "checkpoint.keep=9",
    )
    assert summary["failures"] == 0
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    finished = [e for e in read_events(tmp_path / "run" / "events.jsonl") if isinstance(e, SiloFinished)]
    tokens = {(event.round, event.silo): event.tokens for event in finished}
    lost: dict[str, dict[str, Array]] = defaultdict(dict)
    alone = 0
    for server_round in range(1, 5):
        before = store.load(server_round - 1).load_params()
        after = store.load(server_round).load_params()
        cohort = [silo for at, silo in trained if at == server_round]
        for name, parameter in before.items():
            total, weights = np.zeros(parameter.shape), np.zeros(parameter.shape)
            for silo in cohort:
                whole = trained[server_round, silo][name] + DECAY * lost[silo].get(name, 0.0)
                chosen = largest(whole)
                sent = np.zeros(whole.shape)
                sent[chosen] = two_bits(whole[chosen])
                lost[silo][name] = whole - sent
                total += tokens[server_round, silo] * sent
                weights += tokens[server_round, silo] * chosen
            alone += int((weights == tokens[server_round, cohort[0]]).sum())
            mean = np.divide(total, weights, out=np.zeros_like(total), where=weights > 0)
            np.testing.assert_allclose(
                after[name].double().numpy(), parameter.double().numpy() - mean, rtol=1e-4, atol=2e-6
            )
    assert alone > 100, "the mean over senders is not that over silos"
    assert len({silo for _, silo in trained}) == 3, "every silo was in a round"
