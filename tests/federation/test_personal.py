"""A silo goes on alone from the model of a federation, and the report shows what it got."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from photon.commands.app import app
from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.load import open_run_checkpoint
from photon.federation.personal import model_of_silo
from photon.models.pretrained import load_pretrained
from photon.report.write import write_report
from photon.telemetry.events import Evaluated
from photon.telemetry.log import read_events
from photon.training.groups import read_params
from tests.adapted import adapted
from tests.objective.test_anchor import ANCHORED
from tests.objective.test_dpo import write_pairs
from tests.objective.test_sft import write_chats

SHORT = [
    "rounds=2",
    "local_steps=4",
    "training.threads=1",
    "telemetry.display=none",
    "telemetry.report=false",
]
LAST = ["telemetry.export=false", "telemetry.sample_tokens=0"]
EXPORTED = ["telemetry.export=true"]


def tune(*arguments: str) -> None:
    """Call the command; it raises what it would print."""
    result = CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def evaluated(run_dir: Path) -> list[Evaluated]:
    return [event for event in read_events(run_dir / "events.jsonl") if isinstance(event, Evaluated)]


def rows_of_report(run_dir: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Return the table on own models, silo by silo."""
    from tests.report.test_report import Page

    write_report([run_dir], tmp_path / "report.html")
    tables = Page((tmp_path / "report.html").read_text()).tables
    (rows,) = [rows for _, rows in tables if "after its own tuning" in rows[0]]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[1:]}


