"""What is told of labels, from the events of a run."""

import pytest

from photon.telemetry.events import Diagnostics, Evaluated
from photon.telemetry.labels import label_rounds


def evaluated(number: int, **figures: float) -> Evaluated:
    return Evaluated(
        round=number,
        per_silo={},
        loss=1.0,
        perplexity=2.7,
        tokens_trained=0,
        bytes_up=0,
        bytes_down=0,
        seconds=1.0,
        figures=figures,
    )


def test_rounds_have_means_over_the_silos_that_tell() -> None:
    history = [
        evaluated(0, accuracy=0.3),
        Diagnostics(
            round=1,
            values={
                "coverage/a": 0.2,
                "coverage/b": 0.6,
                "pseudo_label_accuracy/a": 0.9,
                "pseudo_label_accuracy_all/a": 0.7,
                "noise/scale": 5.0,
            },
        ),
        evaluated(1, accuracy=0.5),
        Diagnostics(round=2, values={"coverage/a": 0.0}),
    ]
    first, second, third = label_rounds(history)
    assert (first["round"], first["accuracy"], first["coverage"]) == (0, 0.3, None)
    assert second == {
        "round": 1,
        "accuracy": 0.5,
        "pseudo_label_accuracy": 0.9,
        "pseudo_label_accuracy_all": 0.7,
        "coverage": pytest.approx(0.4),
    }
    assert (third["accuracy"], third["pseudo_label_accuracy"], third["coverage"]) == (None, None, 0.0)


def test_a_run_that_learns_no_labels_tells_nothing() -> None:
    assert label_rounds([evaluated(1, accuracy=0.5), Diagnostics(round=1, values={"noise/scale": 1.0})]) == []
