import time

import pytest
import torch

from photon.config.compose import compose
from photon.models import roofline
from photon.models.build import build_model
from photon.models.flops import flops_per_token, mfu, model_flops_per_token
from photon.models.roofline import gpu_peak, measure_cpu_roofline


def test_flops_by_hand() -> None:
    # One sequence of 10 tokens, 100 parameters, 2 layers of width 4:
    # forward 2·100·10 = 2000 for the weights, 2·2·2·4·10² = 3200 for attention; three times that, by 10.
    assert flops_per_token(100, layers=2, width=4, sequence_length=10) == 1560.0


@pytest.mark.parametrize(
    ("model", "gigaflops"),
    [
        # MPT-125M, 2048 tokens: 142,830 tokens/s are 44.8 % of 312 TFLOP/s, published by LLM Foundry.
        ("photon-125m", 0.448 * 312e12 / 142_830 / 1e9),
        # MPT-1B on 8 H100: 45,455 tokens/s are 41.8 % of 989 TFLOP/s.
        ("photon-1.3b", 0.418 * 989e12 / 45_455 / 1e9),
    ],
)
def test_flops_agree_with_published_utilisation(model: str, gigaflops: float) -> None:
    shape = build_model(compose([f"model={model}"]).model, 50_257, seed=0, device="meta")
    assert model_flops_per_token(shape, 2048) / 1e9 == pytest.approx(gigaflops, rel=0.01)


def test_mfu() -> None:
    assert mfu(1000.0, 2e9, 4e12) == 0.5
    assert mfu(1000.0, 2e9, None) is None


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.5e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756.5e12),
        ("NVIDIA H200", torch.float16, 989.5e12),
        ("NVIDIA H200 NVL", torch.bfloat16, 835.5e12),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.5e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA GB200", torch.bfloat16, None),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L40", torch.bfloat16, 181e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 3090", torch.float16, 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", torch.float16, None),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("Tesla V100-PCIE-32GB", torch.float16, 112e12),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("Tesla T4", torch.float16, 65e12),
        ("Some GPU of 2040", torch.bfloat16, None),
        ("NVIDIA A100-SXM4-80GB", torch.int8, None),
    ],
)
def test_gpu_peaks(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert gpu_peak(name, dtype) == peak


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.float32, 156e12),  # A100 data sheet
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA GeForce RTX 3090", torch.float32, 35.5e12),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7e12),
    ],
)
def test_gpu_peaks_with_factors_in_tf32(name: str, dtype: torch.dtype, peak: float) -> None:
    assert gpu_peak(name, dtype, tf32=True) == peak


def test_the_cpu_roof_is_measured_and_the_threads_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        peak = measure_cpu_roofline(torch.float32, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    matrix = torch.ones(512, 512)
    start = time.thread_time()
    torch.set_num_threads(1)
    (matrix @ matrix).sum()
    reached = 2 * 512**3 / (time.thread_time() - start)
    torch.set_num_threads(before)
    assert 0.5 * reached < peak < 1e13


def test_more_threads_than_cores_raise_no_roof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_fastest_rate", lambda dtype: 1e9)
    monkeypatch.setattr(roofline.psutil, "cpu_count", lambda logical: 4)
    assert measure_cpu_roofline(torch.float32, threads=3) == 3e9
    assert measure_cpu_roofline(torch.float32, threads=8) == 4e9
