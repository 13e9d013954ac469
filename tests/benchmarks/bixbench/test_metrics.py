"""Figures against the paper's, closed forms, and what is so by itself."""

import math
import random

import pytest

from photon.benchmarks.bixbench.metrics import Figures, clustered, grouped, majority_votes, wilson


def test_the_papers_figures() -> None:
    assert Figures(205, 6, 0).accuracy == pytest.approx(0.029268, abs=5e-7)
    gpt = Figures(205, 8, 185)
    assert (gpt.accuracy, gpt.precision, gpt.coverage) == pytest.approx((0.0390244, 0.4, 0.0975610), abs=5e-8)
    claude = Figures(205, 17, 161)
    assert (claude.accuracy, claude.precision, claude.coverage) == pytest.approx(
        (0.0829, 0.386, 0.2146), abs=5e-4
    )


def test_none_is_no_division_by_zero() -> None:
    assert (Figures(5, 0, 5).precision, Figures(5, 0, 5).coverage) == (0.0, 0.0)
    assert (Figures(0, 0, 0).accuracy, Figures(0, 0, 0).coverage) == (0.0, 0.0)


def test_wilson_is_the_papers_interval() -> None:
    assert wilson(0.157, 900) == pytest.approx((0.13470, 0.18222), abs=5e-6)
    assert wilson(0.218, 1025) == pytest.approx((0.19380, 0.24430), abs=5e-6)
    assert wilson(0.0, 30)[0] == 0.0
    assert wilson(1.0, 30)[1] == 1.0
    assert wilson(0.0, 0) == (0.0, 1.0)
    # Its ends are where the score test just does not reject: (p̂ − p)² = z² p(1 − p)/n.
    for bound in wilson(0.3, 50):
        assert (0.3 - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 50)


def test_an_interval_of_clusters_of_one_is_that_of_a_mean() -> None:
    right = [True] * 12 + [False] * 28
    found = clustered({number: [one] for number, one in enumerate(right)})
    half = 1.96 * math.sqrt(0.3 * 0.7 / 39)  # the sample variance has n − 1
    assert found == pytest.approx((0.3 - half, 0.3 + half))


def test_clusters_whose_answers_are_alike_count_as_one_each() -> None:
    """Five answers that always agree are worth one: the interval is that of the clusters."""
    alone = clustered({n: [n % 4 == 0] for n in range(40)})
    together = clustered({n: [n % 4 == 0] * 5 for n in range(40)})
    assert together == pytest.approx(alone)


def test_the_interval_of_clusters_covers() -> None:
    draw = random.Random(3)
    covered = 0
    for _ in range(400):
        clusters = {}
        for number in range(60):
            share = draw.betavariate(2, 4)  # mean 1/3; answers of a cluster depend on each other by it
            clusters[number] = [draw.random() < share for _ in range(5)]
        bounds = clustered(clusters)
        assert bounds is not None
        covered += bounds[0] <= 1 / 3 <= bounds[1]
    # 95 % with its spread over 400 draws; plain Wilson would cover about 86 %.
    assert 0.91 < covered / 400 < 0.985


def test_where_nothing_varies_there_is_no_interval() -> None:
    assert clustered({1: [True, False]}) is None
    assert clustered({1: [False], 2: [False]}) is None
    assert clustered({}) is None


def test_the_majority_of_one_is_the_accuracy() -> None:
    draw = random.Random(1)
    answers = {f"q{n}": [draw.choice("AB") for _ in range(1)] for n in range(30)}
    targets = dict.fromkeys(answers, "A")
    accuracy = sum(given == ["A"] for given in answers.values()) / 30
    assert majority_votes(answers, targets) == [accuracy]


def test_replicas_that_agree_give_a_flat_line() -> None:
    answers = {"a": ["A"] * 4, "b": ["B"] * 4}
    assert majority_votes(answers, {"a": "A", "b": "A"}) == [0.5] * 4


def test_as_upstream_the_last_replica_is_dropped() -> None:
    answers = {"a": ["A", "A", "A", "B"]}
    curve = majority_votes(answers, {"a": "A"}, upstream=True)
    assert curve == [1.0] * 3
    assert majority_votes(answers, {"a": "B"}, upstream=True) == [0.0] * 3


def test_the_majority_of_all_is_certain_and_no_answer_is_no_vote() -> None:
    answers: dict[str, list[str | None]] = {"a": ["A", "A", "B", None, None], "b": [None] * 5}
    curve = majority_votes(answers, {"a": "A", "b": "A"})
    assert curve[-1] == 0.5
    assert majority_votes({}, {}) == []


def test_a_better_than_even_voter_gets_better_with_votes() -> None:
    """Condorcet: of three independent votes with p = 0.7 most are right with 3p²(1 − p) + p³ = 0.784."""
    draw = random.Random(2)
    answers = {f"q{n}": ["A" if draw.random() < 0.7 else "B" for _ in range(3)] for n in range(4_000)}
    curve = majority_votes(answers, dict.fromkeys(answers, "A"))
    assert curve[0] == pytest.approx(0.7, abs=0.02)
    assert curve[2] == pytest.approx(0.784, abs=0.02)


def test_groups() -> None:
    assert grouped([("a", True), ("b", False), ("a", False)]) == {"a": [True, False], "b": [False]}
