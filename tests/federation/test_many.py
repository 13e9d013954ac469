"""Many silos, of which few are in a round: what a round costs follows its cohort."""

import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from photon.data.prepared import MANIFEST_NAME, SPLITS, PreparedData, silo_file
from photon.engine.inprocess import InProcessGrid, run_inprocess
from photon.federation.federation import Federation
from photon.federation.measuring import BESIDE
from photon.federation.run import prepare_run
from photon.node import answer
from tests.conftest import small_run

Prepare = Callable[[int], Path]


@pytest.fixture
def many_silos(corpus: Path, tmp_path: Path) -> Prepare:
    """Prepare so many silos of a few windows each."""

    def prepare(count: int) -> Path:
        whole, target, silos = PreparedData.open(corpus), tmp_path / f"silos-{count}", {}
        shutil.copytree(whole.tokenizer_path, target / "tokenizer")
        for number in range(count):
            name, entry = f"silo-{number:04d}", whole.manifest.silos["alpha"]
            (target / "silos" / name).mkdir(parents=True)
            np.save(silo_file(target, name, "unigram"), whole.unigram("alpha"))
            for split in SPLITS:
                windows = whole.windows("alpha", split)[number % 8 :: 8][:8]
                np.save(silo_file(target, name, split), windows)
                size = {"sequences": len(windows), "tokens": windows.size}
                entry = entry.model_copy(update={split: getattr(entry, split).model_copy(update=size)})
            silos[name] = entry
        manifest = whole.manifest.model_copy(update={"silos": silos})
        (target / MANIFEST_NAME).write_text(manifest.model_dump_json())
        return target

    return prepare


def events_by_round(run_dir: Path) -> dict[int, int]:
    """Return the bytes of the events of each round."""
    sizes: Counter[int] = Counter()
    for line in (run_dir / "events.jsonl").read_text().splitlines():
        if (number := json.loads(line).get("round")) is not None:
            sizes[number] += len(line) + 1
    return dict(sizes)


def test_a_round_asks_its_cohort_and_a_few_others(
    many_silos: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    push = InProcessGrid.push_messages

    def counting(self: InProcessGrid, messages: Any) -> Any:
        messages = list(messages)
        asked.update(message.metadata.group_id for message in messages)
        return push(self, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", counting)
    config = small_run("cohort=4", "local_steps=1", data=many_silos(60), run_dir=tmp_path / "run")
    run_inprocess(prepare_run(config), answer, resume=False)
    assert {group: count for group, count in asked.items() if group.startswith("round")} == {
        f"round-{number}": 4 for number in (1, 2, 3)
    }
    assert asked["evaluate-0"] == asked["evaluate-3"] == 60
    assert 4 < asked["evaluate-1"] <= 4 + BESIDE
    assert 4 < asked["evaluate-2"] <= 4 + BESIDE
    sizes = events_by_round(tmp_path / "run")
    assert max(sizes[1], sizes[2]) < 8_000


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_thousand_silos_and_three_hundred_rounds_leave_memory_and_time_flat(
    many_silos: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, memory = [], []
    once, process = Federation._round, psutil.Process()

    def timed(self: Federation, checkpoint: Any) -> Any:
        begin = time.process_time()
        after = once(self, checkpoint)
        seconds.append(time.process_time() - begin)
        memory.append(process.memory_full_info().uss / 2**20)
        return after

    monkeypatch.setattr(Federation, "_round", timed)
    overrides = ("rounds=300", "cohort=16", "local_steps=2")
    config = small_run(*overrides, data=many_silos(1000), run_dir=tmp_path / "run")
    run_inprocess(prepare_run(config), answer, resume=False, live=False)
    # Rounds in which all silos measure the model are a few in a hundred.
    assert statistics.median(seconds[250:]) < 1.25 * statistics.median(seconds[20:70])
    assert statistics.median(memory[250:]) < 1.1 * statistics.median(memory[60:110])
    sizes = events_by_round(tmp_path / "run")
    assert statistics.median(sizes[number] for number in range(1, 300)) < 20_000
