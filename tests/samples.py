"""A train request and a report that answers it, of which a test changes what it is about."""

from typing import Any

from photon.link.messages import TrainReport, TrainRequest


def train_request(**changes: Any) -> TrainRequest:
    """Return a request of two steps of four windows to silo a."""
    usual: dict[str, Any] = {
        "run_id": "r",
        "model_id": "m",
        "round": 1,
        "silo": "a",
        "members": ["a"],
        "global_step": 0,
        "steps": 2,
        "batch_size": 4,
        "last_round": 0,
        "position": 0,
        "cohort": 2,
    }
    return TrainRequest.model_validate(usual | changes)


def train_report(**changes: Any) -> TrainReport:
    """Return the report that answers it, on windows of 16 tokens."""
    usual: dict[str, Any] = {
        "round": 1,
        "silo": "a",
        "steps": 2,
        "tokens": 128,
        "position": 8,
        "loss": 1.0,
        "loss_last": 1.0,
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
        "update_norm": 1.0,
        "seconds": {"total": 1.0, "training": 1.0, "load": 0.0, "save": 0.0},
        "state_lost": False,
    }
    return TrainReport.model_validate(usual | changes)
