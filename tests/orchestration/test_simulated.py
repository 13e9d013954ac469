"""The study's simulated agents do what they are said to do, and no answer looks right by itself."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from photon.orchestration.graph import allowed, contributions, in_order, ranks

FILE = Path(__file__).parents[2] / "scripts" / "studies" / "simulated_agents.py"


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulated_agents", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_refinements_are_those_of_a_plain_loop(simulated: ModuleType) -> None:
    world = simulated.Simulated(simulated.Skills(0.4, 0.7, agents=6, size=16), 40, seed=3)
    questions = torch.arange(40)
    rank = ranks(contributions(world.drafts(questions)))
    chance = torch.rand((40, 6, 6), generator=torch.Generator().manual_seed(0))
    edges = allowed(rank) & (chance < 0.4)
    found = world.refined(questions, edges)
    changed = 0
    for question in range(40):
        current = world._drafted[question].tolist()
        for agent in in_order(rank[question]):
            good = world._good[question, agent].tolist()
            votes = Counter(current[other] for other in range(6) if edges[question, other, agent])
            votes = Counter({one: count for one, count in votes.items() if good[one]})
            if not good[current[agent]] and votes:
                best = max(votes.values())
                current[agent] = min(one for one, count in votes.items() if count == best)
                changed += 1
        assert found[question].tolist() == current
    assert changed > 10


def test_skills_are_what_they_say(simulated: ModuleType) -> None:
    world = simulated.Simulated(simulated.Skills(0.4, 0.8), 4000, seed=1)
    assert float((world._drafted == 0).float().mean()) == pytest.approx(0.4, abs=0.02)
    good = world._good.float().mean((0, 1))
    assert good.tolist() == pytest.approx([0.8, 0.2, 0.2, 0.2], abs=0.02)


def test_no_class_is_right_more_often_and_shuffled_labels_are_chance(simulated: ModuleType) -> None:
    skills = simulated.Skills(0.4, 0.8, classes=10)
    world = simulated.Simulated(skills, 5000, seed=1)
    share = torch.bincount(world.right, minlength=10) / 5000
    assert share.tolist() == pytest.approx([0.1] * 10, abs=0.02)
    full = allowed(ranks(contributions(world.drafts(torch.arange(5000)))))
    shuffled = simulated.Simulated(skills, 5000, seed=1, shuffled=True)
    assert float(world.rewards(torch.arange(5000), full).mean()) > 0.5
    assert float(shuffled.rewards(torch.arange(5000), full).mean()) == pytest.approx(0.1, abs=0.02)
    # The same drafts, whatever they are judged by.
    some = torch.arange(20)
    assert torch.equal(world.drafts(some), shuffled.drafts(some))
