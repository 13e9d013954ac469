from pathlib import Path

import pytest

from photon.engine.inprocess import run_inprocess
from photon.federation.run import prepare_run
from photon.node import answer
from photon.telemetry.steps import STEPS, Steps, TellSteps, read_steps
from tests.conftest import small_run


def test_steps_are_told_as_often_as_a_person_looks(tmp_path: Path) -> None:
    now = 0.0
    tell = TellSteps(tmp_path / "alpha", 3, 100, 64, clock=lambda: now)
    assert read_steps(tmp_path / "alpha") == Steps(3, 0, 64)
    tell(100, 1.0)
    assert read_steps(tmp_path / "alpha") == Steps(3, 0, 64), "half a second is not over"
    now = 0.6
    tell(111, 1.0)
    assert read_steps(tmp_path / "alpha") == Steps(3, 12, 64)


@pytest.mark.parametrize("content", ["", "[1, 2", "{}", "[1, 2]", '["a", 1, 2]', "null", "\udcff"])
def test_what_cannot_be_read_is_no_news(tmp_path: Path, content: str) -> None:
    (tmp_path / STEPS).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_steps(tmp_path) is None
    assert read_steps(tmp_path / "nowhere") is None


def test_a_disk_that_takes_no_more_does_not_stop_a_silo(tmp_path: Path) -> None:
    (tmp_path / "alpha").write_text("a file where the folder is to be")
    TellSteps(tmp_path / "alpha", 1, 0, 2)(0, 1.0)


def test_silos_of_a_run_say_how_far_they_are(corpus: Path, tmp_path: Path) -> None:
    config = small_run("rounds=2", "local_steps=3", "cohort=null", data=corpus, run_dir=tmp_path)
    run_inprocess(prepare_run(config), answer, resume=False)
    told = {folder.parent.name: read_steps(folder.parent) for folder in tmp_path.glob(f"silos/*/{STEPS}")}
    assert told.keys() == {"alpha", "beta", "gamma"}
    assert {(at.round, at.asked) for at in told.values() if at is not None} == {(2, 3)}
