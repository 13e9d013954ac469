"""What a silo measures of a round."""

import math

import pytest
import torch

from photon.training.diagnostics import basis_similarities, momentum_cosines, state_changes


def test_changes_are_relative_and_over_all_tensors_of_a_group():
    before = {
        "exp_avg": {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        "exp_avg_sq": {"a": torch.zeros(1)},
    }
    after = {
        "exp_avg": {"a": torch.tensor([3.0]), "b": torch.tensor([5.0])},
        "exp_avg_sq": {"a": torch.ones(1)},
        "basis": {"a": torch.ones(1)},
    }
    assert state_changes(before, after) == {"exp_avg_change": pytest.approx(1 / 5)}


def test_cosines_are_of_the_whole_pseudo_gradient_and_leave_out_other_shapes():
    before = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[2.0]])}
    after = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([[1.0]])}
    momenta = {
        "exp_avg": {"a": torch.tensor([0.5, 0.0]), "b": torch.tensor([[0.0]])},
        "exp_avg_2": {"a": torch.tensor([-1.0, 0.0]), "b": torch.tensor([[-1.0]])},
        "momentum_buffer": {"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(3)},
        "exp_avg_sq": {"a": torch.ones(2)},
        "basis": {"a": torch.ones(2)},
    }
    assert momentum_cosines(before, after, momenta) == {
        "exp_avg_cosine": pytest.approx(math.sqrt(0.5)),
        "exp_avg_2_cosine": pytest.approx(-1.0),
        "momentum_buffer_cosine": pytest.approx(1.0),
    }


def test_similarity_is_the_mean_over_matrices():
    identity = torch.eye(4)
    before = {"one": identity[:, :2], "other": identity[:, :2]}
    after = {"one": identity[:, :2], "other": identity[:, 1:3]}
    assert basis_similarities(before, after) == {"basis_similarity": pytest.approx(0.75)}
    assert basis_similarities({}, after) == {}
