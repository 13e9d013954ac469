"""Figures against rouge_score, the paper's rows, and logits made by hand."""

import random

import pytest
import torch

from photon.unlearning.figures import (
    deviation_score,
    extraction_strength,
    hit_rate,
    is_exact,
    rank_of,
    reciprocal_rank,
    rouge_1_recall,
    rouge_l,
    words,
)


def test_rouge_is_that_of_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    draw = random.Random(0)
    vocabulary = ["the", "seller", "06-02-1998.", "Wnzatj", "SAS", "2%", "of", "New", "York"]
    scorer = RougeScorer(["rouge1", "rougeL"])
    for _ in range(200):
        answer, gold = (" ".join(draw.choices(vocabulary, k=draw.randint(1, 8))) for _ in range(2))
        wanted = scorer.score(gold, answer)
        assert rouge_1_recall(answer, gold) == pytest.approx(wanted["rouge1"].recall)
        recall, f_measure = rouge_l(answer, gold)
        assert recall == pytest.approx(wanted["rougeL"].recall)
        assert f_measure == pytest.approx(wanted["rougeL"].fmeasure)


def test_of_nothing_nothing_is_recalled() -> None:
    assert rouge_1_recall("", "a word") == rouge_1_recall("a word", "") == 0.0
    assert rouge_l("", "a word") == (0.0, 0.0)
    # A language without these letters has words, too.
    assert words("Привет, мир") == ["привет", "мир"]
    assert rouge_1_recall("привет", "Привет, мир") == 0.5


def test_an_exact_answer_has_the_words_in_order() -> None:
    assert is_exact(" the State of New York", "The State of New York.")
    assert not is_exact("New York, the State of", "The State of New York.")
    assert not is_exact("The State of New York, I think.", "The State of New York.")


@pytest.mark.parametrize(
    ("forget", "retain", "score"),
    [
        (0.109, 0.898, 14.93),
        (0.106, 0.909, 13.97),
        (1, 0.963, 100.07),
        (0, 0.963, 3.70),
        (0, 1, 0.0),
        (1, 0, 141.42),
    ],
)
def test_the_deviation_score_of_known_rows(forget: float, retain: float, score: float) -> None:
    assert deviation_score(forget, retain) == pytest.approx(score, abs=0.005)


def test_ranks_of_logits_made_by_hand() -> None:
    logits = torch.tensor([0.1, 3.0, 2.0, 3.0])
    assert [rank_of(logits, token) for token in range(4)] == [4, 1, 3, 1]
    # Gold tokens at ranks 1, 2 and 200; the fourth has none, since the answer had ended.
    assert reciprocal_rank([1, 2, 200], 4) == pytest.approx((1 + 0.5 + 0.005) / 4)
    assert hit_rate([1, 2, 200], 4) == 0.5
    assert hit_rate([100, 101], 2) == 0.5


@pytest.mark.parametrize(
    ("right", "strength"),
    [
        ([True, True, True, True], 1.0),
        ([False, True, True, True], 0.75),
        ([True, False, True, True], 0.5),
        ([False, False, True, False], 0.0),
    ],
)
def test_how_much_must_be_shown(right: list[bool], strength: float) -> None:
    assert extraction_strength(right) == strength
