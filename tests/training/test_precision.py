import subprocess
import sys
import time

import pytest
import torch

from photon.errors import PhotonError
from photon.training import precision
from photon.training.precision import bf16_speedup_on_cpu, measure_bf16_speedup, resolve_precision

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_is_asked_for_is_taken(name):
    assert resolve_precision(name, CPU) == name


def test_fp16_is_for_gpus():
    assert resolve_precision("fp16", GPU) == "fp16"
    with pytest.raises(PhotonError, match="fp16 needs a GPU"):
        resolve_precision("fp16", CPU)


def test_unknown_precision_is_refused():
    with pytest.raises(PhotonError, match="fp8 is unknown"):
        resolve_precision("fp8", CPU)


@pytest.mark.parametrize(("speedup", "expected"), [(1.19, "fp32"), (1.2, "bf16"), (0.1, "fp32")])
def test_auto_on_cpu_needs_a_clear_gain(monkeypatch, speedup, expected):
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: speedup)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_gpu_follows_the_capability(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert resolve_precision("auto", GPU) == expected


def test_a_gpu_without_bf16_does_not_go_on_in_an_emulation_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(PhotonError, match="precision=bf16: this GPU has no bf16"):
        resolve_precision("bf16", GPU)


def test_probe_agrees_with_the_instruction_set_is_short_and_leaves_the_process_as_it_was():
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    started = time.thread_time()
    speedup = measure_bf16_speedup()
    assert time.thread_time() - started < 4.0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert speedup < 1.2


def test_the_probe_finds_nearly_the_same_beside_other_work():
    """Whole processes that compute take the processor away from it, and nothing of what it finds."""
    alone = measure_bf16_speedup()
    busy = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: sum(range(10000))"
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(4)]
    try:
        beside = measure_bf16_speedup()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert 0.6 < beside / alone < 1.6


def test_what_a_machine_was_found_to_do_is_remembered(monkeypatch, tmp_path):
    found, calls = [2.0], []

    def measure():
        calls.append(found[0])
        return found[0]

    def in_a_new_process():
        bf16_speedup_on_cpu.cache_clear()
        return bf16_speedup_on_cpu()

    monkeypatch.setattr(precision, "measure_bf16_speedup", measure)
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    assert in_a_new_process() == bf16_speedup_on_cpu() == 2.0
    found[0] = 0.5
    assert in_a_new_process() == 2.0
    assert calls == [2.0]
    # Another machine with the same home, and a file that is damaged, are measured.
    monkeypatch.setattr(precision, "_machine", lambda: "another")
    assert in_a_new_process() == 0.5
    monkeypatch.undo()
    monkeypatch.setattr(precision, "measure_bf16_speedup", measure)
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "home"))
    assert in_a_new_process() == 2.0
    for damaged in ("", "[]", '{"bf16_speedup": {"x": "fast"}}', "nonsense"):
        (tmp_path / "home" / "machine.json").write_text(damaged)
        assert in_a_new_process() == 0.5
    # A home that cannot be written.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PHOTON_HOME", str(tmp_path / "file" / "home"))
    assert in_a_new_process() == 0.5
    bf16_speedup_on_cpu.cache_clear()
