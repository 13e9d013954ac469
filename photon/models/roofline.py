"""The peak arithmetic rate of a device: measured on a CPU, looked up on a GPU."""

import re
import time

import psutil
import torch

_BUDGET_SECONDS = 0.2
_SMALLEST, _LARGEST = 256, 4096

# Device name pattern, then dense peaks in TFLOP/s with float32 accumulation: half precision on tensor cores
# (float16 and bfloat16 alike), float32 without tensor cores, and whether there are bfloat16 tensor cores.
# The first match counts. NVIDIA's data sheets mostly print rates with 2:4 sparsity: twice these.
_GPU_PEAKS: list[tuple[str, float, float, bool]] = [
    (r"\bB200\b", 2250.0, 75.0, True),  # DGX B200 data sheet: 36 PFLOP/s sparse bfloat16 for 8
    (r"\bH200 NVL\b", 835.5, 60.0, True),  # H200 data sheet: 1671 sparse
    (r"\bG?H200\b", 989.5, 67.0, True),  # H200 and GH200 data sheets: 1979 sparse
    (r"\bH100 NVL\b", 835.5, 60.0, True),  # H100 data sheet: 1671 sparse
    (r"\bH100 PCIe\b", 756.5, 51.0, True),  # H100 PCIe data sheet: 1513 sparse
    (r"\bH[18]00\b", 989.5, 67.0, True),  # H100 SXM5 data sheet: 1979 sparse
    (r"\bA[18]00\b", 312.0, 19.5, True),  # A100 data sheet, SXM and PCIe alike
    (r"\bA30\b", 165.0, 10.3, True),  # A30 data sheet
    (r"\bA40\b", 149.7, 37.4, True),  # A40 data sheet
    (r"\bA10\b", 125.0, 31.2, True),  # A10 data sheet
    (r"\bL40S\b", 362.0, 91.6, True),  # L40S data sheet
    (r"\bL40\b", 181.0, 90.5, True),  # L40 data sheet
    (r"\bL4\b", 121.0, 30.3, True),  # L4 data sheet: 242 sparse
    (r"\bRTX 4090\b(?! Laptop| D\b)", 165.2, 82.6, True),  # Ada GPU architecture paper, appendix A
    (r"\bRTX 3090\b(?! Ti)", 71.0, 35.6, True),  # GA102 architecture paper, table 9
    (r"\bV100S?-SXM", 125.0, 15.7, False),  # V100 data sheet
    (r"\bV100-PCIE", 112.0, 14.0, False),  # V100 data sheet
    (r"\bT4\b", 65.0, 8.1, False),  # T4 data sheet
]


def gpu_peak(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Return the dense peak of a GPU in FLOP/s, or None where it is not known.

    Parameters
    ----------
    device_name
        What ``torch.cuda.get_device_name()`` returns.
    dtype
        Type of the matrix products: ``torch.float32``, ``torch.float16`` or ``torch.bfloat16``.
    tf32
        Whether float32 factors may be rounded to TF32: on tensor cores that have bfloat16, half its rate.
    """
    if " MIG " in device_name:  # a slice of the device that the name belongs to
        return None
    for pattern, half, single, has_bfloat16 in _GPU_PEAKS:
        if re.search(pattern, device_name):
            if dtype == torch.float32:
                return (half / 2 if tf32 and has_bfloat16 else single) * 1e12
            if dtype == torch.float16 or (dtype == torch.bfloat16 and has_bfloat16):
                return half * 1e12
            return None
    return None


def measure_cpu_roofline(dtype: torch.dtype, threads: int) -> float:
    """Measure the rate of square matrix products on this CPU, in FLOP/s, within 0.3 seconds.

    One thread is measured, in its own CPU time, and multiplied: whatever else the machine does at that
    moment hardly shows, while a wall clock over all threads would find a fraction of the peak. The fastest
    product counts. Cores that slow down when all of them work make the utilisation seem a little lower
    than it is, never higher.

    Parameters
    ----------
    dtype
        Type of the matrices.
    threads
        CPU threads that work together; more of them than physical cores add nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rate = _fastest_rate(dtype)
    finally:
        torch.set_num_threads(before)
    return rate * min(threads, psutil.cpu_count(logical=False) or threads)


def _fastest_rate(dtype: torch.dtype) -> float:
    size, rate = _SMALLEST, 0.0
    end = time.perf_counter() + _BUDGET_SECONDS
    while (left := end - time.perf_counter()) > 0:
        seconds = _seconds(size, dtype)
        rate = max(rate, 2.0 * size**3 / seconds)
        # Larger matrices come closer to the peak, but a CPU that emulates the type can take a second for
        # what another does in ten milliseconds.
        if size < _LARGEST and 8 * seconds < left / 2:
            size *= 2
    return rate


def _seconds(size: int, dtype: torch.dtype) -> float:
    left = torch.ones(size, size, dtype=dtype)
    out = torch.empty_like(left)
    start = time.thread_time()
    torch.mm(left, left, out=out)
    return time.thread_time() - start
