"""Secure aggregation: the server learns the sum of the cohort's updates, and of no single one.

The protocol is the pairwise masking of Bonawitz et al. (2017), against a server that is curious but keeps to
it:

1. Everybody sends two new public keys, and gets those of all (`agree`).
2. Everybody splits two secrets, the seed of its own mask and the private key of its shared masks, so that any
   t shares bring one back, and sends each of the others its shares, which only that one can read (`agree`).
3. Everybody trains, and sends its update as integers x with masks on it:
   y_u = x_u + M(b_u) + Σ_{v>u} M(s_uv) − Σ_{v<u} M(s_uv)  modulo 2^32 (`add`).
4. Of those whose y_u has arrived the others hand in shares of b_u, of those who dropped out meanwhile shares
   of their key: so what does not vanish from Σ y_u can be taken off (`mean`).

`photon.silo.secure` is the other side.
"""

import base64
import math
import uuid
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch

from photon.config.schema import PrivacySection
from photon.errors import PhotonError, RunError
from photon.federation.exchange import Failure
from photon.flower_compat import (
    bytes_to_private_key,
    bytes_to_public_key,
    combine_shares,
    generate_shared_key,
    public_key_to_bytes,
)
from photon.link.messages import (
    AdvertiseKeys,
    Body,
    EncryptedShares,
    Masking,
    PublicKeys,
    ShareKeys,
    Shares,
    TrainRequest,
    Unmask,
)
from photon.privacy.masking import Integers, Quantizer, add, add_mask

Kind = TypeVar("Kind", bound=Body)
#: Sends each silo a body, and returns the answers of those who gave one.
Ask = Callable[[Mapping[str, Body], type[Body]], Mapping[str, Body | Failure]]


