"""The Python interface: the same runs as the commands, from notebooks and threads."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import photon
from photon.errors import PhotonError
from photon.federation.round_events import RoundEvents
from photon.telemetry.events import Evaluated
from tests.conftest import SMALL, small_run

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
QUIET: Any = {"display": "none"}


def overrides(corpus: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.path={corpus}", "rounds=2", *more]


def test_a_run_is_trained_looked_at_and_exported(corpus: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    run = photon.train(overrides(corpus, "training.threads=1"), run_dir=tmp_path / "run", display="none")
    assert torch.get_num_threads() == threads
    assert run.is_finished
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, 2 of 2 rounds)"
    history = run.history
    assert list(history["round"]) == [0, 1, 2]
    assert history["perplexity"].iloc[-1] == pytest.approx(run.summary["perplexity"]["final"])
    assert history["tokens"].iloc[-1] == run.summary["tokens"] == run.silos["tokens"].sum()
    assert history["bytes_up"].sum() == run.silos["bytes_up"].sum()
    assert not history["train_loss"].iloc[1:].isna().any()
    assert set(run.silos["silo"]) <= {"alpha", "beta", "gamma"}
    export = run.export()
    assert (export / "config.json").is_file()
    assert run.generate("a", max_new_tokens=4) == run.generate("a", max_new_tokens=4)
    assert run.report(tmp_path / "page.html").read_text().startswith("<!")


def test_the_newest_model_is_evaluated_as_the_run_did(corpus: Path, tmp_path: Path) -> None:
    run = photon.train(overrides(corpus, "evaluation.sequences=null"), run_dir=tmp_path / "run", **QUIET)
    found = run.evaluate().set_index("silo")
    told = next(event.per_silo for event in reversed(run.events) if isinstance(event, Evaluated))
    assert {name: found["perplexity"][name] for name in found.index} == pytest.approx(
        {name: of["perplexity"] for name, of in told.items()}, rel=1e-4
    )
    with pytest.raises(PhotonError, match="nowhere"):
        run.evaluate(tmp_path / "nowhere")


def test_an_interrupted_run_goes_on_to_the_same_weights(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = photon.train(overrides(corpus), run_dir=tmp_path / "whole", **QUIET)
    checkpointed = RoundEvents.checkpointed

    def interrupt(self: Any, *arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(RoundEvents, "checkpointed", checkpointed)
        raise KeyboardInterrupt

    monkeypatch.setattr(RoundEvents, "checkpointed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        photon.train(overrides(corpus), run_dir=tmp_path / "run", **QUIET)
    run = photon.Run(tmp_path / "run")
    assert not run.is_finished
    with pytest.raises(PhotonError, match=r"not finished; go on with Run\.resume"):
        _ = run.summary
    assert len(run.history) >= 1
    assert run.resume(**QUIET).summary["weights_sha256"] == whole.summary["weights_sha256"]


def test_runs_of_one_process_take_turns_in_threads_and_in_a_running_loop(
    corpus: Path, tmp_path: Path
) -> None:
    alone = photon.train(overrides(corpus), run_dir=tmp_path / "alone", **QUIET).summary["weights_sha256"]
    runs: dict[str, photon.Run] = {}

    def train(name: str) -> None:
        runs[name] = photon.train(overrides(corpus), run_dir=tmp_path / name, **QUIET)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def within() -> None:
        train("three")

    asyncio.run(within())
    assert {name: run.summary["weights_sha256"] for name, run in runs.items()} == dict.fromkeys(
        ("one", "two", "three"), alone
    )


def test_runs_are_compared_in_a_table_and_a_page(corpus: Path, tmp_path: Path) -> None:
    one = photon.train(overrides(corpus), run_dir=tmp_path / "one", **QUIET)
    config = small_run("rounds=1", "strategy=diloco", data=corpus, run_dir=tmp_path / "other")
    two = photon.train(config, run_dir=tmp_path / "two", **QUIET)
    table = photon.compare([one, two.run_dir], report=tmp_path / "both.html")
    assert set(table["run"]) == {"one", "two"}
    assert table["perplexity"].is_monotonic_increasing
    assert dict(zip(table["run"], table["rounds"], strict=True)) == {"one": 2, "two": 1}
    assert "one" in (tmp_path / "both.html").read_text()
    told = one.summary["bytes"]
    row = table[table["run"] == one.run_dir.name].iloc[0]
    assert (row["bytes_up"], row["bytes_down"]) == (told["up"], told["down"])
    assert photon.compare([]).empty


def test_text_is_prepared_as_by_the_command(tmp_path: Path) -> None:
    for name in ("a", "b"):
        words = [f"{name}{number}" for number in range(400)]
        rows = [{"text": " ".join(words[start : start + 20])} for start in range(0, 400, 20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = photon.prepare(
        {"a": tmp_path / "a.jsonl", "b": [str(tmp_path / "b.jsonl")]},
        tmp_path / "data",
        vocab_size=300,
        sequence_length=16,
        near_duplicates="none",
    )
    assert set(manifest.silos) == {"a", "b"}


def test_what_is_wrong_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="did you mean 'rounds'"):
        photon.train(["rouds=3"])
    with pytest.raises(PhotonError, match=r"expected a list of texts, as \['rounds=3'\]"):
        photon.train("rounds=3")
    with pytest.raises(PhotonError, match="holds no run"):
        photon.Run(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = photon.trian


def test_the_page_does_what_it_says(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of docs/python.md as it stands, but with a small model."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    train = photon.train

    def small(given: list[str], *, run_dir: str) -> photon.Run:
        return train([*overrides(corpus), *given], run_dir=run_dir)

    monkeypatch.setattr(photon, "train", small, raising=False)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert {path.name for path in Path("runs").iterdir()} == {"first", "second", "compared.html"}
    assert "perplexity" in capsys.readouterr().out
    named = set(re.findall(r"`(?:photon|run)\.(\w+)", PAGE.read_text()))
    assert named <= {*photon.__all__, *dir(photon.Run), "errors"}
    assert {"evaluate", "prepare", "resume"} <= named


def test_commands_and_nodes_do_without_it() -> None:
    code = "import photon, sys; dir(photon); sys.exit('photon.api' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
