"""State groups in files."""

from pathlib import Path

import torch

from photon.state.tensors import load_groups, save_groups


def test_tensors_that_are_one_in_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    """A message brings equal tensors, such as biases of zero, as one."""
    shared = torch.arange(6.0)
    groups = {
        "params": {"a": shared, "b": shared.view(2, 3), "own": torch.ones(2)},
        "kept": {"a": shared},
    }
    save_groups(tmp_path / "file.safetensors", groups)
    read = load_groups(tmp_path / "file.safetensors")
    assert {group: set(tensors) for group, tensors in read.items()} == {
        group: set(tensors) for group, tensors in groups.items()
    }
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            assert torch.equal(read[group][name], tensor)
