"""Which requests a federation has followed already, and which it would begin anew."""

import json
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


def test_the_next_request_reads_on_after_those_that_asked_for_another_number_of_windows(
    tmp_path: Path,
) -> None:
    """Forty windows, and then eight: as with a transition, or a pace that a silo's speed decides."""
    checkpoints: Any = Checkpoints()
    spans = Spans(tmp_path, checkpoints, rounds=2)
    assert spans.read(ORDER) == 0
    spans.of(ORDER)
    checkpoints.kept = [0, 1, 2]
    second = ORDER.model_copy(update={"round": 2, "last_round": 1, "steps": 2, "model_id": "m2"})
    assert spans.read(second) == 40
    spans.of(second)
    checkpoints.kept = [0, 1, 2, 3, 4]
    third = second.model_copy(update={"round": 3, "last_round": 2, "model_id": "m3"})
    assert (spans.read(third), spans.begins(third)) == (48, 4)
    # Back to the first round, and from there again; what is not known is begun anew.
    assert spans.read(third.model_copy(update={"last_round": 1})) == 40
    assert spans.read(third.model_copy(update={"run_id": "another"})) == 0
    # An earlier Photon has noted own rounds alone.
    file = tmp_path / "assignments.json"
    noted = json.loads(file.read_text())
    for span in noted["rounds"].values():
        del span["windows"]
    file.write_text(json.dumps(noted))
    assert spans.read(third) == 16
