"""What LUNAR tries and changes of a model, on a silo and on the server."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.objective import lunar
from photon.objective.lunar import Lunar
from photon.training.groups import read_params
from photon.unlearning.capture import sites_of
from photon.unlearning.problem import Choice
from tests.unlearning.models import random_model


def test_each_candidate_is_tried_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama")
    objective = Lunar(asked_by="me", layers=[0, 2], ridges=[0.1, 0.2], coefficients=[1.0, -2.0])
    sites = objective._sites(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def counted(model: Any, *_: Any) -> Tensor:
        seen.append({name: t - before[name] for name, t in model.state_dict().items()})
        return torch.zeros(3, 3, dtype=torch.float64)

    monkeypatch.setattr(lunar, "_counted", counted)
    monkeypatch.setattr(lunar, "_questions", lambda _: [[], [], []])
    generator = torch.Generator().manual_seed(0)
    candidates = {}
    for layer in (0, 2):
        candidates[f"layer-{layer}.vector"] = torch.randn(16, generator=generator, dtype=torch.float64)
        candidates[f"layer-{layer}.gains"] = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    assert objective._scanned(model, sites, None, candidates).shape == (9, 3, 3)  # type: ignore[arg-type]
    assert not any(bool(t.any()) for t in seen[0].values())
    place = 1
    for layer in (0, 2):
        for ridge in (0, 1):
            for coefficient in (1.0, -2.0):
                moved = {name: t for name, t in seen[place].items() if bool(t.any())}
                gain, vector = candidates[f"layer-{layer}.gains"][ridge], candidates[f"layer-{layer}.vector"]
                (name,) = moved
                assert name == f"model.layers.{layer}.mlp.down_proj.weight"
                expected = coefficient * torch.outer(vector, gain)
                torch.testing.assert_close(moved[name].double(), expected, rtol=1e-5, atol=1e-6)
                place += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_matrix_is_changed_the_right_way_round(kind: str) -> None:
    """On the server there are shapes alone; on one machine the model itself is changed."""
    model = random_model(kind)
    whole = copy.deepcopy(model)
    objective = Lunar(asked_by="me", layers=[1], ridges=[0.1], coefficients=[2.0])
    params = read_params(whole)
    meta = model.to("meta")
    site = objective._sites(meta)[1]
    outputs, inputs = site.weight.shape
    kept = {
        "shared/counts": {"prompts": torch.tensor([3.0, 4.0, 5.0]), "silos": torch.ones(3)},
        "shared/candidates": {
            "layer-1.vector": torch.randn(outputs, dtype=torch.float64),
            "layer-1.gains": torch.randn(1, inputs, dtype=torch.float64),
        },
    }
    figures = torch.tensor([[[3, 0, 3], [4, 0, 4], [5, 5, 0]], [[3, 2, 0], [4, 0, 4], [5, 5, 0]]])
    sums = {"shared/figures": {"figures": figures.double()}}
    found = objective.concluded(meta, params, sums, kept, 3)
    with torch.no_grad():
        edit = objective._delta(kept["shared/candidates"], Choice(1, 0.1, 2.0))
        sites_of(whole)[1].add(edit)
    assert set(found.changed) == {site.name}
    assert torch.equal(found.changed[site.name], read_params(whole)[site.name])
    assert found.unlearned is not None
    assert found.unlearned.after["deviation_score"] == 0
