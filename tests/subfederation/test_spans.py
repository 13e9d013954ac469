"""Which requests a federation has followed already, and which it would begin anew."""

from pathlib import Path
from typing import Any

import pytest

from photon.subfederation.spans import Spans
from tests.silo.test_policy import ORDER


class Checkpoints:
    """Checkpoints of the own rounds that are still kept."""

    def __init__(self) -> None:
        self.kept = [0]

    def rounds(self) -> list[int]:
        return self.kept

    def discard_after(self, last: int) -> None:
        self.kept = [kept for kept in self.kept if kept <= last]


@pytest.mark.parametrize(("kept", "again"), [([0, 1], True), ([1, 2, 3], False), ([0], False)])
def test_what_is_said_to_be_trained_is_not_begun_anew(tmp_path: Path, kept: list[int], again: bool) -> None:
    """Else it would be trained without being counted."""
    checkpoints: Any = Checkpoints()
    spans = Spans(tmp_path, checkpoints, rounds=1)
    assert not spans.has_trained(ORDER)
    spans.of(ORDER)
    checkpoints.kept = kept
    assert spans.has_trained(ORDER) is again
    requests = spans.requests
    spans.of(ORDER)
    assert (spans.requests == requests) is (again or kept == [0]), (
        "a request that is followed anew is one more"
    )
