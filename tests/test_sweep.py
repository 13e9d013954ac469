"""Sweeps: what is trained, what fails, how it is ranked, how one goes on, and how Optuna searches."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from photon.cli import main
from photon.commands import jobs, search
from photon.commands.hydra_line import Line, read_line
from photon.commands.jobs import JOB, TRACEBACK, figure_of
from photon.commands.ranking import METRICS, RANKING, Ranked, over_seeds
from photon.config.compose import compose
from photon.errors import PhotonError
from tests.conftest import SMALL

Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Sweep]:
    """Call ``photon`` in this process; return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["photon", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return end.value.code, said.out, said.err

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def sweep(photon: Sweep, corpus: Path) -> Sweep:
    """Sweep small runs of one round below ``s``."""
    fixed = ("train", "-m", *SMALL, f"data.path={corpus}", "hydra.sweep.dir=s", "rounds=1")
    return lambda *arguments: photon(*fixed, *arguments)


def runs_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def written(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def test_a_run_that_fails_is_ranked_last_and_does_not_end_the_sweep(
    sweep: Sweep, photon: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = jobs._train

    def broken(composed: Any, folder: Path, answer: Any) -> None:
        if folder.name == "1-cohort=2":
            raise ValueError("nobody | expected this\nat all")
        train(composed, folder, answer)

    monkeypatch.setattr(jobs, "_train", broken)
    code, out, err = sweep("cohort=99,2,3")
    assert code == 1, err
    assert "0-cohort=99: cohort=99 is larger" in err
    assert "2 of 3 runs failed: s/0-cohort=99, s/1-cohort=2" in err
    assert "nobody | expected this" in (tmp_path / "s" / "1-cohort=2" / TRACEBACK).read_text()
    summary = json.loads((tmp_path / "s" / "2-cohort=3" / "summary.json").read_text())
    best = f"{summary['perplexity']['final']:.6g}"
    lines = (tmp_path / "s" / RANKING).read_text().splitlines()
    assert lines[4] == f"| 1 | {best} | cohort=3 | [2-cohort=3](2-cohort%3D3) |"
    assert lines[5].startswith("| – | – | cohort=99 | [0-cohort=99](0-cohort%3D99): cohort=99 is larger")
    assert lines[6].endswith(rf"ValueError: nobody \| expected this (see {TRACEBACK}) |")
    assert best in out
    rows = [line for line in out.splitlines() if "-cohort=" in line]
    assert len(rows) == 3
    assert all("is larger" not in line and "ValueError" not in line for line in rows), "reasons stand below"
    assert "\ncohort=99: cohort=99 is larger" in out
    assert "2-cohort=3" in (tmp_path / "s" / "report.html").read_text()
    # The same again, later, and by another figure.
    code, out, _ = photon("ranking", "s", "--metric", "tokens", "--maximize")
    assert code == 0
    assert f"{summary['tokens']:.6g}" in out
    assert "tokens, the largest first" in out


def test_a_sweep_goes_on_and_another_one_is_refused_in_its_folder(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, begun = jobs._train, []

    def stopped(composed: Any, folder: Path, answer: Any) -> None:
        begun.append(folder.name)
        if folder.name == "1-seed=1":
            raise KeyboardInterrupt
        train(composed, folder, answer)

    monkeypatch.setattr(jobs, "_train", stopped)
    code, _, err = sweep("seed=0,1", "rounds=2")
    assert code == 1, err
    assert "go on with the same command and hydra.sweep.dir=s" in err
    assert "not finished" in (tmp_path / "s" / RANKING).read_text()
    before = written(tmp_path / "s")
    assert list(before) == ["0-seed=0"]

    for other, words in (
        (("seed=0,2", "rounds=2"), "s: holds another sweep ("),
        (("seed=0,1", "rounds=2", "--metric", "tokens"), "ranks by --metric perplexity.final;"),
    ):
        code, _, err = sweep(*other)
        assert code == 2
        assert words in err
    with monkeypatch.context() as changed:
        changed.setattr(search, "compose", lambda chosen: compose([*chosen, "strategy.weighting=uniform"]))
        code, _, err = sweep("seed=0,1", "rounds=2")
    assert code == 2
    assert "what conf/ says has changed since" in err
    assert written(tmp_path / "s") == before

    monkeypatch.setattr(jobs, "_train", train)
    code, _, err = sweep("seed=0,1", "rounds=2")
    assert (code, err) == (0, "")
    after = written(tmp_path / "s")
    assert after["0-seed=0"] == before["0-seed=0"], "it was trained before"
    assert set(after) == {"0-seed=0", "1-seed=1"}

    # One that was killed between two rounds goes on from its checkpoint.
    run = tmp_path / "s" / "1-seed=1"
    weights = json.loads((run / "summary.json").read_text())["weights_sha256"]
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "round-000002")
    assert sweep("seed=0,1", "rounds=2")[0] == 0
    assert json.loads((run / "summary.json").read_text())["weights_sha256"] == weights
    assert '"resumed_from": 1' in (run / "events.jsonl").read_text()


def test_a_folder_with_something_else_is_left_alone(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "multirun.yaml").write_text("of an earlier version\n")
    code, _, err = sweep("seed=0,1")
    assert code == 2
    assert "s: holds something that is not of this sweep; choose another hydra.sweep.dir" in err
    assert runs_of(tmp_path / "s") == []


def test_optuna_searches_and_goes_on_with_the_same_draws(sweep: Sweep, tmp_path: Path) -> None:
    wanted = ("hydra/sweeper=optuna", "optimizer.lr=tag(log,interval(1e-5,1e-1))", "cohort=choice(2,3)")
    code, _, err = sweep(*wanted, "hydra.sweeper.n_trials=2")
    assert code == 0, err
    found = yaml.safe_load((tmp_path / "s" / "optimization_results.yaml").read_text())
    values = {
        name: json.loads((tmp_path / "s" / name / "summary.json").read_text())["perplexity"]["final"]
        for name in runs_of(tmp_path / "s")
    }
    assert len(values) == 2
    best = min(values, key=lambda name: values[name])
    assert found["best_value"] == values[best]
    assert f"optimizer.lr={found['best_params']['optimizer.lr']}" in best
    assert f"| 1 | {values[best]:.6g} |" in (tmp_path / "s" / RANKING).read_text()
    before = written(tmp_path / "s")
    assert sweep(*wanted, "hydra.sweeper.n_trials=3")[0] == 0
    after = written(tmp_path / "s")
    assert len(after) == 3
    assert before.items() <= after.items(), "the first two are the same, and were not trained again"


@pytest.mark.slow
def test_optuna_is_told_of_runs_that_fail(sweep: Sweep, tmp_path: Path) -> None:
    search_all = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "seed=range(0,3)", "cohort=99")
    code, out, err = sweep(*search_all)
    assert code == 1, err
    assert "2 of 2 runs failed" in err
    assert "cohort=99 is larger" in out
    names = runs_of(tmp_path / "s")
    code, out, err = sweep(*search_all)
    assert code == 1, err
    assert "has failed before" in err
    assert runs_of(tmp_path / "s") == names


@pytest.mark.slow
def test_runs_with_long_names_are_numbered(sweep: Sweep, tmp_path: Path) -> None:
    prompts = ",".join(f"'{letter * 150}/x'" for letter in "ab")
    assert sweep(f"telemetry.sample_prompt={prompts}")[0] == 0
    assert runs_of(tmp_path / "s") == ["0", "1"]
    assert "b" * 150 in json.loads((tmp_path / "s" / "1" / JOB).read_text())["overrides"][-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run_dir=x", "seed=0,1"], "set hydra.sweep.dir"),
        (["outer=fedavg,dilocco"], "did you mean 'diloco'"),
        (["seed=0,x"], "should be a valid integer"),
        (["seed=interval(0,3)"], "an interval has no values to go through"),
        (["seed=range(5,2)"], "gives no value at all"),
        (["seed=choice("], "seed=choice(: "),
        (["hydra.sweep.subdir=a/b", "seed=0,1"], "hydra.sweep.subdir: runs lie directly"),
        (["hydra.sweeper.params={seed: 3}"], "hydra.sweeper.params: give each key its values"),
        (["hydra.sweeper.direction=maximize", "seed=0,1"], "with --maximize the largest"),
        (["hydra/sweeper=ax", "seed=0,1"], "hydra/sweeper=ax: no such option"),
        (["hydra/sweeper=optuna"], "no key has more than one value"),
        (["hydra/sweeper=optuna", "rounds=int(interval(0,4))"], "rounds=0: input should be greater"),
        (
            ["hydra/sweeper=optuna", "seed=range(0,3)", "hydra.sweeper.storage=sqlite:///x.db"],
            "hydra.sweeper.storage=sqlite:///x.db: optuna 2.10.1 and SQLAlchemy 2.1.9 cannot work with it",
        ),
        (["seed=0,1", "--metric", "perplexity.finall"], "did you mean 'perplexity.final'"),
        (["seed=0,1", "--show"], "--show: is for one run"),
        (["seed=0,1", "--config", "config.yaml"], "--config: is for one run"),
    ],
)
def test_what_cannot_be_swept_is_one_line(
    arguments: list[str], words: str, photon: Sweep, tmp_path: Path
) -> None:
    code, _, err = photon("train", "-m", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_it_says_what_to_install(photon: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    code, _, err = photon("train", "-m", "hydra/sweeper=optuna", "seed=range(0,3)")
    assert code == 2
    assert "pip install 'photon-fl[sweep]'" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-cn", "x"], "--config-name: there is one configuration"),
        (["--config-dir=x"], "--config-dir: there is one configuration"),
        (["--experimental-rerun", "x"], "photon resume"),
        (["-r"], "--run: to run is what `photon train` does"),
        (["-sc", "x"], "photon --install-completion"),
        (["--cfg", "jobb"], "did you mean 'job'"),
        (["--cfg"], "--cfg: expected job or hydra or all"),
        (["--cfg", "job", "-m"], "--cfg: prints one configuration"),
        (["--resolve"], "add --cfg job"),
        (["--multirrun"], "did you mean '--multirun'"),
    ],
)
def test_what_hydra_has_and_photon_has_not_is_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(PhotonError) as refused:
        read_line(arguments)
    assert words in str(refused.value)


def test_hydras_options_are_read_as_hydra_does() -> None:
    assert read_line(["-m", "seed=0,1"]) == Line(["seed=0,1"], True, [])
    assert read_line(["a=1", "-c", "job", "-p", "b", "--resolve"]) == Line(
        ["a=1"], False, ["--cfg", "job", "--package", "b", "--resolve"]
    )
    assert read_line(["--info", "a=1"]) == Line(["a=1"], False, ["--info", "all"])
    assert read_line(["-i", "defaults"]) == Line([], False, ["--info", "defaults"])
    assert read_line(["--hydra-help"]) == Line([], False, ["--hydra-help"])


def test_cfg_prints_and_stops(photon: Sweep, tmp_path: Path) -> None:
    code, out, _ = photon("train", "--cfg", "job", "--resolve", "rounds=17")
    assert code == 0
    assert yaml.safe_load(out)["rounds"] == 17
    code, _, err = photon("train", "--cfg", "job", "rouds=17")
    assert code == 2
    assert "did you mean 'rounds'" in err
    code, out, _ = photon("train", "--help")
    assert "  strategy: anchor, centralized," in out
    assert list(tmp_path.iterdir()) == []


def test_runs_that_differ_in_their_seed_have_a_mean(tmp_path: Path) -> None:
    plan = jobs.Plan(["outer=a,b", "seed=0,1", "rounds=1"], ["outer", "seed"], "tokens", False, "")
    figures = {("b", 0): 3.0, ("b", 1): 5.0, ("a", 0): 10.0, ("a", 1): None}
    rows = [
        Ranked(
            jobs.Job(tmp_path / f"{outer}{seed}", [f"outer={outer}", f"seed={seed}", "rounds=1"]),
            value,
            "" if value is not None else "it failed",
        )
        for (outer, seed), value in figures.items()
    ]
    better, worse = over_seeds(rows, plan)
    assert better == ("outer=b", 4.0, pytest.approx(2**0.5), 2)
    assert worse == ("outer=a", 10.0, None, 1), "who failed is in no mean, and one run has no spread"
    only_seeds = jobs.Plan(["seed=0,1"], ["seed"], "tokens", False, "")
    assert over_seeds(rows, only_seeds) == []


def test_every_figure_that_ranks_is_in_a_summary(run_small: Callable[..., dict[str, Any]]) -> None:
    summary = run_small("rounds=1")
    for name in METRICS:
        found: Any = summary
        for key in name.rstrip(".").split("."):
            # None where a run has no tasks, or no labels.
            found = found[key] if found is not None else None
    figures = {"a": {"b.c": {"d": 2}, "e": True, "f": None, "g": "3"}}
    assert figure_of(figures, ["a", "b", "c", "d"]) == 2.0
    assert [figure_of(figures, ["a", key]) for key in ("e", "f", "g", "h")] == [None] * 4
