import pytest
import torch

from photon.data.prepared import PreparedData
from photon.errors import PhotonError
from photon.evaluation.perplexity import evaluate_data, overall
from photon.objective.perplexity import Score
from tests.objective.test_perplexity import Table


def test_every_silo_is_scored_and_all_together_by_tokens(corpus) -> None:
    data = PreparedData.open(corpus)
    rows = data.manifest.vocab_size
    scores = evaluate_data(
        Table(torch.zeros(rows, rows)),  # type: ignore[arg-type]
        data,
        batch_size=8,
        device="cpu",
        precision="fp32",
        limit=4,
    )
    assert list(scores) == data.silo_names
    assert all(score.perplexity == pytest.approx(rows) for score in scores.values())
    assert overall({"a": Score(30.0, 10), "b": Score(10.0, 30)}).loss == 1.0


@pytest.mark.parametrize(
    ("rows", "positions", "message"), [(None, 8, "longer than the model's 8"), (64, 64, "the model knows 64")]
)
def test_a_model_too_small_for_the_data_is_refused(corpus, rows, positions, message) -> None:
    data = PreparedData.open(corpus)
    size = rows or data.manifest.vocab_size
    with pytest.raises(PhotonError, match=message):
        evaluate_data(
            Table(torch.zeros(size, size), positions),  # type: ignore[arg-type]
            data,
            batch_size=8,
            device="cpu",
            precision="fp32",
        )
