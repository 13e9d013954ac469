import pytest
import torch

from photon.files.processes import usable_cores
from photon.training.hardware import set_up_torch
from tests.conftest import composed


@pytest.fixture(autouse=True)
def as_before():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_threads_and_precision_of_products_are_those_of_the_run(precision):
    set_up_torch(composed("training.threads=3", f"training.matmul_precision={precision}").training, 1)
    assert torch.get_num_threads() == 3
    assert torch.get_float32_matmul_precision() == precision


def test_processes_share_the_cores_and_products_are_float32_by_default():
    set_up_torch(composed("training.threads=null").training, usable_cores())
    assert torch.get_num_threads() == 1
    assert torch.get_float32_matmul_precision() == "highest"
