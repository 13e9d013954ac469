"""Averages of some states beside a silo's own others: no step is of what the silo knows nothing of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import Component
from photon.telemetry.events import SiloFinished
from photon.telemetry.log import read_events
from photon.training.averages import corrected_decays, without_strange

ADAM = Component.model_validate({"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.95]})
ADOPT = Component.model_validate({"_target_": "photon.optim.ADOPT", "lr": 0.1, "betas": [0.9, 0.95]})


def moments(first: list[float], second: list[float]) -> dict[str, dict[str, torch.Tensor]]:
    return {"exp_avg": {"w": torch.tensor(first)}, "exp_avg_sq": {"w": torch.tensor(second)}}


def test_a_first_moment_without_a_second_one_is_none() -> None:
    groups = moments([0.5, -0.5, 0.5, 0.0, -2e-3], [0.25, 0.0, 1e-12, 0.0, 1e-12])
    tamed = without_strange(groups, corrected_decays(ADAM))
    assert tamed["exp_avg"]["w"].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.0, 0.0])
    assert tamed["exp_avg_sq"]["w"] is groups["exp_avg_sq"]["w"]
    assert groups["exp_avg"]["w"][1] == -0.5, "what came is not changed"


def test_an_optimizer_that_divides_gradients_before_their_mean_keeps_it() -> None:
    groups = moments([0.5, -0.5], [0.0, 0.0])
    assert without_strange(groups, corrected_decays(ADOPT)) is groups


def test_moments_of_the_same_steps_are_never_touched() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(200))
    adam = torch.optim.AdamW([weight], betas=(0.9, 0.95))
    for step in range(300):
        # Some gradients come once and never again, some grow by ten in each step.
        weight.grad = torch.randn(200, generator=draw) * (10.0 ** (step % 30 - 15))
        weight.grad[:50] *= step == 3
        adam.step()
        state = {name: {"w": adam.state[weight][name]} for name in ("exp_avg", "exp_avg_sq")}
        tamed = without_strange(state, corrected_decays(ADAM))
        assert tamed["exp_avg"]["w"] is state["exp_avg"]["w"]


@pytest.mark.parametrize("cohort", ["null", "2"])
def test_words_that_a_silo_never_reads_stay_where_they_are(
    cohort: str, run_small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The silos have an alphabet each, and an untied embedding has gradients for what is read alone."""
    run_small(
        *("strategy=desloc", "schedule=constant", "rounds=8", f"cohort={cohort}"),
        *("model.architecture.tie_word_embeddings=false", "federation.admission.norm_factor=null"),
    )
    events = read_events(tmp_path / "run" / "events.jsonl")
    norms = [event.update_norm for event in events if isinstance(event, SiloFinished)]
    # Adam's steps are of about the learning rate, whatever is averaged.
    assert max(norms) < 5 * norms[0]
