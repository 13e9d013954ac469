import math
import re

import pytest

from photon.errors import PhotonError
from photon.training.schedule import (
    ConstantSchedule,
    CosineSchedule,
    WsdSchedule,
    build_schedule,
    never_at_peak,
    stretch,
)


def test_the_recipe_of_photon_stretches_the_schedule():
    assert stretch(5120, 100, tuned_batch_size=256, batch_size=32) == (40960, 800)
    assert stretch(5120, 100, tuned_batch_size=256, batch_size=256) == (5120, 100)
    assert stretch(10, 1, tuned_batch_size=32, batch_size=64) == (5, 0)


@pytest.mark.parametrize(
    "schedule",
    [ConstantSchedule(8), CosineSchedule(100, 8), WsdSchedule(100, 8, decay_fraction=0.25)],
)
def test_warm_up_is_linear_and_never_zero(schedule):
    assert [schedule(step) for step in range(8)] == [(step + 1) / 8 for step in range(8)]
    assert schedule(8) == 1.0


def test_cosine_closed_form():
    schedule = CosineSchedule(steps=110, warmup_steps=10, final_fraction=0.1)
    for step in (10, 35, 60, 109):
        angle = math.pi * (step - 10) / 100
        assert schedule(step) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(angle)), abs=1e-15)
    assert schedule(60) == pytest.approx(0.55)
    assert schedule(110) == schedule(10_000) == pytest.approx(0.1)


def test_wsd_closed_form():
    linear = WsdSchedule(100, 10, decay_fraction=0.2, final_fraction=0.5, decay="linear")
    assert {linear(step) for step in range(10, 81)} == {1.0}
    assert linear(90) == pytest.approx(0.75)
    assert linear(100) == linear(500) == pytest.approx(0.5)
    root = WsdSchedule(100, 10, decay_fraction=0.2, final_fraction=0.0, decay="sqrt")
    assert root(85) == pytest.approx(0.5)
    assert root(100) == 0.0


def test_without_warm_up_the_first_step_is_at_the_peak():
    for schedule in (ConstantSchedule(0), CosineSchedule(10, 0), WsdSchedule(10, 0)):
        assert schedule(0) == 1.0


def test_all_warm_up_is_possible():
    assert CosineSchedule(5, 5)(4) == 1.0
    assert CosineSchedule(5, 5)(5) == pytest.approx(0.1)


def test_no_decay_stays_at_the_peak_until_the_end():
    schedule = WsdSchedule(10, 0, decay_fraction=0.0)
    assert schedule(9) == 1.0


def test_factors_stay_between_zero_and_one():
    for schedule in (CosineSchedule(50, 7, 0.0), WsdSchedule(50, 7), ConstantSchedule(7)):
        assert all(0.0 <= schedule(step) <= 1.0 for step in range(80))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineSchedule(0, 0), "steps is 0"),
        (lambda: CosineSchedule(10, 11), "warmup_steps is 11"),
        (lambda: CosineSchedule(10, 1, 1.5), "final_fraction is 1.5"),
        (lambda: WsdSchedule(10, 5, 0.6), "do not fit into 10"),
        (lambda: WsdSchedule(10, 5, 0.1, decay="cubic"), "use linear or sqrt"),
        (lambda: ConstantSchedule(-1), "cannot be negative"),
        (lambda: stretch(10, 1, 256, 0), "batch_size is 0"),
    ],
)
def test_impossible_schedules_are_refused(make, message):
    with pytest.raises(PhotonError, match=message):
        make()


COSINE = {"_target_": "photon.training.schedule.CosineSchedule", "warmup_steps": 100, "tuned_batch_size": 256}


def test_a_configured_schedule_is_stretched_to_the_local_batch():
    built = build_schedule({**COSINE, "steps": 5120}, total_steps=7, batch_size=32)
    assert built == CosineSchedule(40960, 800)


def test_a_schedule_without_a_length_spans_the_run_unstretched():
    built = build_schedule({**COSINE, "steps": None}, total_steps=700, batch_size=32)
    assert built == CosineSchedule(700, 100)


def test_a_schedule_that_has_no_end_stretches_its_warm_up():
    constant = {**COSINE, "_target_": "photon.training.schedule.ConstantSchedule"}
    assert build_schedule(constant, total_steps=700, batch_size=128) == ConstantSchedule(200)


RECIPE = {"steps": 72, "warmup_steps": 6, "tuned_batch_size": 256}


@pytest.mark.parametrize(
    ("given", "steps", "told"),
    [
        (
            {"steps": 72, "warmup_steps": 6, "tuned_batch_size": 256},
            72,
            r"at 19 % .* counts batches of 256 seq",
        ),
        (
            {"steps": 72, "warmup_steps": 6, "tuned_batch_size": 4},
            4,
            r"at 67 % .* lower schedule.warmup_steps=6",
        ),
        ({"warmup_steps": 9}, 8, "has 8 local steps, and the warm-up 9;"),
        (RECIPE, 384, None),
        (RECIPE | {"steps": None}, 6, None),
    ],
)
def test_a_run_that_ends_within_its_warm_up_is_told(given, steps, told):
    found = never_at_peak(given, total_steps=steps, batch_size=4)
    assert found is None if told is None else re.search(told, found)
