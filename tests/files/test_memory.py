"""Freed memory really goes back to the system."""

import sys
from pathlib import Path

import pytest

from photon.files.memory import release_freed


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_blocks_leave_the_process() -> None:
    # Small enough for the heap, and pinned at its end, so that the allocator cannot shrink it by itself.
    blocks = [b"x" * 100_000 for _ in range(640)]
    pin = blocks.pop()
    full = resident()
    del blocks
    release_freed()
    assert full - resident() > 40 * 2**20
    assert len(pin) == 100_000
