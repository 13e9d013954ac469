"""The transition: settings as a function of the step, and what is zeroed when."""

import pytest
import torch

from photon.config.compose import compose
from photon.config.training import TransitionSection
from photon.errors import PhotonError
from photon.objective.causal_lm import CausalLM
from photon.preflight import preflight
from photon.training.loop import LocalTrainer
from photon.training.schedule import ConstantSchedule
from photon.training.transition import at_transition, check_transition
from tests.training.tiny_lm import TinyLM, stream

ADAMW = {"_target_": "torch.optim.AdamW", "lr": 0.1, "betas": [0.9, 0.999]}
QHADAMW = {"_target_": "photon.optim.QHAdamW", "lr": 0.1, "betas": [0.9, 0.999], "weights": [1.0]}
LORDO = {"_target_": "photon.optim.LoRDO", "lr": 0.1, "rank": 8}
MUON = {"_target_": "photon.optim.MuonAdamW", "lr": 0.1}


def test_settings_are_a_function_of_the_step_whatever_was_trained_before():
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    transition = TransitionSection(step=3, optimizer={"betas": [0.95, 0.99]}, lr_scale=0.5)
    seen = []
    optimizer.register_step_pre_hook(
        lambda o, *_: seen.append((tuple(o.param_groups[0]["betas"]), o.param_groups[0]["lr"]))
    )
    for _ in range(2):
        trainer = LocalTrainer(
            model,
            optimizer,
            ConstantSchedule(),
            loss=CausalLM().loss,
            batch_size=2,
            micro_batch_size=None,
            clip_norm=None,
            precision="fp32",
            device=torch.device("cpu"),
            transition=transition,
        )
        trainer.train(stream(), global_step=1, steps=4)
    before, after = ((0.8, 0.9), 0.1), ((0.95, 0.99), 0.05)
    assert seen == [before, before, after, after] * 2


TRANSITION = TransitionSection(step=8, zero=["exp_avg"], reset_step=False)
GROUPS = {"exp_avg": {"w": torch.ones(2)}, "exp_avg_sq": {"w": torch.ones(2)}}


@pytest.mark.parametrize(
    ("kept", "averaged", "now", "zero"),
    [
        (4, {}, 4, False),
        (4, {}, 8, True),
        (8, {}, 8, True),
        (0, {}, 40, True),
        (12, {}, 12, False),
        (12, {}, 40, False),
        # The average's age counts, not that of what it replaced.
        (4, {"exp_avg": 12}, 16, False),
        (4, {"exp_avg": 8}, 12, True),
    ],
)
def test_a_moment_is_zeroed_once_when_it_is_first_used_after_the_transition(kept, averaged, now, zero):
    groups, scalars = at_transition(
        TRANSITION,
        GROUPS,
        {"step": 5.0},
        global_step=now,
        kept_since=kept,
        averaged_since=averaged,
        scalars_of_others={"step": 7.0},
    )
    assert bool((groups["exp_avg"]["w"] == 0).all()) == zero
    assert bool((groups["exp_avg_sq"]["w"] == 1).all())
    assert scalars == {"step": 5.0}
    assert bool((GROUPS["exp_avg"]["w"] == 1).all()), "what was given stays"


@pytest.mark.parametrize(
    ("kept", "averaged", "now", "count"),
    [(8, {}, 8, 0.0), (4, {}, 16, 0.0), (4, {"exp_avg": 12}, 16, 7.0), (12, {}, 16, 5.0), (4, {}, 4, 5.0)],
)
def test_the_count_starts_anew_with_the_moments_or_is_that_of_the_averages(kept, averaged, now, count):
    transition = TransitionSection(step=8, zero=["exp_avg", "exp_avg_sq"], reset_step=True)
    _, scalars = at_transition(
        transition,
        GROUPS,
        {"step": 5.0},
        global_step=now,
        kept_since=kept,
        averaged_since=averaged,
        scalars_of_others={"step": 7.0},
    )
    assert scalars == {"step": count}


@pytest.mark.parametrize(
    ("optimizer", "transition", "problem"),
    [
        (ADAMW, {"optimizer": {"lr": 1.0}}, "set transition.lr_scale"),
        (ADAMW, {"optimizer": {"beta": 1.0}}, "transition.optimizer.beta: unknown key; did you mean 'betas'"),
        (QHADAMW, {"optimizer": {"betas": [0.9, 0.99, 0.999], "weights": [0.5, 0.4]}}, "other state groups"),
        (QHADAMW, {"optimizer": {"weights": [1.5]}}, "refused its settings"),
        (LORDO, {"optimizer": {"rank": 16}}, "other state groups"),
        (LORDO, {"zero": ["basis"]}, "basis is no moment"),
        (MUON, {"optimizer": {"excluded": ["wte"]}}, "cannot change it once it is built"),
        (ADAMW, {"zero": ["exp_avgs"]}, "did you mean 'exp_avg'"),
        (ADAMW, {"zero": ["exp_avg"], "reset_step": True}, "add exp_avg_sq to transition.zero"),
    ],
)
def test_a_transition_that_the_optimizer_cannot_make_is_refused(optimizer, transition, problem):
    with pytest.raises(PhotonError, match=problem):
        check_transition(TransitionSection(step=1, **transition), optimizer)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["+transition.step=96"], "lies within a round of 64 local steps"),
        (["+transition.step=512"], "is never reached"),
        (
            ["+transition.step=64", "+transition.zeros=[exp_avg]"],
            "transition.zeros: unknown key; did you mean",
        ),
    ],
)
def test_a_transition_that_the_run_cannot_make_is_refused(overrides, problem):
    with pytest.raises(PhotonError, match=problem):
        preflight(compose(overrides))


def test_steps_count_over_both_parts():
    config = compose(["rounds=70", "+transition.step=64", "+transition.local_steps=1"])
    assert [config.steps_after(rounds) for rounds in (0, 1, 64, 65, 70)] == [0, 1, 64, 128, 448]
    assert config.total_steps == 448
    assert [config.steps_of(server_round) for server_round in (1, 64, 65)] == [1, 1, 64]
