"""What a silo refuses in a secure sum, asked step by step by a server that does not keep to the protocol."""

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
    CheckShares,
    Complaints,
    EncryptedShares,
    HandedShare,
    Masking,
    PublicKeys,
    ShareKeys,
    Shares,
    TrainRequest,
    Unmask,
)
from photon.privacy.sharing import context_of, expected
from photon.silo import opened, secure
from photon.silo.policy import SiloPolicy
from photon.silo.site import SiloSite
from photon.strategy.contract import Contract, Leaving

NAMES = ["alpha", "beta", "gamma", "omega"]
ATTEMPT = "a" * 32
#: What is masked: one parameter.
UPDATES = Contract({}, {"params": Leaving("parameters", {"w": torch.Size([100])}, masked=frozenset({"w"}))})


class Cohort:
    """Four silos, each with a folder of its own, and the messages that an honest server would send."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.config = config
        self.sites = {
            name: SiloSite(folder, folder / name, None, SiloPolicy(), config.privacy) for name in NAMES
        }
        self.update = torch.arange(100.0) / 100
        self.keys: dict[str, PublicKeys] = {}
        self.shares: dict[str, EncryptedShares] = {}

    def advertise(self, name: str, attempt: str = ATTEMPT, server_round: int = 1, run: str = "r") -> None:
        request = AdvertiseKeys(attempt=attempt, run_id=run, model_id="m", round=server_round, silo=name)
        self.keys[name] = secure.advertise_keys(request, self.sites[name])

    def share(self, name: str, attempt: str = ATTEMPT, **changes: Any) -> None:
        request = ShareKeys(
            **{"attempt": attempt, "silo": name, "threshold": 3, "keys": self.keys, **changes}
        )
        self.shares[name] = secure.share_keys(request, self.sites[name])

    def check(self, name: str, attempt: str = ATTEMPT, **changes: str) -> Complaints:
        """Hand a silo what the others have for it; ``changes`` are other tokens, by sender."""
        handed = {}
        for sender, dealt in self.shares.items():
            if sender == name:
                continue
            agreed = {
                what: expected(dealing, public, 3, NAMES, context_of(attempt, sender, what))[name]
                for what, dealing, public in (
                    ("own", dealt.own, self.keys[sender].own),
                    ("masking", dealt.masking, self.keys[sender].masking),
                )
            }
            handed[sender] = HandedShare(token=changes.get(sender, dealt.shares[name]), **agreed)
        request = CheckShares(attempt=attempt, silo=name, shares=handed)
        return secure.check_shares(request, self.sites[name])

    def request(
        self,
        name: str,
        attempt: str = ATTEMPT,
        silos: list[str] | None = None,
        server_round: int = 1,
        run: str = "r",
    ) -> TrainRequest:
        return TrainRequest(
            run_id=run,
            model_id="m",
            round=server_round,
            silo=name,
            members=[name],
            global_step=0,
            steps=1,
            batch_size=1,
            last_round=0,
            position=0,
            cohort=4,
            masking=Masking(attempt=attempt, silos=silos or NAMES),
        )

    def mask(self, name: str, attempt: str = ATTEMPT, **changes: Any) -> torch.Tensor:
        request = self.request(name, attempt, **changes)
        update = {"params": {"w": Packed(self.update)}}
        return secure.mask(request, update, self.sites[name], self.config, UPDATES)["params"]["w"].data

    def unmask(self, name: str, survivors: list[str], dropped: list[str], attempt: str = ATTEMPT) -> Shares:
        request = Unmask(attempt=attempt, silo=name, survivors=survivors, dropped=dropped)
        return secure.unmask(request, self.sites[name])

    def agree(self, attempt: str = ATTEMPT, server_round: int = 1, run: str = "r") -> None:
        self.shares = {}
        for name in NAMES:
            self.advertise(name, attempt, server_round, run)
        for name in NAMES:
            self.share(name, attempt)
        for name in NAMES:
            assert self.check(name, attempt).senders == []

    def prepare(
        self, attempt: str = ATTEMPT, server_round: int = 1, run: str = "r"
    ) -> dict[str, torch.Tensor]:
        """Go on until everybody has masked; return what everybody sends."""
        self.agree(attempt, server_round, run)
        return {name: self.mask(name, attempt, server_round=server_round, run=run) for name in NAMES}


@pytest.fixture
def cohort(tmp_path: Path, small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Cohort:
    # Nobody cuts the power, and flushing is most of what this takes.
    monkeypatch.setattr("os.fsync", lambda _: None)
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


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("server_round", "run", "changed"),
    [
        # The same update, whatever it is called.
        (1, "r", False),
        (7, "r", False),
        (1, "another", False),
        # Trained again, and not quite the same.
        (1, "r", True),
    ],
)
def test_an_update_is_in_sums_over_the_same_silos_alone(
    cohort: Cohort, server_round: int, run: str, changed: bool
) -> None:
    cohort.prepare()
    for name in NAMES:
        cohort.unmask(name, NAMES, [])
    # What comes in between changes nothing: another round is begun, and never ends.
    for name in NAMES:
        cohort.advertise(name, "x" * 32, server_round=2)
    if changed:
        cohort.update = cohort.update * (1 + 1e-6)
    cohort.prepare("b" * 32, server_round, run)
    with pytest.raises(PhotonError, match="this update of alpha was in a sum over other silos before"):
        cohort.unmask("alpha", ["alpha", "beta", "gamma"], ["omega"], "b" * 32)
    cohort.unmask("alpha", NAMES, [], "b" * 32)


def test_an_update_that_was_opened_does_not_even_leave_for_another_sum(cohort: Cohort) -> None:
    cohort.prepare()
    cohort.unmask("alpha", NAMES, [])
    cohort.agree("b" * 32)
    fewer = ["alpha", "beta", "gamma"]
    with pytest.raises(PhotonError, match="was in a sum over other silos before"):
        cohort.mask("alpha", "b" * 32, silos=fewer)
    request = cohort.request("alpha", "b" * 32, silos=fewer)
    with pytest.raises(PhotonError, match="was in a sum over other silos before"):
        secure.prepare(request, cohort.sites["alpha"], cohort.config, is_federation=False)
    # beta has helped with none.
    cohort.mask("beta", "b" * 32, silos=fewer)


def test_a_new_update_is_free(cohort: Cohort) -> None:
    cohort.prepare()
    cohort.unmask("alpha", NAMES, [])
    cohort.update = cohort.update * 2
    cohort.prepare("c" * 32, server_round=2)
    cohort.unmask("alpha", ["alpha", "beta", "gamma"], ["omega"], "c" * 32)


@pytest.mark.parametrize(("seed", "fresh"), [(None, True), (3, False)])
def test_a_round_that_is_trained_anew_needs_fresh_noise(
    tmp_path: Path, small_config: Callable[..., RunConfig], seed: int | None, fresh: bool
) -> None:
    config = small_config(
        *("privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update"),
        *("privacy.clip_norm=0.1", "privacy.noise_multiplier=1", f"privacy.seed={seed or 'null'}"),
    )
    cohort = Cohort(tmp_path, config)
    cohort.prepare()
    cohort.unmask("alpha", NAMES, [])
    kept = cohort.sites["alpha"].state / "alpha" / "round-000001" / "reply.safetensors"
    kept.parent.mkdir()
    kept.touch()
    cohort.agree("b" * 32)
    fewer = ["alpha", "beta", "gamma"]
    # The one that was opened is not masked for another sum, noise or not.
    with pytest.raises(PhotonError, match="was in a sum over other silos before"):
        cohort.mask("alpha", "b" * 32, silos=fewer)
    request = cohort.request("alpha", "b" * 32, silos=fewer)
    with pytest.raises(PhotonError, match="was in a sum over other silos before"):
        secure.prepare(request, cohort.sites["alpha"], config, is_federation=True)
    assert kept.exists()
    if not fresh:
        with pytest.raises(PhotonError, match="was in a sum over other silos before"):
            secure.prepare(request, cohort.sites["alpha"], config, is_federation=False)
        return
    secure.prepare(request, cohort.sites["alpha"], config, is_federation=False)
    assert not kept.exists(), "it will be trained anew"
    cohort.update = cohort.update + torch.randn(100)
    for name in fewer:
        cohort.mask(name, "b" * 32, silos=fewer)
    cohort.unmask("alpha", fewer, [], "b" * 32)


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "MOST", 8)
    memory = opened.Opened(tmp_path)
    for number in range(20):
        memory.add([opened.round_key("r", number)], ["a", str(number)])
    assert (tmp_path / "opened.bin").stat().st_size <= 8 * 64
    assert memory.last(opened.round_key("r", 19)) == opened.silos_key(["19", "a"])
    assert memory.last(opened.round_key("r", 16)) == opened.silos_key(["16", "a"])
    assert memory.last(opened.round_key("r", 0)) is None
    (tmp_path / "opened.bin").write_bytes(b"half a record")
    with pytest.raises(PhotonError, match="is damaged"):
        memory.last(opened.round_key("r", 19))


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


def test_shares_that_cannot_be_used_are_complained_of(cohort: Cohort) -> None:
    for name in NAMES:
        cohort.advertise(name)
    for name in NAMES:
        cohort.share(name)
    beta, gamma = cohort.shares["beta"].shares, cohort.shares["gamma"].shares
    # For somebody else, what comes from alpha itself by the same channel, and nothing at all.
    told = cohort.check("alpha", beta=beta["gamma"], gamma=cohort.shares["alpha"].shares["gamma"], omega="")
    assert told.senders == ["beta", "gamma", "omega"]
    assert cohort.check("beta", alpha=gamma["beta"]).senders == ["alpha"]
    assert cohort.check("gamma", beta="nonsense").senders == ["beta"]
    with pytest.raises(PhotonError, match="not the time"):
        cohort.check("gamma")
    with pytest.raises(PhotonError, match="the shares of 3 of 4 silos are not enough"):
        cohort.mask("gamma")
    cohort.mask("gamma", silos=["alpha", "gamma", "omega"])


def test_too_few_partners_leave_the_update_unmasked_and_unsent(cohort: Cohort) -> None:
    cohort.agree()
    for silos in (["alpha", "beta"], ["beta", "gamma", "omega"], [*NAMES, "stranger"]):
        with pytest.raises(PhotonError, match="are not enough"):
            cohort.mask("alpha", silos=silos)
    with pytest.raises(PhotonError, match="made for another round"):
        cohort.mask("alpha", server_round=2)


def test_secrets_are_for_their_owner_alone_and_gone_after_the_sum(cohort: Cohort) -> None:
    cohort.prepare()
    file = cohort.sites["alpha"].state / "alpha" / "secure.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = json.loads(file.read_text())
    cohort.unmask("alpha", NAMES, [])
    after = file.read_text()
    secrets = [before[what] for what in ("sharing", "masking", "own")]
    secrets += [share[what] for share in before["shares"].values() for what in ("own", "masking")]
    assert len(set(secrets)) == 3 + 2 * len(NAMES)
    assert not any(secret in after for secret in secrets)
