"""Rescue, harm and the rest, against counts by hand."""

import pytest

from photon.orchestration.figures import Line, average_ranks, changes, summary


def line(number: int, right: bool | None, before: bool | None, edges: int = 0, calls: int = 3) -> Line:
    done = [
        {"order": [0, 1, 2], "psi": [1, 1, 1], "edges": [[0, 1]] * edges, "refined": [1] if edges else []}
    ]
    return Line(
        id=str(number),
        answer="A",
        right=right,
        response="A",
        agent="a",
        parallel="A",
        parallel_right=before,
        propagations=done,
        drafts=["A"] * 3,
        responses=[],
        calls=calls,
        prompt_tokens=10,
        completion_tokens=1,
        unreported=0,
    )


def test_changes_add_up_to_the_difference_of_accuracies() -> None:
    before = [True, True, True, False, False, False, False]
    after = [True, True, False, True, True, False, False]
    found = changes(before, after)
    assert (found["rescued"], found["harmed"]) == (2, 1)
    assert found["rescue"] == pytest.approx(2 / 4)
    assert found["harm"] == pytest.approx(1 / 3)
    assert found["preservation"] == pytest.approx(2 / 3)
    assert (sum(after) - sum(before)) / 7 == pytest.approx((found["rescued"] - found["harmed"]) / 7)
    assert changes([True], [True])["rescue"] is None
    assert changes([False], [True])["harm"] is None


def test_average_ranks_are_means_of_places_and_ties_share_theirs() -> None:
    found = average_ranks({"a": [0.9, 0.5, 0.1], "b": [0.8, 0.5, 0.3], "c": [0.7, 0.2, 0.2]})
    assert found == pytest.approx({"a": (1 + 1.5 + 3) / 3, "b": (2 + 1.5 + 1) / 3, "c": (3 + 3 + 2) / 3})


def test_a_summary_counts_what_is_known() -> None:
    lines = [
        line(1, True, False, edges=2, calls=4),
        line(2, False, False),
        line(3, None, None, edges=1, calls=4),
    ]
    found = summary(lines, 3)
    assert (found["answered"], found["judged"]) == (3, 2)
    assert (found["accuracy"], found["parallel_accuracy"]) == (0.5, 0.0)
    assert found["accuracy_error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert found["calls"] == pytest.approx(11 / 3)
    assert found["edges"] == pytest.approx(1.0)
    assert found["share_of_edges"] == pytest.approx(3 / 9)
    assert found["parallel_questions"] == 1
    assert (found["prompt_tokens"], found["completion_tokens"]) == (30, 3)
    assert summary([], 3)["answered"] == 0
    assert summary([line(1, None, None)], 1)["share_of_edges"] == 0
