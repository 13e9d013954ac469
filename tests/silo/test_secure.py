"""What a silo refuses in a secure sum, asked step by step by a server that does not keep to the protocol."""

import base64
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.link.encoding import Packed
from photon.link.messages import (
    AdvertiseKeys,
    EncryptedShares,
    Masking,
    PublicKeys,
    ShareKeys,
    Shares,
    TrainRequest,
    Unmask,
)
from photon.silo import secure
from photon.silo.policy import SiloPolicy
from photon.silo.site import SiloSite

NAMES = ["alpha", "beta", "gamma", "omega"]
ATTEMPT = "a" * 32


class Cohort:
    """Four silos, each with a folder of its own, and the messages that an honest server would send."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.config = config
        self.sites = {
            name: SiloSite(folder, folder / name, None, SiloPolicy(), config.privacy) for name in NAMES
        }
        self.keys: dict[str, PublicKeys] = {}
        self.shares: dict[str, EncryptedShares] = {}

    def advertise(self, name: str, attempt: str = ATTEMPT, server_round: int = 1) -> PublicKeys:
        request = AdvertiseKeys(attempt=attempt, run_id="r", model_id="m", round=server_round, silo=name)
        self.keys[name] = secure.advertise_keys(request, self.sites[name])
        return self.keys[name]

    def share(self, name: str, attempt: str = ATTEMPT, **changes: Any) -> EncryptedShares:
        request = ShareKeys(
            **{"attempt": attempt, "silo": name, "threshold": 3, "keys": self.keys, **changes}
        )
        self.shares[name] = secure.share_keys(request, self.sites[name])
        return self.shares[name]

    def mask(self, name: str, attempt: str = ATTEMPT, **changes: str) -> torch.Tensor:
        received = {sender: own.shares[name] for sender, own in self.shares.items() if sender != name}
        request = TrainRequest(
            run_id="r",
            model_id="m",
            round=1,
            silo=name,
            members=[name],
            global_step=0,
            steps=1,
            batch_size=1,
            last_round=0,
            position=0,
            cohort=4,
        )
        masking = Masking(attempt=attempt, shares={**received, **changes})
        update = {"params": {"w": Packed(torch.arange(100.0) / 100)}}
        return secure.mask(request, masking, update, self.sites[name], self.config, {"w"})["params"]["w"].data

    def unmask(self, name: str, survivors: list[str], dropped: list[str], attempt: str = ATTEMPT) -> Shares:
        request = Unmask(attempt=attempt, silo=name, survivors=survivors, dropped=dropped)
        return secure.unmask(request, self.sites[name])

    def prepare(self, attempt: str = ATTEMPT, server_round: int = 1) -> dict[str, torch.Tensor]:
        """Go on until everybody has masked; return what everybody sends."""
        self.shares = {}
        for name in NAMES:
            self.advertise(name, attempt, server_round)
        for name in NAMES:
            self.share(name, attempt)
        return {name: self.mask(name, attempt) for name in NAMES}


@pytest.fixture
def cohort(tmp_path: Path, small_config: Callable[..., RunConfig]) -> Cohort:
    secure_run = ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"]
    return Cohort(tmp_path, small_config(*secure_run))


def test_a_silo_never_tells_both_secrets_of_another(cohort: Cohort) -> None:
    cohort.prepare()
    with pytest.raises(PhotonError, match="survivors and dropped silos are not those that shared keys"):
        cohort.unmask("alpha", ["alpha", "beta", "gamma", "omega"], ["beta"])
    told = cohort.unmask("alpha", ["alpha", "beta", "gamma"], ["omega"])
    assert (set(told.masks), set(told.keys)) == ({"alpha", "beta", "gamma"}, {"omega"})
    with pytest.raises(PhotonError, match="has already helped to unmask"):
        cohort.unmask("alpha", ["alpha", "gamma", "omega"], ["beta"])


def test_a_sum_over_too_few_or_without_oneself_is_not_unmasked(cohort: Cohort) -> None:
    cohort.prepare()
    with pytest.raises(PhotonError, match="a sum over 2 silos is below the threshold of 3"):
        cohort.unmask("alpha", ["alpha", "beta"], ["gamma", "omega"])
    with pytest.raises(PhotonError, match="sent nothing that could be unmasked"):
        cohort.unmask("alpha", ["beta", "gamma", "omega"], ["alpha"])
    with pytest.raises(PhotonError, match="not those that shared keys"):
        cohort.unmask("alpha", ["alpha", "beta", "gamma"], [])


def test_the_same_keys_mask_one_update(cohort: Cohort) -> None:
    cohort.prepare()
    with pytest.raises(PhotonError, match="has already masked an update with these keys"):
        cohort.mask("alpha")


def test_a_second_sum_of_a_round_is_over_the_same_silos(cohort: Cohort) -> None:
    cohort.prepare()
    cohort.unmask("alpha", NAMES, [])
    cohort.prepare("b" * 32)
    with pytest.raises(PhotonError, match="It takes these again: alpha, beta, gamma, omega"):
        cohort.unmask("alpha", ["alpha", "beta", "gamma"], ["omega"], "b" * 32)
    cohort.unmask("alpha", NAMES, [], "b" * 32)
    cohort.prepare("c" * 32, server_round=2)
    cohort.unmask("alpha", ["alpha", "beta", "gamma"], ["omega"], "c" * 32)


def test_every_attempt_has_masks_of_its_own(cohort: Cohort) -> None:
    first, second = cohort.prepare(), cohort.prepare("b" * 32)
    for name in NAMES:
        assert float((first[name] == second[name]).double().mean()) < 0.05
    with pytest.raises(PhotonError, match="knows nothing of this attempt"):
        cohort.mask("alpha", ATTEMPT)


def test_keys_that_were_exchanged_on_the_way_are_noticed(cohort: Cohort) -> None:
    for name in NAMES:
        cohort.advertise(name)
    swapped = {**cohort.keys, "alpha": cohort.keys["beta"], "beta": cohort.keys["alpha"]}
    with pytest.raises(PhotonError, match="not those advertised"):
        cohort.share("alpha", keys=swapped)
    with pytest.raises(PhotonError, match="not those advertised"):
        cohort.share("alpha", keys={**cohort.keys, "beta": cohort.keys["gamma"]})
    for threshold in (2, 5):
        with pytest.raises(PhotonError, match="is not a majority"):
            cohort.share("alpha", threshold=threshold)
    cohort.share("alpha")
    with pytest.raises(PhotonError, match="already shared its keys"):
        cohort.share("alpha")


def test_a_share_for_somebody_else_or_of_another_attempt_is_refused(cohort: Cohort) -> None:
    for name in NAMES:
        cohort.advertise(name)
    for name in NAMES:
        cohort.share(name)
    beta = cohort.shares["beta"].shares
    with pytest.raises(PhotonError, match="what beta shared cannot be read"):
        cohort.mask("alpha", beta=beta["gamma"])
    with pytest.raises(PhotonError, match="what beta shared cannot be read"):
        cohort.mask("alpha", beta="nonsense")
    # The channel between two is the same in both directions, so the letter says whose it is.
    with pytest.raises(PhotonError, match="what beta shared is not meant for alpha"):
        cohort.mask("alpha", beta=cohort.shares["alpha"].shares["beta"])
    cohort.mask("alpha")


def test_too_few_partners_leave_the_update_unmasked_and_unsent(cohort: Cohort) -> None:
    for name in NAMES:
        cohort.advertise(name)
    for name in ("alpha", "beta"):
        cohort.share(name)
    with pytest.raises(PhotonError, match="the shares of 1 others are not enough"):
        cohort.mask("alpha")


def test_secrets_are_for_their_owner_alone_and_gone_after_the_sum(cohort: Cohort) -> None:
    cohort.prepare()
    file = cohort.sites["alpha"].state / "alpha" / "secure.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = json.loads(file.read_text())
    assert "PRIVATE KEY" in before["masking_key"]
    assert len(base64.b64decode(before["seed"])) == 32
    cohort.unmask("alpha", NAMES, [])
    after = file.read_text()
    assert "PRIVATE KEY" not in after
    assert before["seed"] not in after
    assert not any(share["key"] in after for share in before["received"].values())