class SecureSum:
    """One attempt at a round's sum. Nothing of it outlives the attempt: the next one has new keys.

    Parameters
    ----------
    privacy
        Threshold and range.
    requests
        The round's train requests by silo.
    ask
        How to reach the silos.
    on_failure
        Called with a silo that takes no further part, and why.

    Raises
    ------
    PhotonError
        If the cohort is too small, or too large for the ring.
    RunError
        If the threshold cannot be reached.
    """

    def __init__(
        self,
        privacy: PrivacySection,
        requests: Mapping[str, TrainRequest],
        ask: Ask,
        on_failure: Callable[[str, Failure], None],
    ) -> None:
        self._attempt = uuid.uuid4().hex
        self._requests = requests
        self._ask = ask
        self._on_failure = on_failure
        self._keys: dict[str, PublicKeys] = {}
        #: Those who have shared their secrets, and those whose masked update has arrived.
        self._sharing: list[str] = []
        self._survivors: list[str] = []
        self._total: Integers = {}
        count = len(requests)
        self._threshold = threshold_of(privacy, count)
        self._limit = privacy.range
        Quantizer(self._limit, count)

    def agree(self) -> dict[str, TrainRequest]:
        """Let the cohort agree on keys, and return the orders of those who have, with what they need."""
        self._keys = self._all_answers(
            {
                name: AdvertiseKeys(
                    attempt=self._attempt,
                    run_id=request.run_id,
                    model_id=request.model_id,
                    round=request.round,
                    silo=name,
                )
                for name, request in self._requests.items()
            },
            PublicKeys,
        )
        shares = self._all_answers(
            {
                name: ShareKeys(attempt=self._attempt, silo=name, threshold=self._threshold, keys=self._keys)
                for name in self._keys
            },
            EncryptedShares,
        )
        self._sharing = sorted(shares)
        return {
            name: self._requests[name].model_copy(
                update={
                    "masking": Masking(
                        attempt=self._attempt,
                        shares={
                            sender: own.shares[name]
                            for sender, own in shares.items()
                            if sender != name and name in own.shares
                        },
                    )
                }
            )
            for name in self._sharing
        }

    def add(self, name: str, masked: Mapping[str, torch.Tensor]) -> None:
        """Add a masked update, int32 with the bits of uint32, to the sum."""
        integers = {key: tensor.numpy().view(np.uint32) for key, tensor in masked.items()}
        if self._total:
            add(self._total, integers)
        else:
            self._total = {key: values.copy() for key, values in integers.items()}
        self._survivors.append(name)

    def mean(self) -> dict[str, torch.Tensor]:
        """Unmask the sum and return the mean of the survivors' updates, float32.

        Raises
        ------
        RunError
            If fewer silos than the threshold have sent an update, or help to unmask the sum.
        """
        survivors = sorted(self._survivors)
        dropped = [name for name in self._sharing if name not in survivors]
        self._enough(len(survivors), "sent a masked update")
        answers = self._ask(
            {
                name: Unmask(attempt=self._attempt, silo=name, survivors=survivors, dropped=dropped)
                for name in survivors
            },
            Shares,
        )
        shares = [answer for answer in answers.values() if isinstance(answer, Shares)]
        reasons = [
            f"{name}: {answer.reason}" for name, answer in answers.items() if isinstance(answer, Failure)
        ]
        self._enough(len(shares), "helped to unmask the sum", "; ".join(reasons))
        shares = shares[: self._threshold]
        try:
            for name in survivors:
                add_mask(self._total, _combined([each.masks[name] for each in shares]), subtract=True)
            for name in dropped:
                self._take_off(name, _combined([each.keys[name] for each in shares]), survivors)
        except (KeyError, ValueError) as error:
            raise RunError(
                f"secure aggregation: the silos' shares do not fit each other ({error}); resume the run"
            ) from error
        # The range of integers is that which the silos took it from: all that were handed each other's keys.
        quantizer = Quantizer(self._limit, len(self._keys))
        return quantizer.decode_mean(self._total, len(survivors))

    def _take_off(self, name: str, private_key: bytes, survivors: list[str]) -> None:
        """Take off the masks that survivors share with a silo that has dropped out."""
        key = bytes_to_private_key(private_key)
        if public_key_to_bytes(key.public_key()).decode() != self._keys[name].masking:
            raise ValueError(f"the key of {name}")
        for other in survivors:
            shared = generate_shared_key(key, bytes_to_public_key(self._keys[other].masking.encode()))
            add_mask(self._total, base64.urlsafe_b64decode(shared), subtract=other < name)

    def _all_answers(self, bodies: Mapping[str, Body], kind: type[Kind]) -> dict[str, Kind]:
        answers: dict[str, Kind] = {}
        reasons = []
        for name, answer in self._ask(bodies, kind).items():
            if isinstance(answer, kind):
                answers[name] = answer
            elif isinstance(answer, Failure):
                self._on_failure(name, answer)
                reasons.append(f"{name}: {answer.reason}")
        self._enough(len(answers), "took part in agreeing on keys", "; ".join(reasons))
        return answers

    def _enough(self, count: int, did: str, reasons: str = "") -> None:
        if count < self._threshold:
            why = f" ({reasons})" if reasons else ""
            raise RunError(
                f"secure aggregation: {count} of {len(self._requests)} silos {did}, and it takes "
                f"{self._threshold} (privacy.threshold){why}"
            )


def threshold_of(privacy: PrivacySection, cohort: int) -> int:
    """Return how many silos it takes to unmask a sum over a cohort.

    Raises
    ------
    PhotonError
        If the cohort is too small, or the threshold is not a majority of it.
    """
    if cohort < 2:
        raise PhotonError(
            "privacy.secure_aggregation: the sum over one silo is its update; draw a larger cohort"
        )
    threshold = privacy.threshold or math.ceil(2 * cohort / 3)
    if not cohort < 2 * threshold <= 2 * cohort:
        raise PhotonError(
            f"privacy.threshold={threshold}: not a majority of the cohort of {cohort}; set it to null, or to "
            f"{cohort // 2 + 1} at least and {cohort} at most"
        )
    return threshold


def _combined(shares: list[str]) -> bytes:
    return combine_shares([base64.b64decode(share) for share in shares])
