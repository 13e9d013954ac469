"""A pipe in the place of a run's events does not hold the page."""

import os
from pathlib import Path

from photon.ui.found import find_runs


def test_a_pipe_is_no_run(tmp_path: Path) -> None:
    for name in ("good", "pipe"):
        (tmp_path / name).mkdir()
    (tmp_path / "good" / "events.jsonl").write_text("")
    os.mkfifo(tmp_path / "pipe" / "events.jsonl")
    assert find_runs([tmp_path]) == {"good": tmp_path / "good"}
