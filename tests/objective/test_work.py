"""An objective that chooses what a silo trains on in a round, and makes arrays for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from photon.config.schema import RunConfig
from photon.data.loader import BatchStream
from photon.data.prepared import PreparedData
from photon.errors import PhotonError, RunError
from photon.silo import work
from photon.telemetry.events import Diagnostics, SiloFinished
from photon.telemetry.log import read_events

Run = Callable[..., dict[str, Any]]
CHOSEN = "objective._target_=tests.objective.toy.Chosen"


def test_a_run_trains_on_what_is_chosen_and_repeats(
    run_small: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[set[str], int]] = []

    def stream(arrays: Any, *where: int, **tokens: int) -> BatchStream:
        opened.append((set(arrays), len(arrays["tokens"][0])))
        return BatchStream(arrays, *where, **tokens)

    monkeypatch.setattr(work, "BatchStream", stream)
    chosen = (CHOSEN, "cohort=3", "rounds=2", "telemetry.diagnostics=true", "checkpoint.keep=3")
    whole = run_small(*chosen, name="whole")
    data = PreparedData.open(corpus)
    sizes = {
        (number, silo): len(np.arange(number % 3, len(data.windows(silo, "train")), 3))
        for number in (1, 2)
        for silo in data.silo_names
    }
    assert opened == [({"tokens", "labels"}, size) for size in sizes.values()]
    events = read_events(tmp_path / "whole" / "events.jsonl")
    ends = {(e.round, e.silo): e.tokens for e in events if isinstance(e, SiloFinished)}
    assert set(ends) == set(sizes)
    told = [event.values for event in events if isinstance(event, Diagnostics)]
    assert any("chosen" in figure for values in told for figure in values), told
    again = run_small(*chosen, name="again")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert run_small("cohort=3", "rounds=2", name="all")["weights_sha256"] != whole["weights_sha256"]


def test_what_cannot_be_chosen_is_one_line(run_small: Run) -> None:
    with pytest.raises(RunError, match=r"what it has chosen is not among the \d+ windows"):
        run_small("objective._target_=tests.objective.toy.Beyond", "cohort=1", name="beyond")
    with pytest.raises((PhotonError, RunError), match="the objective chooses its windows in one process"):
        run_small(CHOSEN, "training.processes=2", "cohort=1", name="group")


def test_arrays_that_are_not_whole_numbers_keep_their_type(small_config: Callable[..., RunConfig]) -> None:
    arrays = {"tokens": [np.arange(8).reshape(4, 2)], "scores": [np.linspace(0, 1, 8).reshape(4, 2)]}
    batch = BatchStream(arrays, 0).next_batch(3)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "tokens": torch.int64,
        "scores": torch.float64,
    }
    torch.testing.assert_close(batch["scores"], batch["tokens"].double() / 7)
