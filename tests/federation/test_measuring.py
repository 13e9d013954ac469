"""Which silos measure a model, and what some of them say of all."""

import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.config.admission import GuardSection
from photon.config.schema import RunConfig
from photon.federation.measuring import BESIDE, SMALL, mean_loss, measuring, standard_error
from photon.state.checkpoint import CheckpointStore
from photon.state.progress import Progress
from photon.telemetry.events import Evaluated, SiloEvaluation
from photon.telemetry.log import read_events
from photon.telemetry.summary import estimate_text

Make = Callable[..., RunConfig]
MANY = [f"s{number:03d}" for number in range(200)]


def config(make: Make, *overrides: str) -> RunConfig:
    return make("rounds=100", "evaluation.full_every=10", *overrides)


def test_in_a_small_federation_everybody_measures_every_model(small_config: Make) -> None:
    few = MANY[:SMALL]
    assert measuring(config(small_config), few, few[:2], 7) == few
    assert measuring(config(small_config, "evaluation.cohort=null"), MANY, MANY[:2], 7) == MANY


def test_in_a_large_one_the_next_cohort_does_and_a_few_beside_it_for_a_while(small_config: Make) -> None:
    run = config(small_config)

    def beside(server_round: int, silos: list[str] = MANY) -> set[str]:
        found = measuring(run, silos, ["s000", "s001"], server_round)
        assert list(found) == sorted(found)
        assert {"s000", "s001"} <= set(found)
        return set(found) - {"s000", "s001"}

    panel = beside(11)
    assert len(panel) == BESIDE
    assert all(beside(server_round) == panel for server_round in range(12, 20))
    assert beside(21) != panel
    gone = min(panel)
    without = beside(12, [name for name in MANY if name != gone])
    assert panel - without == {gone}
    assert len(without) == BESIDE


@pytest.mark.parametrize(
    ("overrides", "due", "full"),
    [
        ([], range(101), [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]),
        (["evaluation.every=3"], [*range(0, 100, 3), 100], [0, 12, 21, 30, 42, 51, 60, 72, 81, 90, 100]),
        (["evaluation.full_every=null"], range(101), [0, 100]),
    ],
)
def test_all_measure_the_first_the_last_and_one_model_in_so_many(
    overrides: list[str], due: Any, full: list[int], small_config: Make
) -> None:
    run = config(small_config, *overrides)
    assert [each for each in due if len(measuring(run, MANY, ["s000"], each)) == len(MANY)] == full


def population(size: int) -> dict[str, SiloEvaluation]:
    draw = random.Random("population")
    found: dict[str, SiloEvaluation] = {}
    for number in range(size):
        tokens = draw.randint(200, 2000)
        # Small silos are harder, so that weights matter.
        loss = 3.0 + 400 / tokens + draw.gauss(0, 0.5)
        found[f"s{number:03d}"] = {"loss": loss, "perplexity": 0.0, "tokens": tokens}
    return found


def test_the_estimate_is_that_of_all_within_its_error_bar() -> None:
    everybody = population(200)
    truth = sum(s["loss"] * s["tokens"] for s in everybody.values()) / sum(
        s["tokens"] for s in everybody.values()
    )
    assert mean_loss(everybody) == pytest.approx(truth, rel=1e-12)
    assert standard_error(everybody, 200) == 0.0
    draw, estimates, errors = random.Random("draws"), [], []
    for _ in range(3000):
        some = {name: everybody[name] for name in draw.sample(sorted(everybody), 24)}
        error = standard_error(some, 200)
        assert error is not None
        estimates.append(mean_loss(some))
        errors.append(error)
    # Its spread over draws is what it says of itself.
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(estimates), rel=0.1)
    assert statistics.mean(estimates) == pytest.approx(truth, abs=0.1 * statistics.stdev(estimates))
    within = sum(abs(mean - truth) <= 1.96 * error for mean, error in zip(estimates, errors, strict=True))
    assert 0.90 <= within / len(estimates) <= 0.97
    assert standard_error({"s000": everybody["s000"]}, 200) is None


def test_a_rise_is_one_against_the_model_before() -> None:
    guard = GuardSection(action="undo", tolerance=0.5)
    progress = Progress().after({"a": 9.0, "b": 9.0, "c": 9.0}).after({"b": 5.0, "c": 5.0})
    # Silo a has not measured the last model: what it said of one before would hide the rise since.
    assert progress.problem({"a": 6.0, "b": 9.5}, GuardSection(action="undo", tolerance=20.0)) is None
    rise = progress.change({"a": 6.0, "b": 6.5})
    assert rise == pytest.approx(1.5)
    assert progress.change({"a": 99.0}) is None
    assert progress.problem({"a": 6.0}, guard) is None


def test_a_sampled_run_measures_as_a_full_one_does(run_small: Any, tmp_path: Path) -> None:
    common = ("cohort=1", "rounds=6", "checkpoint.keep=1", "checkpoint.keep_best=true")
    full = run_small(*common, name="full")
    some = run_small(*common, "evaluation.cohort=1", "evaluation.full_every=3", name="some")
    assert some["weights_sha256"] == full["weights_sha256"]

    def evaluations(name: str) -> dict[int, Evaluated]:
        events = read_events(tmp_path / name / "events.jsonl")
        return {event.round: event for event in events if isinstance(event, Evaluated)}

    whole, part = evaluations("full"), evaluations("some")
    for server_round, event in part.items():
        assert event.of_silos == 3
        assert event.is_estimate == (server_round % 3 != 0)
        assert set(event.per_silo) <= set(whole[server_round].per_silo)
        for silo, found in event.per_silo.items():
            assert found == whole[server_round].per_silo[silo]
        if not event.is_estimate:
            assert (event.loss, event.error) == (whole[server_round].loss, 0.0)
            assert estimate_text(event) == ""
        elif len(event.per_silo) == 2:
            assert event.error is not None
            assert event.error > 0
            assert "by 2 of 3 silos" in estimate_text(event)
    assert sum(event.is_estimate for event in part.values()) == 4
    assert some["perplexity"]["final_silos"] == 3
    # Losses of some silos alone do not decide which checkpoint is the best.
    store = CheckpointStore(tmp_path / "some" / "checkpoints")
    best = min((0, 3, 6), key=lambda server_round: part[server_round].loss)
    assert best in store.rounds()
    assert not store.load(best).state.estimated


def test_a_cohort_of_nobody_is_refused(small_config: Make) -> None:
    from photon.errors import PhotonError

    with pytest.raises(PhotonError, match=r"evaluation\.cohort=0"):
        small_config("evaluation.cohort=0")
