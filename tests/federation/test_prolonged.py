"""A finished run whose `rounds` are raised and that is resumed: what the page on recipes says of it."""

from collections.abc import Callable
from typing import Any

import pytest

from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events

#: Four local steps a round, counted as they are.
OWN_STEPS = "schedule.tuned_batch_size=${training.batch_size}"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("schedule", "is_the_longer_run"),
    [
        (["schedule=constant"], True),
        (["schedule=wsd", "schedule.steps=16", OWN_STEPS], True),
        (["schedule=cosine", "schedule.steps=16", OWN_STEPS], True),
        (["schedule=cosine"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_whose_schedule_knows_its_length_is_prolonged_to_the_longer_run(
    schedule: list[str], is_the_longer_run: bool, run_small: Callable[..., dict[str, Any]]
) -> None:
    """A schedule of the run's own length has fallen at its end, and rises again."""
    whole = run_small(*schedule, "rounds=4", "cohort=2", name="whole")
    run_small(*schedule, "rounds=2", "cohort=2")
    prolonged = run_small(*schedule, "rounds=4", "cohort=2", resume=True)
    assert (prolonged["weights_sha256"] == whole["weights_sha256"]) is is_the_longer_run


def test_after_its_end_a_schedule_stays_at_its_last_rate(
    run_small: Callable[..., dict[str, Any]], tmp_path: Any
) -> None:
    run_small("schedule=cosine", "schedule.steps=8", OWN_STEPS, "rounds=2", "cohort=1")
    run_small("schedule=cosine", "schedule.steps=8", OWN_STEPS, "rounds=4", "cohort=1", resume=True)
    events = read_events(tmp_path / "run" / "events.jsonl")
    rates = [event.learning_rate for event in events if isinstance(event, SiloFinished)]
    assert rates[2:] == [pytest.approx(0.1 * 0.002)] * 2, "final_fraction of the peak"
