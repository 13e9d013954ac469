import pytest
import torch

from photon.errors import PhotonError
from photon.training import batch_probe
from photon.training.batch_probe import find_micro_batch_size

MB = 2**20


def step_up_to(limit, error=torch.OutOfMemoryError, message="out of memory"):
    def step(size):
        step.tried.append(size)
        if size > limit:
            raise error(message)

    step.tried = []
    return step


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("batch_size", "limit", "expected"),
    [(32, 100, 32), (32, 8, 8), (32, 7, 4), (12, 5, 4), (12, 6, 6), (7, 6, 1), (6, 1, 1), (1, 1, 1)],
)
def test_largest_divisor_that_fits(batch_size, limit, expected):
    assert find_micro_batch_size(step_up_to(limit), batch_size) == expected


def test_nothing_fits():
    with pytest.raises(PhotonError, match="not even one sequence"):
        find_micro_batch_size(step_up_to(0), 8)


def test_cpu_allocator_speaks_of_memory_too():
    step = step_up_to(2, RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    assert find_micro_batch_size(step, 8) == 2


def test_other_errors_are_not_swallowed():
    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch_size(step_up_to(2, RuntimeError, "shapes do not match"), 8)


@pytest.fixture(params=["fresh", "used"])
def heap(request):
    """A process whose allocator keeps freed memory would otherwise seem to need none."""
    kept = []
    if request.param == "used":
        for _ in range(2):
            blocks = [torch.ones(24 * MB // 4) for _ in range(30)]
            kept.append(torch.ones(10_000))
            del blocks
    yield
    kept.clear()


@pytest.mark.usefixtures("heap")
def test_host_memory_is_extrapolated_so_that_large_sizes_are_never_tried(monkeypatch):
    tried = []

    def step(size):
        tried.append(size)
        block = torch.ones(size * 8 * MB // 4)  # 8 MiB a sequence, all touched
        block.add_(1)
        torch.mm(torch.ones(600, 600), torch.ones(600, 600))  # long enough to be seen

    monkeypatch.setattr(batch_probe, "_available_memory", lambda: 200 * MB)
    found = find_micro_batch_size(step, 64)
    # 160 MiB of room hold 20 sequences; the measurement may be off, but not by a factor of two.
    assert found in (8, 16)
    assert max(tried) <= 16


def test_a_container_limit_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(batch_probe, "_CGROUP", tmp_path)
    machine = batch_probe._available_memory()
    assert machine > 100 * MB
    (tmp_path / "memory.max").write_text(f"{90 * MB}\n")
    (tmp_path / "memory.current").write_text(f"{40 * MB}\n")
    assert batch_probe._available_memory() == 50 * MB
    (tmp_path / "memory.max").write_text("max\n")
    assert batch_probe._available_memory() > 100 * MB


def test_gradients_of_the_probe_do_not_change_the_answer():
    """A real forward and backward pass of a small model fits whole."""
    layer = torch.nn.Linear(16, 16)
    assert find_micro_batch_size(lambda size: layer(torch.ones(size, 16)).sum().backward(), 24) == 24
