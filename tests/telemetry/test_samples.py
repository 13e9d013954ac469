"""Texts that the model writes while it is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from photon.errors import PhotonError
from photon.report.sample_section import sample_section
from photon.telemetry.samples import SAMPLES, Sample, read_samples


def test_a_run_writes_a_text_every_few_rounds(run_small: Callable[..., Any], tmp_path: Path) -> None:
    run_small(
        "telemetry=samples",
        "telemetry.report=true",
        "telemetry.listeners.3.every=2",
        "telemetry.sample_tokens=5",
        "rounds=3",
    )
    samples = read_samples(tmp_path / "run")
    assert [sample.round for sample in samples] == [2, 3]
    assert all(sample.text.startswith("The ") and len(sample.text) > 4 for sample in samples)
    assert not list((tmp_path / "run").glob(".sample-*"))
    assert "Text by round" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("override", "told"), [("listeners.3.every=0", "at least 1"), ("sample_tokens=0", "nothing to do")]
)
def test_what_makes_no_sense_is_refused(run_small: Callable[..., Any], override: str, told: str) -> None:
    with pytest.raises(PhotonError, match=told):
        run_small("telemetry=samples", f"telemetry.{override}")


def test_what_is_damaged_is_left_out_and_a_round_counts_once(tmp_path: Path) -> None:
    lines = [
        json.dumps({"round": 10, "text": "lost"}),
        json.dumps({"round": 5, "text": "five"}),
        "nonsense",
        "[]",
        json.dumps({"round": None}),
        json.dumps({"round": 10, "text": "ten <b>"}),
        '{"round": 20, "text": "torn',
    ]
    (tmp_path / SAMPLES).write_text("\n".join(lines))
    assert read_samples(tmp_path) == [Sample(5, "five"), Sample(10, "ten <b>")]
    run: Any = SimpleNamespace(folder=tmp_path, summary={"rounds": 7})
    ((title, (panel,)),) = sample_section(run)
    assert title == "Text"
    assert panel.tables[0].rows == [["5", "five"]], "what is to be done again is not shown"  # type: ignore[union-attr]
    assert sample_section(SimpleNamespace(folder=tmp_path / "none", summary={"rounds": 7})) == []  # type: ignore[arg-type]
