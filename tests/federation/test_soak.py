"""Killed again and again, at any moment and with a damaged disk, a run ends with the very same weights."""

import json
import logging
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from photon.config.schema import RunConfig
from photon.engine.inprocess import run_inprocess
from photon.federation.run import prepare_run
from photon.node import answer
from photon.state.checkpoint import CheckpointStore
from photon.telemetry.events import RoundFinished
from photon.telemetry.log import current_history, read_events
from tests.conftest import small_run
from tests.federation.crash import carry_on, forking

ROUNDS, KILLS = 40, 25
TREE = "federation.tree={north: [alpha, beta], gamma: null}"
METHODS = {
    "plain": ["cohort=2"],
    "diloco": ["cohort=2", "outer=diloco", "link=topk"],
    "desloc": ["cohort=2", "strategy=desloc"],
    "lordo": ["cohort=2", "strategy=lordo", "optimizer.rank=3"],
    "streaming": ["cohort=2", "strategy=streaming-diloco", "strategy.fragments=2"],
    "worldlm": ["cohort=null", "strategy=worldlm", TREE, "federation.inner_rounds=2"],
}
COMMON = [f"rounds={ROUNDS}", "local_steps=2", "evaluation.every=10", "checkpoint.permanent_every=10"]


def begun(run_dir: Path) -> int:
    """Return how many rounds were begun, again or for the first time."""
    try:
        return (run_dir / "events.jsonl").read_bytes().count(b'"event": "round_started"')
    except FileNotFoundError:
        return 0


def damage(run_dir: Path, draw: random.Random) -> bool:
    """Damage the newest checkpoint if there is one before it to go on from; return whether."""
    rounds = CheckpointStore(run_dir / "checkpoints").rounds()
    if len(rounds) < 2 or rounds[-2] != rounds[-1] - 1:
        return False
    newest = run_dir / "checkpoints" / f"round-{rounds[-1]:06d}"
    file = draw.choice(sorted(path for path in newest.iterdir() if path.name != "previous.safetensors"))
    how = draw.randrange(3)
    if how == 0:
        file.unlink()
        return True
    content = bytearray(file.read_bytes())
    if how == 1:
        del content[draw.randrange(len(content)) :]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return True


def killed_to_the_end(config: RunConfig, run_dir: Path, draw: random.Random) -> tuple[int, int]:
    """Do a run to its end in processes that are killed; return how many were, and how many damages."""
    kills = damages = 0
    while True:
        process, before = forking().Process(target=carry_on, args=(config,)), begun(run_dir)
        process.start()
        at, seconds = before + draw.choice((1, 2, 3)), draw.uniform(0, 0.3)
        while process.is_alive() and begun(run_dir) < at:
            time.sleep(0.005)
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return kills, damages
        kills += 1
        if draw.random() < 0.25:
            damages += damage(run_dir, draw)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_forty_rounds_through_kills_and_damage(method: str, corpus: Path, tmp_path: Path) -> None:
    def config(name: str) -> RunConfig:
        return small_run(*METHODS[method], *COMMON, data=corpus, run_dir=tmp_path / name)

    straight: dict[str, Any] = run_inprocess(prepare_run(config("straight")), answer, resume=False)
    run_dir, begin = tmp_path / "killed", time.perf_counter()
    kills, damages = killed_to_the_end(config("killed"), run_dir, random.Random(method))
    seconds = time.perf_counter() - begin
    logging.getLogger(__name__).info("%s: %d kills, %d damages, %.0f s", method, kills, damages, seconds)
    assert kills >= KILLS
    summary = json.loads((run_dir / "summary.json").read_text())
    for figure in ("weights_sha256", "rounds", "tokens", "status", "failures", "perplexity"):
        assert summary[figure] == straight[figure], figure
    history = current_history(read_events(run_dir / "events.jsonl"))
    assert [e.round for e in history if isinstance(e, RoundFinished)] == list(range(1, ROUNDS + 1))
    # Of a silo that was not asked since, they go when it is.
    folders = [
        run_dir / "checkpoints",
        *run_dir.glob("silos/north"),
        *run_dir.glob("silos/north/checkpoints"),
    ]
    assert not [left for folder in folders for left in folder.glob(".*.tmp") if left.is_dir()]
    assert set(CheckpointStore(run_dir / "checkpoints").rounds()) == {10, 20, 30, 39, 40}
