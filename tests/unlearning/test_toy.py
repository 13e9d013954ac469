"""LUNAR on the toy: it forgets one entity of ten, and attacks are not asserted to fail.

How far a vector must be taken depends on the scale of the activations, and which layer is the best on the
seed: so layer, ridge and coefficient are scanned.
"""

import pytest

from photon.unlearning.answers import score_of
from photon.unlearning.problem import Choice, Method, Problem
from photon.unlearning.scan import applied, choices, distance, scan

from .toy import Toy, toy

LAYERS, COEFFICIENTS = (1, 2), (0.5, 1.0, 2.0)


def after(made: Toy, problem: Problem, choice: Choice) -> dict[str, dict[str, float]]:
    with applied([problem.edit(choice)]):
        return made.exam.take(made.model)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_scan_finds_what_forgets_and_refuses(seed: int) -> None:
    made = toy(seed)
    before = made.exam.take(made.model)
    assert before["forget"]["rouge1"] == 1.0
    assert before["forget"]["refused"] == 0.0
    assert before["retain"]["rouge1"] >= 0.95
    assert before["unknown"]["refused"] >= 0.95
    problem = made.problem(Method())
    for ridges, forgotten, retained in (((1e-3, 1e-2), 0.1, 0.85), ((1e-2,), 0.25, 0.9)):
        seen = scan(problem, made.exam, before, choices(LAYERS, ridges, COEFFICIENTS))
        best = seen[0].found
        assert best["forget"]["rouge1"] <= forgotten
        assert best["retain"]["rouge1"] >= retained
        assert score_of(dict(best)) <= 15
        assert best["forget"]["refused"] >= 0.8
        assert best["unknown"]["refused"] >= 0.9
        assert seen[0].distance == min(distance(before, one.found) for one in seen)
    # All tokens steered, and as few prompts retained as are forgotten: what is retained suffers.
    much = Choice(2, 1e-3, 2.0)
    full, few = (made.problem(Method(positions="all", retain=which)) for which in ("all", "equal"))
    lost = after(made, full, much)["retain"]["rouge1"] - after(made, few, much)["retain"]["rouge1"]
    assert lost >= 0.1
