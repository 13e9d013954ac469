"""What a federation within another one is told."""

from pathlib import Path

import torch

from photon.federation.assignment import Assignment


def test_copies_of_the_model_that_a_kill_has_left_go_with_the_next_request(tmp_path: Path) -> None:
    for left in (".assignment.12345678.tmp", ".assignment.9abcdef0.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "groups.safetensors").write_bytes(b"half a model")
    beside = tmp_path / ".assignments.json.12345678.tmp"
    beside.write_text("another process may be about to give it its name")
    assignment = Assignment(kind="train", round=1, model_id="model", begins=0, ends=1)
    assignment.write(tmp_path, {"params": {"weight": torch.ones(2)}})
    assert {path.name for path in tmp_path.iterdir()} == {"assignment", beside.name}
    assert Assignment.read(tmp_path) == assignment
