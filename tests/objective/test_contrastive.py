"""The label contrastive loss against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from photon.objective.contrastive import Contrastive, label_contrastive_loss

FORMS: list[Contrastive] = ["supcon", "log_of_sum"]


def written_out(latent: Tensor, labels: Tensor, tau: float, form: Contrastive) -> float:
    """Return the loss as the formula reads, one term after the other, in float64."""
    unit = latent.double() / latent.double().norm(dim=1, keepdim=True)
    count, terms = len(labels), []
    for i in range(count):
        positives = [p for p in range(count) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(math.exp(float(unit[i] @ unit[j]) / tau) for j in range(count) if j != i)
        above = [math.exp(float(unit[i] @ unit[p]) / tau) for p in positives]
        if form == "supcon":
            terms.append(-sum(math.log(one / below) for one in above) / len(above))
        else:
            terms.append(-math.log(sum(above) / below))
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_loss_is_the_formula(form: Contrastive, tau: float) -> None:
    torch.manual_seed(0)
    latent, labels = torch.randn(11, 5), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 1])
    found = float(label_contrastive_loss(latent, labels, tau, form))
    assert found == pytest.approx(written_out(latent, labels, tau, form), rel=1e-5)


@pytest.mark.parametrize(("form", "expected"), [("supcon", 1.9459), ("log_of_sum", 0.8473)])
def test_collapsed_vectors(form: Contrastive, expected: float) -> None:
    labels = torch.tensor([0, 1] * 4)
    found = float(label_contrastive_loss(torch.ones(8, 3), labels, 0.1, form))
    exact = math.log(7) if form == "supcon" else math.log(7 / 3)
    assert found == pytest.approx(exact, rel=1e-6)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("form", "expected"), [("supcon", 1.1227), ("log_of_sum", 0.0241)])
def test_two_antipodal_clusters(form: Contrastive, expected: float) -> None:
    latent = torch.tensor([[1.0, 0.0]] * 4 + [[-1.0, 0.0]] * 4)
    labels = torch.tensor([0] * 4 + [1] * 4)
    found = float(label_contrastive_loss(latent, labels, 0.5, form))
    away = 4 * math.exp(-2 / 0.5)
    exact = math.log(3 + away) if form == "supcon" else math.log(1 + away / 3)
    assert found == pytest.approx(exact, rel=1e-5)
    assert found == pytest.approx(expected, abs=1e-4)
    # As τ goes to 0 the one goes to log(n − 1), the other to 0.
    limit = float(label_contrastive_loss(latent, labels, 0.01, form))
    assert limit == pytest.approx(math.log(3) if form == "supcon" else 0.0, abs=1e-5)


def test_one_form_bounds_the_other_where_classes_are_of_one_size() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        latent, labels = torch.randn(12, 4), torch.arange(3).repeat_interleave(4)
        supcon, inside = (float(label_contrastive_loss(latent, labels, 0.3, form)) for form in FORMS)
        assert inside <= supcon - math.log(3) + 1e-6
    # Equal where all positives of each are equally near.
    clusters = torch.eye(3).repeat_interleave(4, dim=0)
    supcon, inside = (float(label_contrastive_loss(clusters, labels, 0.3, form)) for form in FORMS)
    assert inside == pytest.approx(supcon - math.log(3), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_order_and_length_do_not_matter(form: Contrastive) -> None:
    torch.manual_seed(1)
    latent, labels, order = torch.randn(9, 4), torch.tensor([0, 1, 2] * 3), torch.randperm(9)
    loss = label_contrastive_loss(latent, labels, 0.2, form)
    torch.testing.assert_close(label_contrastive_loss(latent[order], labels[order], 0.2, form), loss)
    longer = latent * torch.rand(9, 1).add(0.5).mul(7)
    torch.testing.assert_close(label_contrastive_loss(longer, labels, 0.2, form), loss)


@pytest.mark.parametrize("form", FORMS)
def test_a_class_with_one_member_has_no_term_of_its_own(form: Contrastive) -> None:
    torch.manual_seed(2)
    latent = torch.randn(5, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2])
    loss = label_contrastive_loss(latent, labels, 0.2, form)
    assert loss.item() == pytest.approx(written_out(latent.detach(), labels, 0.2, form), rel=1e-5)
    loss.backward()
    assert latent.grad is not None
    assert torch.isfinite(latent.grad).all()
    alone = torch.randn(3, 4, requires_grad=True)
    nothing = label_contrastive_loss(alone, torch.arange(3), 0.2, form)
    nothing.backward()
    assert nothing.item() == 0.0
    assert alone.grad is not None
    assert not alone.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_brings_two_of_one_label_together(form: Contrastive) -> None:
    latent = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]], requires_grad=True)
    label_contrastive_loss(latent, torch.tensor([0, 0, 1]), 0.5, form).backward()
    assert latent.grad is not None
    after = (latent - 0.1 * latent.grad).detach()
    angle = torch.nn.functional.cosine_similarity
    assert angle(after[0], after[1], dim=0) > angle(latent[0], latent[1], dim=0)
