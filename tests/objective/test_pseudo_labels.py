"""Pseudo-labels, and what is chosen by them, against what can be worked out by hand."""

import math

import pytest
import torch

from photon.objective.anchor import mixture_loss
from photon.objective.augment import drop_tokens, mixing_share, real, shuffle_spans
from photon.objective.pseudo_labels import Anchors, class_scores, labelled, selected


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def test_clustered_anchors_label_all_right() -> None:
    torch.manual_seed(0)
    centres = torch.eye(4)
    labels = torch.arange(4).repeat_interleave(3)
    anchors = Anchors(unit(centres[labels] + 0.01 * torch.randn(12, 4)), labels)
    truth = torch.randint(4, (200,))
    texts = unit(centres[truth] + 0.2 * torch.rand(200, 4))
    for score in ("mean", "max", "knn"):
        best, sure = labelled(class_scores(texts, anchors, 4, score, 3), "softmax", 0.1)
        assert torch.equal(best, truth), score
        assert (sure > 0.5).all()


def test_scores_are_their_formulas() -> None:
    torch.manual_seed(1)
    anchors, texts = (
        Anchors(unit(torch.randn(9, 5)), torch.tensor([0, 0, 0, 0, 0, 1, 1, 3, 3])),
        unit(torch.randn(6, 5)),
    )
    similar = texts @ anchors.vectors.T
    means, most, votes = (class_scores(texts, anchors, 4, one, 3) for one in ("mean", "max", "knn"))
    for text in range(6):
        near = sorted(range(9), key=lambda one: -float(similar[text, one]))[:3]
        for label in (0, 1, 3):
            own = [one for one in range(9) if anchors.labels[one] == label]
            assert means[text, label] == pytest.approx(float(similar[text, own].mean()), abs=1e-6)
            assert most[text, label] == pytest.approx(float(similar[text, own].max()), abs=1e-6)
            vote = sum(float(similar[text, one]) for one in near if one in own) / 3
            assert votes[text, label] == pytest.approx(vote, abs=1e-6)
    # Nobody has shown anything of class 2.
    for scores in (means, most, votes):
        assert (scores[:, 2] == -torch.inf).all()
        for kind in ("softmax", "raw", "margin"):
            best, sure = labelled(scores, kind, 0.1)
            assert not (best == 2).any()
            assert torch.isfinite(sure).all()


def test_means_of_classes_score_as_all_anchors_do() -> None:
    torch.manual_seed(2)
    anchors, texts = Anchors(unit(torch.randn(40, 8)), torch.randint(5, (40,))), unit(torch.randn(30, 8))
    of_all = class_scores(texts, anchors, 5, "mean")
    of_means = class_scores(texts, anchors.means(5), 5, "mean")
    torch.testing.assert_close(of_means, of_all, atol=1e-6, rtol=0)
    # A mean that is brought to length 1 again would score otherwise.
    again = Anchors(unit(anchors.means(5).vectors), anchors.means(5).labels)
    assert not torch.allclose(class_scores(texts, again, 5, "mean"), of_all, atol=1e-3)


def test_confidences() -> None:
    scores = torch.tensor([[0.9, 0.5, -0.2], [0.1, 0.3, 0.2]])
    best, share = labelled(scores, "softmax", 0.5)
    assert best.tolist() == [0, 1]
    below = sum(math.exp(one / 0.5) for one in (0.9, 0.5, -0.2))
    assert float(share[0]) == pytest.approx(math.exp(0.9 / 0.5) / below, rel=1e-6)
    assert labelled(scores, "raw", 1)[1].tolist() == pytest.approx([0.9, 0.3])
    assert labelled(scores, "margin", 1)[1].tolist() == pytest.approx([0.4, 0.1])


def test_what_is_chosen() -> None:
    sure = torch.tensor([0.2, 1.0, 0.7, 1.0, 0.7])
    assert selected(sure, 1.01, None).tolist() == []
    assert selected(sure, 0.0, None).tolist() == [0, 1, 2, 3, 4]
    # A softmax may saturate: 1 is no empty case.
    assert selected(sure, 1.0, None).tolist() == [1, 3]
    assert selected(sure, None, 0.6).tolist() == [1, 2, 3]
    assert selected(sure, None, 0.0).tolist() == []
    assert selected(sure, None, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_a_mixture_with_a_share_of_one_is_the_text_itself() -> None:
    torch.manual_seed(3)
    logits, labels, others = torch.randn(7, 4), torch.randint(4, (7,)), torch.randint(4, (7,))
    plain = torch.nn.functional.cross_entropy
    assert torch.equal(mixture_loss(logits, labels, others, 1.0), plain(logits, labels))
    half = mixture_loss(logits, labels, others, 0.25)
    torch.testing.assert_close(half, 0.25 * plain(logits, labels) + 0.75 * plain(logits, others))
    assert mixing_share(0) == 1.0
    torch.manual_seed(4)
    shares = torch.tensor([mixing_share(0.75) for _ in range(400)])
    # Of Beta(α, α): 1/2, and 1 / (4 (2α + 1)).
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(shares.var()) == pytest.approx(0.1, abs=0.015)


def test_the_strong_variant_keeps_a_texts_tokens_and_what_fills_its_row() -> None:
    torch.manual_seed(5)
    tokens = torch.arange(40).reshape(2, 20)
    lengths = torch.tensor([[20], [7]])
    mixed = shuffle_spans(tokens, lengths, 3)
    assert not torch.equal(mixed, tokens)
    for row, length in enumerate([20, 7]):
        assert sorted(mixed[row, :length].tolist()) == tokens[row, :length].tolist()
        assert torch.equal(mixed[row, length:], tokens[row, length:])
        # Within a span the order stays.
        spans = [tokens[row, i : min(i + 3, length)].tolist() for i in range(0, length, 3)]
        text = ",".join(map(str, mixed[row, :length].tolist()))
        assert all(",".join(map(str, span)) in text for span in spans)
    assert torch.equal(shuffle_spans(tokens, lengths, 0), tokens)
    mask = real(tokens, lengths)
    assert mask.sum(1).tolist() == [20, 7]
    left = drop_tokens(mask.repeat(200, 1), 0.3)
    assert not (left & ~mask.repeat(200, 1)).any()
    assert float(left[0::2].float().mean()) == pytest.approx(0.7, abs=0.02)
    alone = drop_tokens(real(tokens, torch.tensor([[1], [1]])).repeat(50, 1), 0.99)
    assert (alone.sum(1) == 1).all()
    assert torch.equal(drop_tokens(mask, 0), mask)
