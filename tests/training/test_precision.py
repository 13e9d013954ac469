import time

import pytest
import torch

from photon.errors import PhotonError
from photon.training import precision
from photon.training.precision import bf16_speedup_on_cpu, resolve_precision

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


def test_probe_agrees_with_the_instruction_set_is_short_and_leaves_the_random_state():
    bf16_speedup_on_cpu.cache_clear()
    state = torch.random.get_rng_state()
    started = time.process_time()
    speedup = bf16_speedup_on_cpu()
    assert (time.process_time() - started) / torch.get_num_threads() < 2.0
    assert torch.equal(torch.random.get_rng_state(), state)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert speedup < 1.2
    started = time.perf_counter()
    assert bf16_speedup_on_cpu() == speedup
    assert time.perf_counter() - started < 0.01
