"""What a list of listeners must have."""

from collections.abc import Sequence
from typing import Any

from photon.errors import PhotonError
from photon.telemetry.log import event_log
from photon.telemetry.wandb import weights_and_biases


def check_listed(factories: Sequence[Any], wandb_mode: str) -> None:
    """Check that a list begins with the event log, and has who logs where ``wandb_mode`` says.

    Parameters
    ----------
    factories
        The listeners' classes or functions, in order.

    Raises
    ------
    PhotonError
        If one is missing.
    """
    if list(factories[:1]) != [event_log]:
        raise PhotonError(
            "telemetry.listeners: the event log comes first, because report and summary are made from it; "
            "begin the list with {_target_: photon.telemetry.log.event_log}"
        )
    if wandb_mode != "off" and weights_and_biases not in factories:
        raise PhotonError(
            f"telemetry.wandb.mode={wandb_mode}: telemetry.listeners has nobody who would log there; add "
            "{_target_: photon.telemetry.wandb.weights_and_biases}"
        )
