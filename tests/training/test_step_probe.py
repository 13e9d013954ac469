"""What a machine is found to be fast at: in turn, in its own CPU time, once and for good."""

import json
import subprocess
import sys
import time

import pytest
import torch

from photon.training import step_probe
from photon.training.step_probe import measure_gains, remembered_gains


def work(size, times):
    matrix = torch.ones(size, size)

    def step():
        for _ in range(times):
            matrix @ matrix

    return step


def test_gains_are_ratios_of_cpu_time_and_the_process_stays_as_it_was():
    torch.manual_seed(5)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()

    def drawing():
        torch.rand(3)
        work(192, 40)()

    started = time.thread_time()
    gains = measure_gains({"long": drawing, "half": work(192, 20), "same": work(192, 40)})
    assert time.thread_time() - started < 4.0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert list(gains) == ["half", "same"]
    assert gains["half"] == pytest.approx(2.0, rel=0.25)
    assert gains["same"] == pytest.approx(1.0, rel=0.2)


@pytest.mark.slow
def test_the_probe_finds_nearly_the_same_beside_other_work():
    """Whole processes that compute take the processor away from it, and nothing of what it finds."""
    busy = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: sum(range(10000))"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(4)]
    try:
        beside = measure_gains({"long": work(192, 40), "half": work(192, 20)})
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert beside["half"] == pytest.approx(2.0, rel=0.3)


def test_a_step_that_takes_long_is_timed_a_few_times_and_a_short_one_often(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(step_probe.time, "thread_time", lambda: clock[0])

    def turns(seconds):
        called = [0]

        def step():
            called[0] += 1
            clock[0] += seconds

        measure_gains({"one": step})
        return called[0] - 1  # The first is not timed.

    assert turns(60.0) == 3
    assert turns(1.0) == 7
    assert turns(0.11) == 14
    assert turns(0.001) == 200


def test_what_a_machine_was_found_to_do_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    found, calls = [2.0], []

    def measure():
        calls.append(found[0])
        return {"bf16": found[0]}

    assert remembered_gains("tiny", measure) == remembered_gains("tiny", measure) == {"bf16": 2.0}
    found[0] = 0.5
    assert remembered_gains("tiny", measure) == {"bf16": 2.0}
    assert calls == [2.0]
    # Another model, another machine with the same home, and a file that is damaged, are measured.
    assert remembered_gains("large", measure) == {"bf16": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(step_probe, "_machine", lambda: "another")
        assert remembered_gains("tiny", measure) == {"bf16": 0.5}
    assert remembered_gains("tiny", measure) == {"bf16": 2.0}
    file = tmp_path / "home" / "machine.json"
    for damaged in ("", "[]", '{"steps": {"x": "fast"}}', '{"steps": {"x": {"y": {"z": "fast"}}}}', "no"):
        file.write_text(damaged)
        assert remembered_gains("tiny", measure) == {"bf16": 0.5}
    # It does not grow without end.
    monkeypatch.setattr(step_probe, "_REMEMBERED", 3)
    for number in range(5):
        remembered_gains(f"model {number}", measure)
    (models,) = json.loads(file.read_text())["steps"].values()
    assert list(models) == ["model 2", "model 3", "model 4"]
    # A home that cannot be written.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "file" / "home"))
    assert remembered_gains("tiny", measure) == {"bf16": 0.5}
