"""Folders of the earlier format, whose windows have no token more, are read and trained on."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from photon.data.prepared import SPLITS, PreparedData
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events
from tests.golden.drive import as_earlier


def earlier(folder: Path, corpus: Path) -> Path:
    """Copy prepared text to a folder of the earlier format."""
    shutil.copytree(corpus, folder)
    as_earlier(folder)
    return folder


def test_its_windows_are_as_long_as_sequences(corpus: Path, tmp_path: Path) -> None:
    now = PreparedData.open(corpus)
    folder = earlier(tmp_path / "data", corpus)
    data = PreparedData.open(folder)
    data.verify()
    length = data.manifest.sequence_length
    for silo in data.silo_names:
        for split in SPLITS:
            windows = data.windows(silo, split)
            assert windows.shape[1] == length == now.windows(silo, split).shape[1] - 1
            assert np.array_equal(windows, now.windows(silo, split)[:, :-1])


def test_a_run_counts_the_tokens_of_sequences_with_either(
    corpus: Path, tmp_path: Path, run_small: Callable[..., dict[str, Any]]
) -> None:
    folder = earlier(tmp_path / "data", corpus)
    told, losses = [], []
    for name, data in (("now", corpus), ("earlier", folder)):
        run_small("rounds=1", data=data, name=name)
        events = list(read_events(tmp_path / name / "events.jsonl"))
        told.append([event.tokens for event in events if isinstance(event, SiloFinished)])
        losses.append([event.loss for event in events if isinstance(event, SiloFinished)])
    assert told[0] == told[1]
    assert losses[0] != losses[1], "the last token of a window is told in one of them alone"
