"""An objective is named by the configuration, and what it decides reaches the steps of a silo."""

import numpy as np
import pytest
import torch

from photon.config.compose import compose, parse
from photon.data.prepared import PreparedData
from photon.data.silo_data import SiloData
from photon.errors import PhotonError
from photon.models.build import build_model
from photon.models.loss import causal_losses
from photon.objective.base import Evaluation
from photon.objective.causal_lm import CausalLM
from photon.objective.configured import objective_of
from photon.objective.perplexity import OwnTokens, evaluate_windows
from photon.preflight import preflight
from tests.conftest import SMALL, composed
from tests.models.test_experts import MIXTRAL, ROWS, TOKENS, build
from tests.objective.toy import Masked, Sums


def test_the_configuration_names_it() -> None:
    config = composed(*SMALL, "data.path=none")
    assert isinstance(objective_of(config), CausalLM)
    toy = compose(
        [*SMALL, "data.path=none", "objective._target_=tests.objective.toy.Masked", "+objective.below=3"]
    )
    objective = objective_of(preflight(toy))
    assert isinstance(objective, Masked)
    assert objective.below == 3
    assert objective_of(toy) is objective


def test_without_one_it_is_causal_language_modelling() -> None:
    config = composed(*SMALL, "data.path=none")
    before = "\n".join(
        line for line in config.text.splitlines() if "objective" not in line and "CausalLM" not in line
    )
    old = parse(before)
    assert old.objective is None
    assert isinstance(objective_of(preflight(old)), CausalLM)
    assert objective_of(parse(old.text)).trains, "its own text says so again"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective._target_=torch.optim.SGD"],
            "objective._target_=torch.optim.SGD is not a photon Objective",
        ),
        (["objective._target_=tests.objective.toy.Weighted"], "objective: needs the array weights"),
        (["objective._target_=photon.objective.Nothing"], "objective: cannot import"),
        (["+objective.mask=1"], "objective.mask: unknown key"),
        (
            ["objective._target_=tests.objective.toy.Masked", "+objective.below=many"],
            "objective.below='many'",
        ),
    ],
)
def test_what_cannot_be_one_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(PhotonError, match=message):
        preflight(compose([*SMALL, "data.path=none", *overrides]))


def test_a_dense_model_reports_the_loss_that_is_trained() -> None:
    model = build_model(composed(*SMALL, "data.path=none").model, 64, seed=0)
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    loss = CausalLM().loss(model, {"tokens": tokens}, None)
    assert loss.figures == {}
    assert torch.equal(loss.value, causal_losses(model, tokens).cross_entropy)


def test_a_mixture_of_experts_reports_its_cross_entropy_and_the_routers_loss() -> None:
    loss = CausalLM().loss(build(MIXTRAL, 1000.0), {"tokens": TOKENS}, None)
    cross_entropy, auxiliary = loss.figures["loss"], loss.figures["auxiliary_loss"]
    assert loss.value.item() == pytest.approx(cross_entropy.item() + 1000 * auxiliary.item(), rel=1e-6)
    assert cross_entropy.item() < 2 * np.log(ROWS)


def test_an_evaluation_is_sums_and_counts(corpus) -> None:
    prepared = PreparedData.open(corpus)
    data = SiloData(prepared, prepared.silo_names[:1])
    model = build_model(composed(*SMALL, "data.path=none").model, data.vocab_size, seed=0)
    how = {"batch_size": 4, "device": torch.device("cpu"), "precision": "fp32", "limit": 6}
    windows = prepared.windows(prepared.silo_names[0], "validation")
    nll, tokens = evaluate_windows(model, windows, **how)
    assert CausalLM().evaluate(model, data, None, **how) == Evaluation({"loss": nll}, tokens)
    rows = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    rows[: data.vocab_size] = torch.from_numpy(data.vocabulary())
    own = OwnTokens.of(data.token_counts(), model.config.vocab_size)
    nll, tokens = evaluate_windows(model, windows, own=own, **how)
    measured = CausalLM().evaluate(model, data, rows, **how)
    assert measured == Evaluation({"loss": nll}, tokens)
    assert measured.loss == nll / tokens


def test_a_sample_is_a_batch_that_the_loss_takes() -> None:
    model = build_model(composed(*SMALL, "data.path=none").model, 64, seed=0)
    sample = CausalLM().sample(3, 16)
    assert sample["tokens"].shape == (3, 17)
    assert torch.isfinite(CausalLM().loss(model, sample, None).value)


def test_an_objective_without_steps_gives_sums(corpus) -> None:
    prepared = PreparedData.open(corpus)
    data = SiloData(prepared, prepared.silo_names)
    assert Masked().prepare(None, data, {}, server_round=1, seed=0, own=True) is None
    with pytest.raises(NotImplementedError, match="Masked takes local steps"):
        Masked().statistics(None, data, {}, server_round=1, seed=0)
    model = build_model(composed(*SMALL, "data.path=none").model, data.vocab_size, seed=0).eval()
    with torch.no_grad():
        sums = Sums().statistics(model, data, {}, server_round=1, seed=0)["shared/sums"]
    assert sums["count"] == data.token_counts().sum()
    assert torch.equal(sums["tokens"][: data.vocab_size], torch.from_numpy(data.token_counts()).double())
