import pytest
import torch

from photon.errors import PhotonError
from photon.training.precision import resolve_precision

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


@pytest.mark.parametrize(("gain", "expected"), [(1.19, "fp32"), (1.2, "bf16"), (0.1, "fp32")])
def test_auto_on_cpu_needs_a_clear_gain(gain, expected):
    assert resolve_precision("auto", CPU, lambda: gain) == expected


def test_auto_on_cpu_without_anything_to_time_is_fp32():
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_gpu_follows_the_capability(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert resolve_precision("auto", GPU) == expected


def test_a_gpu_without_bf16_does_not_go_on_in_an_emulation_of_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(PhotonError, match="precision=bf16: this GPU has no bf16"):
        resolve_precision("bf16", GPU)