def test_a_silo_starts_from_the_global_model_and_gets_better(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small(*EXPORTED)
    run_dir = tmp_path / "run"
    assert [row[-1] for row in rows_of_report(run_dir, tmp_path).values()] == ["not tuned"] * 3
    before = {
        file: file.read_bytes() for file in sorted((run_dir / "checkpoints").rglob("*")) if file.is_file()
    }
    tune(str(run_dir), "--silo", "beta", *SHORT, *LAST, "optimizer.lr=1e-2")
    own = run_dir / "tuned" / "beta"
    first, *_, last = evaluated(own)
    merged = evaluated(run_dir)[-1].per_silo["beta"]
    assert first.per_silo["beta"]["loss"] == pytest.approx(merged["loss"], abs=1e-6)
    assert last.loss < first.loss
    assert PreparedData.open(own / "data").silo_names == ["beta"]
    assert rows_of_report(run_dir, tmp_path)["beta"][-1] == f"{last.perplexity:,.1f}"
    after = {
        file: file.read_bytes() for file in sorted((run_dir / "checkpoints").rglob("*")) if file.is_file()
    }
    assert after == before, "the run itself is as it was"
    with pytest.raises(PhotonError, match="already holds a run; go on with `photon resume"):
        tune(str(run_dir), "--silo", "beta", *SHORT, *LAST)


def test_an_export_and_a_folder_with_the_silo_s_text_are_enough(
    run_small: Callable[..., dict[str, Any]], silo_folders: dict[str, Path], tmp_path: Path
) -> None:
    run_small(*EXPORTED, "rounds=1")
    member = tmp_path / "member"
    shutil.copytree(tmp_path / "run" / "export", member / "model")
    shutil.rmtree(tmp_path / "run")
    own = member / "own"
    where = ["--data", str(silo_folders["alpha"]), "--output", str(own)]
    tune(str(member / "model"), "--silo", "alpha", *where, *SHORT, *LAST)
    assert json.loads((own / "summary.json").read_text())["status"] == "finished"
    assert not (own / "data").exists(), "text of the silo alone is read where it lies"
    result = CliRunner().invoke(app, ["resume", str(own)], catch_exceptions=False)
    assert result.exit_code == 0


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("overrides", "has_own"),
    [
        (["strategy=sparsyfed"], False),
        (["strategy=lordo"], False),
        (["strategy=local-adam"], False),
        (["strategy=fedper", "strategy.key_fraction=1.0"], True),
        (["strategy=worldlm", "federation.tree={north: [alpha, beta], south: [gamma]}", "cohort=null"], True),
        (
            ["model.architecture.n_layer=3", "model.abbie={head_blocks: 1, body_blocks: 1, tail_blocks: 1}"],
            False,
        ),
    ],
    ids=["sparsyfed", "lordo", "local-adam", "fedper", "tree", "abbie"],
)
def test_it_starts_from_the_model_that_the_silo_has_at_the_end(
    overrides: list[str], has_own: bool, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    run_small("rounds=2", *overrides)
    run_dir = tmp_path / "run"
    checkpoint, config = open_run_checkpoint(run_dir)
    _, is_own = model_of_silo(config, checkpoint, "beta")
    assert is_own == has_own
    tune(str(run_dir), "--silo", "beta", "rounds=1", "local_steps=1", *SHORT[2:], *LAST)
    last = evaluated(run_dir)[-1]
    merged = {**last.per_silo, **last.per_node}["beta"]
    first = evaluated(run_dir / "tuned" / "beta")[0]
    assert first.per_silo["beta"]["loss"] == pytest.approx(merged["loss"], abs=2e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(("objective", "write"), [("dpo", write_pairs), ("sft", write_chats)])
def test_own_adapters_are_merged_and_tuned_on_text_of_their_kind(
    objective: str, write: Any, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tuned = adapted(tmp_path, objective, write)
    run_small(*tuned.overrides, "strategy=fedper", "strategy.key_fraction=1.0", "rounds=2", data=tuned.data)
    run_dir = tmp_path / "run"
    checkpoint, config = open_run_checkpoint(run_dir)
    params, is_own = model_of_silo(config, checkpoint, "beta")
    assert is_own
    assert params.keys() == read_params(load_pretrained(tmp_path / "base")).keys()
    tune(str(run_dir), "--silo", "beta", "rounds=1", "local_steps=1", *SHORT[2:], *LAST)
    first = evaluated(run_dir / "tuned" / "beta")[0]
    if objective == "sft":
        own = evaluated(run_dir)[-1].per_node["beta"]
        assert first.per_silo["beta"]["loss"] == pytest.approx(own["loss"], abs=2e-6)
    else:
        # The model that is preferred to is the one that it starts from.
        assert first.per_silo["beta"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_text_of_another_kind_is_told_before_anything_is_written(
    run_small: Callable[..., dict[str, Any]], labelled: Path, tmp_path: Path
) -> None:
    run_small("rounds=1", *ANCHORED, data=labelled)
    with pytest.raises(PhotonError, match="CausalLM cannot train on the labelled"):
        tune(str(tmp_path / "run"), "--silo", "a")
    assert not (tmp_path / "run" / "tuned" / "a" / "start").exists()


def test_what_is_trained_is_plain_training_of_the_start(
    run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One step of plain SGD moves by learning rate times gradient, and by nothing of the federation."""
    run_small("rounds=1")
    run_dir = tmp_path / "run"
    sgd = ["optimizer=sgd", "optimizer.lr=0.5", "optimizer.momentum=0", "schedule=constant"]
    tune(str(run_dir), "--silo", "alpha", "rounds=1", "local_steps=1", *sgd, *SHORT[2:], *LAST)
    own = run_dir / "tuned" / "alpha"
    start = read_params(load_pretrained(own / "start"))
    begun, ended = (open_run_checkpoint(own / "checkpoints" / f"round-{n:06}")[0] for n in (0, 1))
    assert all(torch.equal(tensor, start[name]) for name, tensor in begun.load_params().items())
    moved = {name: ended.load_params()[name] - tensor for name, tensor in start.items()}
    event = next(e for e in read_events(own / "events.jsonl") if type(e).__name__ == "SiloFinished")
    norm = torch.sqrt(sum((delta.double() ** 2).sum() for delta in moved.values()))
    clipped = min(1.0, 1.0 / event.gradient_norm)  # type: ignore[attr-defined]
    wanted = event.learning_rate * event.gradient_norm * clipped  # type: ignore[attr-defined]
    assert float(norm) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--silo", "betta"], r"--silo betta: no such silo.*'?beta"),
        (["--silo", "beta", "run_dir=elsewhere"], "use --output"),
        (["--silo", "beta", "data.path=elsewhere"], "use --data"),
        (["--silo", "beta", "model.warm_start=elsewhere"], "use SOURCE"),
        (["--silo", "beta", "federation=deployment"], "what a silo tunes stays on its machine"),
        (["--silo", "beta", "optimizer.lrr=1"], r"lrr.*lr"),
    ],
    ids=["silo", "run_dir", "data", "model", "engine", "typo"],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str], told: str, trained_once: Path
) -> None:
    with pytest.raises(PhotonError, match=told) as raised:
        tune(str(trained_once), *arguments)
    assert "\n" not in str(raised.value)
    assert not (trained_once / "tuned").exists()


@pytest.fixture(scope="module")
def trained_once(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from photon.engine.inprocess import run_inprocess
    from photon.federation.run import prepare_run
    from photon.node import answer
    from tests.conftest import small_run

    run_dir = tmp_path_factory.mktemp("once") / "run"
    config = small_run("rounds=1", *EXPORTED, data=corpus, run_dir=run_dir)
    run_inprocess(prepare_run(config), answer, resume=False)
    return run_dir


def test_no_folder_and_no_text_are_told(trained_once: Path, lone_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="no such folder; give a run, a checkpoint or an exported model"):
        tune(str(tmp_path / "nowhere"), "--silo", "beta")
    with pytest.raises(PhotonError, match="name it with --data"):
        tune(str(trained_once / "export"), "--silo", "beta")
    with pytest.raises(PhotonError, match="prepared with another tokenizer"):
        tune(str(trained_once / "export"), "--silo", "alone", "--data", str(lone_corpus))


def test_a_run_that_is_going_on_is_not_tuned_from(trained_once: Path) -> None:
    from filelock import FileLock

    from photon.files.owner import OWNER

    owner = trained_once / OWNER
    kept = owner.read_text() if owner.exists() else None
    owner.unlink(missing_ok=True)
    try:
        with FileLock(trained_once / ".lock"), pytest.raises(PhotonError, match="still going on"):
            tune(str(trained_once), "--silo", "beta")
    finally:
        if kept is not None:
            owner.write_text(kept)


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ('{"perplexity": {"per_silo": {"beta": {"final": 12.5}}}}', "12.5"),
        ('{"perplexity": {"per_silo": {"beta": {"final": "<b>1</b>"}}}}', "cannot be read"),
        ('{"perplexity": {"per_silo": {"beta": {"final": -1}}}}', "cannot be read"),
        ('{"perplexity": {"per_silo": {"beta": {"final": NaN}}}}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "cannot be read"),
    ],
    ids=["figures", "text", "negative", "nan", "nested", "empty"],
)
def test_figures_that_a_member_hands_over_are_not_believed(
    summary: str, told: str, trained_once: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_once, folder)
    (folder / "tuned" / "beta").mkdir(parents=True)
    (folder / "tuned" / "beta" / "summary.json").write_text(summary)
    assert rows_of_report(folder, tmp_path)["beta"][-1] == told


def test_a_figure_of_an_earlier_round_says_so(trained_once: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained_once, folder)
    own = folder / "tuned" / "beta"
    own.mkdir(parents=True)
    (own / "summary.json").write_text('{"perplexity": {"per_silo": {"beta": {"final": 12.5}}}}')
    (own / "origin.json").write_text('{"round": 7}')
    assert rows_of_report(folder, tmp_path)["beta"][-1] == "12.5 (from round 7)"
