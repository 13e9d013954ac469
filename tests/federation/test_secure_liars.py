"""Secure sums with a silo that lies: what becomes of it, of the others, and of the sum.

Silos and server talk without Flower and without a model; what a liar sends is made of what is right.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from photon.config.schema import RunConfig
from photon.errors import PhotonError, RunError
from photon.federation.exchange import Failure
from photon.federation.failures import UndoneError
from photon.federation.secure import OpenedSums, SecureSum, _left_out
from photon.flower_compat import encrypt, public_key_to_bytes
from photon.link.encoding import Packed
from photon.link.messages import (
    Body,
    Complaints,
    EncryptedShares,
    PublicKeys,
    Shares,
    TrainReport,
    TrainRequest,
)
from photon.privacy.masking import Quantizer
from photon.privacy.sharing import context_of, deal, new_secret, scalar
from photon.silo import secure
from photon.silo.policy import SiloPolicy
from photon.silo.service import answer_keys
from photon.silo.site import SiloSite
from photon.strategy.contract import Contract, Leaving
from tests.conftest import small_run

HONEST = ["alpha", "delta", "gamma", "omega"]
LIAR = "beta"
NAMES = sorted([*HONEST, LIAR])
#: What is masked: one parameter.
UPDATES = Contract({}, {"params": Leaving("parameters", {"w": torch.Size([50])}, masked=frozenset({"w"}))})
#: Of what the liar answers to: who is asked, what it asks, what an honest silo would say.
Lie = Callable[["Cohort", str, Body], Body | None]


class Cohort:
    """A server and its silos, of which one may lie; ``lies`` has what changes its answers, by kind."""

    def __init__(self, folder: Path, config: RunConfig, lies: Mapping[type[Body], Lie] | None = None) -> None:
        self.config = config
        self.sites = {
            name: SiloSite(folder, folder / name, None, SiloPolicy(), config.privacy) for name in NAMES
        }
        generator = torch.Generator().manual_seed(1)
        self.updates = {name: torch.randn(50, generator=generator) for name in NAMES}
        self.lies = dict(lies or {})
        self.failed: dict[str, str] = {}
        self.warnings: list[str] = []
        self.opened = OpenedSums(folder / "opened.json", keep=3)
        self.masked: Callable[..., Any] = secure.mask

    def ask(self, bodies: Mapping[str, Body], kind: type[Body]) -> dict[str, Body | Failure]:
        answers: dict[str, Body | Failure] = {}
        for name, body in bodies.items():
            try:
                answer: Any = answer_keys(body, self.sites[name])  # type: ignore[arg-type]
                if name == LIAR and kind in self.lies:
                    answer = self.lies[kind](self, name, answer)
                if answer is None:
                    raise PhotonError("message: its body cannot be read")
                # As it travels.
                answers[name] = kind.model_validate_json(answer.model_dump_json())
            except (PhotonError, ValueError) as error:
                answers[name] = Failure("rejected", str(error))
        return answers

    def open(self, sending: list[str] | None = None, server_round: int = 1) -> tuple[torch.Tensor, list[str]]:
        """Do a round; return the mean, and whose updates are in it."""
        requests = {
            name: TrainRequest(
                run_id="r", model_id="m", round=server_round, silo=name, members=[name], global_step=0,
                steps=1, batch_size=1, last_round=0, position=0, cohort=4,
            )
            for name in NAMES
        }  # fmt: skip
        self.failed, self.warnings = {}, []
        server = SecureSum(
            self.config.privacy,
            requests,
            UPDATES,
            self.ask,
            lambda name, failure: self.failed.__setitem__(name, failure.reason),
            self.warnings.append,
            self.opened,
        )
        agreed = server.agree()
        survivors = [name for name in agreed if name in (sending or NAMES)]
        for name in survivors:
            update = {"params": {"w": Packed(self.updates[name])}}
            masked = self.masked(agreed[name], update, self.sites[name], self.config, UPDATES)
            server.add(name, {"w": masked["params"]["w"].data})
        return server.opened()["w"], survivors

    def check(self, mean: torch.Tensor, silos: list[str]) -> None:
        expected_mean = torch.stack([self.updates[name] for name in silos]).double().mean(0)
        torch.testing.assert_close(mean.double(), expected_mean, rtol=0, atol=1e-6)


SECURE = ["privacy=secure", "strategy.weighting=uniform", "link.uplink_payload=update", "privacy.threshold=3"]


@pytest.fixture(scope="module")
def secure_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return small_run(*SECURE, data=corpus, run_dir=tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power, and flushing is most of what a round takes here."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def other_curve() -> str:
    return public_key_to_bytes(ec.generate_private_key(ec.SECP256R1()).public_key()).decode()


def with_keys(**changes: Callable[[PublicKeys], str]) -> Lie:
    return lambda _, __, keys: keys.model_copy(update={k: make(keys) for k, make in changes.items()})  # type: ignore[arg-type]


def of_another(cohort: Cohort, name: str, answer: Body) -> Body:
    """Share the secrets of other keys than those advertised, in a way that fits itself."""
    attempt = secure._Attempt.model_validate_json(
        (cohort.sites[name].state / name / "secure.json").read_bytes()
    )
    _, dealing = deal(new_secret(), 3, NAMES, context_of(attempt.attempt, name, "masking"))
    return answer.model_copy(update={"masking": dealing})


def with_shares(*receivers: str) -> Lie:
    """Encrypt another share for some than the one that was committed to."""

    def lie(cohort: Cohort, name: str, answer: Body) -> Body:
        assert isinstance(answer, EncryptedShares)
        file = cohort.sites[name].state / name / "secure.json"
        attempt = secure._Attempt.model_validate_json(file.read_bytes())
        tokens = dict(answer.shares)
        for receiver in receivers:
            share = attempt.shares[name].model_copy(update={"receiver": receiver, "own": scalar(7)})
            channel = secure._channel(attempt.sharing, attempt.keys[receiver].sharing, receiver)
            tokens[receiver] = encrypt(channel, share.model_dump_json().encode()).decode()
        return answer.model_copy(update={"shares": tokens})

    return lie


def to_nobody(_: Cohort, __: str, answer: Body) -> Body:
    assert isinstance(answer, EncryptedShares)
    tokens = list(answer.shares.values())
    turned = dict(zip(answer.shares, [*tokens[1:], tokens[0]], strict=True))
    return answer.model_copy(update={"shares": turned})


def unequal(_: Cohort, __: str, answer: Body) -> Body:
    """Deal shares that are on no polynomial, each with a commitment that fits it alone."""
    assert isinstance(answer, EncryptedShares)
    proof = [answer.own.proof[0], *answer.own.proof[:0:-1]]
    return answer.model_copy(update={"own": answer.own.model_copy(update={"proof": proof})})


ABOUT_KEYS = {
    "empty": lambda *_: None,
    "no key": with_keys(sharing=lambda _: "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
    "no text": with_keys(own=lambda _: ""),
    "another curve": with_keys(masking=lambda _: other_curve()),
    "other letters": with_keys(masking=lambda keys: keys.masking + "\n"),
    "too long": with_keys(masking=lambda keys: keys.masking + "x" * 10**6),
    "one key twice": with_keys(masking=lambda keys: keys.sharing),
}
ABOUT_SHARES = {
    "empty": lambda *_: None,
    "none for one": lambda _, __, a: a.model_copy(update={"shares": dict(list(a.shares.items())[1:])}),
    "for a stranger": lambda _, __, a: a.model_copy(update={"shares": {**a.shares, "stranger": "x"}}),
    "too long": lambda _, __, a: a.model_copy(update={"shares": {**a.shares, "alpha": "x" * 10**6}}),
    "of another key": of_another,
    "no proof": lambda _, __, a: a.model_copy(update={"own": a.own.model_copy(update={"proof": []})}),
    "another proof": unequal,
    "of the other secret": lambda _, __, a: a.model_copy(update={"own": a.masking, "masking": a.own}),
    "for others": to_nobody,
    "wrong for all": with_shares(*HONEST),
    "wrong for one": with_shares("omega"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "lie"),
    [
        *((PublicKeys, lie) for lie in ABOUT_KEYS.values()),
        *((EncryptedShares, lie) for lie in ABOUT_SHARES.values()),
        (Complaints, lambda *_: None),
        (Complaints, lambda *_: Complaints(senders=["stranger"])),
        (Complaints, lambda *_: Complaints(senders=[LIAR])),
        # One who accuses several is not believed.
        (Complaints, lambda *_: Complaints(senders=HONEST)),
        (Complaints, lambda *_: Complaints(senders=["omega", "gamma"])),
    ],
    ids=lambda value: None,
)
def test_a_lie_in_agreeing_costs_the_liar_alone(
    tmp_path: Path, secure_config: RunConfig, kind: type[Body], lie: Lie
) -> None:
    cohort = Cohort(tmp_path, secure_config, {kind: lie})
    mean, survivors = cohort.open()
    assert survivors == HONEST
    assert list(cohort.failed) == [LIAR]
    cohort.check(mean, HONEST)


def test_who_accuses_one_honest_silo_takes_it_along_and_no_other(
    tmp_path: Path, secure_config: RunConfig
) -> None:
    cohort = Cohort(tmp_path, secure_config, {Complaints: lambda *_: Complaints(senders=["omega"])})
    mean, survivors = cohort.open()
    assert list(cohort.failed) == ["omega"]
    cohort.check(mean, survivors)
    # Whoever is accused by two, or accuses two, goes alone, whatever else is said.
    assert list(_left_out({"a": {"b"}, "b": set(), "c": {"b"}})) == ["b"]
    assert list(_left_out({"b": {"a", "c"}, "a": {"b"}})) == ["b"]
    assert list(_left_out({"a": {"b"}, "c": {"d"}})) == ["b", "d"]
    assert _left_out({"a": set()}) == {}


def test_a_key_that_comes_twice_is_nobodys(tmp_path: Path, secure_config: RunConfig) -> None:
    cohort = Cohort(tmp_path, secure_config)
    ask = cohort.ask

    def copying(bodies: Mapping[str, Body], kind: type[Body]) -> dict[str, Body | Failure]:
        answers = ask(bodies, kind)
        return {**answers, LIAR: answers["omega"]} if kind is PublicKeys else answers

    cohort.ask = copying  # type: ignore[method-assign]
    mean, survivors = cohort.open()
    assert set(cohort.failed) == {LIAR, "omega"}
    cohort.check(mean, survivors)


def with_masks(change: Callable[[dict[str, str]], dict[str, str]]) -> Lie:
    return lambda _, __, answer: answer.model_copy(update={"masks": change(answer.masks)})  # type: ignore[attr-defined]


def of_the_dropped(_: Cohort, __: str, answer: Body) -> Body:
    assert isinstance(answer, Shares)
    return answer.model_copy(update={"keys": {k: flipped(v) for k, v in answer.keys.items()}})


FLIPPED: dict[str, Lie] = {
    "one bit of one": with_masks(lambda masks: {**masks, "alpha": flipped(masks["alpha"])}),
    "one bit of each": with_masks(lambda masks: {k: flipped(v) for k, v in masks.items()}),
    "another silo's": with_masks(lambda masks: dict.fromkeys(masks, masks[LIAR])),
    "none": lambda *_: Shares(masks={}, keys={}),
    "empty": lambda *_: None,
    "no number": with_masks(lambda masks: dict.fromkeys(masks, "é" * 96)),
    "beyond the order": with_masks(lambda masks: dict.fromkeys(masks, "f" * 96)),
    "of a dropped one": of_the_dropped,
}


def flipped(text: str) -> str:
    return f"{int(text, 16) ^ 1:096x}"


@pytest.mark.parametrize("lie", FLIPPED.values(), ids=FLIPPED)
def test_a_wrong_share_is_not_used(tmp_path: Path, secure_config: RunConfig, lie: Lie) -> None:
    cohort = Cohort(tmp_path, secure_config, {Shares: lie})
    # omega has shared its keys, and drops out.
    mean, survivors = cohort.open(["alpha", "beta", "delta", "gamma"])
    assert survivors == ["alpha", "beta", "delta", "gamma"]
    cohort.check(mean, survivors)
    assert len(cohort.warnings) == 1
    assert "without the help of beta: " in cohort.warnings[0]
    assert not cohort.failed, "its update is in the sum"


def test_too_few_good_shares_open_nothing(tmp_path: Path, secure_config: RunConfig) -> None:
    cohort = Cohort(tmp_path, secure_config, {Shares: FLIPPED["one bit of one"]})
    with pytest.raises(RunError, match=r"2 of 5 silos helped .* \(beta: what it handed in is not what alpha"):
        cohort.open(["alpha", "beta", "gamma"])


@pytest.mark.parametrize("lie", [with_shares(), with_shares("omega")])
def test_a_liar_that_drops_out_takes_its_masks_along(
    tmp_path: Path, secure_config: RunConfig, lie: Lie
) -> None:
    cohort = Cohort(tmp_path, secure_config, {EncryptedShares: lie})
    mean, survivors = cohort.open(HONEST)
    assert survivors == HONEST
    cohort.check(mean, HONEST)


# --- what is and is not bounded -----------------------------------------------------------------------


def forge(cohort: Cohort, added: torch.Tensor) -> None:
    """Let the liar add anything, modulo 2^32, to each of its masked coordinates."""
    mask = secure.mask

    def forged(request: TrainRequest, *rest: Any) -> Any:
        reply = mask(request, *rest)
        if request.silo != LIAR:
            return reply
        integers = reply["params"]["w"].data.numpy().view(np.uint32)
        integers += added.numpy().astype(np.uint32)
        return {"params": {"w": Packed(torch.from_numpy(integers.view(np.int32)))}}

    cohort.masked = forged


def test_the_sum_of_so_many_reaches_the_range_and_no_further(
    tmp_path: Path, secure_config: RunConfig
) -> None:
    cohort = Cohort(tmp_path, secure_config)
    quantizer = Quantizer(8.0, 5)
    most = 5 * (2**quantizer.bits - 1)
    honest = sum(quantizer.encode({"w": update})["w"].astype(np.int64) for update in cohort.updates.values())
    # Up to the top of what five can reach: the mean is at the range.
    forge(cohort, torch.from_numpy(most - honest))
    mean, _ = cohort.open()
    torch.testing.assert_close(mean, torch.full((50,), 8.0))
    forge(cohort, torch.from_numpy(most - honest) + torch.nn.functional.one_hot(torch.tensor(7), 50))
    with pytest.raises(UndoneError, match=r"the sum of w is beyond what 5 updates within privacy.range=8"):
        cohort.open(server_round=2)


def report(norm: float, noise: float | None = None) -> TrainReport:
    return TrainReport(
        round=1, silo="x", steps=1, tokens=1, position=1, update_norm=norm, state_lost=False,
        seconds={"total": 1, "training": 1, "load": 0, "save": 0},
        privacy=None if noise is None else {"clip_norm": 0.5, "noise_multiplier": noise, "releases": 1},
    )  # fmt: skip


def test_a_mean_is_no_longer_than_reported_norms_and_the_clip_norm(
    tmp_path: Path, secure_config: RunConfig
) -> None:
    def server(federations: list[str], **privacy: float) -> SecureSum:
        made = SecureSum(
            secure_config.privacy.model_copy(update=privacy),
            {name: TrainRequest.model_construct(round=1) for name in NAMES},
            UPDATES,
            lambda *_: {},
            lambda *_: None,
            lambda _: None,
            federations=federations,
        )
        made._keys = dict.fromkeys(NAMES)  # type: ignore[arg-type]
        return made

    mean = {"w": torch.full((100,), 0.1)}
    assert float(mean["w"].norm()) == pytest.approx(1)
    reports = {name: report(1.0) for name in NAMES}
    server([]).check_norm(mean, reports)
    # Opposite updates may cancel, so less is fine.
    server([]).check_norm({"w": mean["w"] / 10}, reports)
    with pytest.raises(UndoneError, match=r"they are reported to have one of 0.9 on average"):
        server([]).check_norm(mean, {**reports, LIAR: report(0.5)})
    with pytest.raises(UndoneError, match=r"privacy.clip_norm and noise leave them one of 0.9"):
        server([], clip_norm=0.9).check_norm(mean, reports)
    server([], clip_norm=1.0).check_norm(mean, reports)
    # What a federation reports takes the place of the bound that it does not keep to.
    server([LIAR], clip_norm=0.9).check_norm(mean, {**reports, LIAR: report(1.4)})
    with pytest.raises(UndoneError, match=r"privacy.clip_norm"):
        server([LIAR], clip_norm=0.9).check_norm(mean, reports)
    # 0.5 + (10 + 8) · 0.1 · 0.5 / √5, and more noise where a silo's own rule asks for it.
    noisy = {"clip_norm": 0.5, "noise_multiplier": 0.1}
    with pytest.raises(UndoneError, match=r"leave them one of 0.902"):
        server([], **noisy).check_norm(mean, reports)
    own = {name: report(1.0, noise=0.2) for name in NAMES}
    server([], **noisy).check_norm(mean, own)


def test_honest_noise_is_within_the_bound(tmp_path: Path, secure_config: RunConfig) -> None:
    privacy = secure_config.privacy.model_copy(update={"clip_norm": 0.5, "noise_multiplier": 2.0})
    cohort = Cohort(tmp_path, secure_config.model_copy(update={"privacy": privacy}))
    generator = torch.Generator().manual_seed(0)
    for dimension in (1, 50, 5000):
        for _ in range(50):
            noise = torch.randn(5, dimension, generator=generator)
            update = torch.full((dimension,), 0.5 / dimension**0.5) + noise
            server = SecureSum(
                privacy, {n: TrainRequest.model_construct(round=1) for n in NAMES}, UPDATES,
                cohort.ask, lambda *_: None, lambda _: None,
            )  # fmt: skip
            server._keys = dict.fromkeys(NAMES)  # type: ignore[arg-type]
            server.check_norm(
                {"w": update.mean(0)},
                {n: report(float(u.norm())) for n, u in zip(NAMES, update, strict=True)},
            )


# --- a round that is repeated -------------------------------------------------------------------------


def test_a_repeated_round_is_over_the_silos_of_the_first_sum(
    tmp_path: Path, secure_config: RunConfig
) -> None:
    cohort = Cohort(tmp_path, secure_config)
    first, survivors = cohort.open(["alpha", "beta", "delta", "gamma"])
    # The next round begins, and the server goes back: omega is there again, and left out.
    cohort.updates = {name: update * 2 for name, update in cohort.updates.items()}
    cohort.open(server_round=2)
    cohort.updates = {name: update / 2 for name, update in cohort.updates.items()}
    again, silos = cohort.open()
    assert silos == survivors
    assert not cohort.failed
    assert "is over the same silos again: alpha, beta, delta, gamma" in cohort.warnings[0]
    torch.testing.assert_close(again, first, rtol=0, atol=1e-7)
    # One of them is away: nobody learns its update, and the run stops.
    with pytest.raises(
        RunError, match="was unmasked before with an update of beta, from which none has come"
    ):
        cohort.open(["alpha", "delta", "gamma", "omega"])
    again, _ = cohort.open()
    torch.testing.assert_close(again, first, rtol=0, atol=1e-7)


def test_a_server_that_has_forgotten_is_refused(tmp_path: Path, secure_config: RunConfig) -> None:
    cohort = Cohort(tmp_path, secure_config)
    cohort.open(["alpha", "beta", "delta", "gamma"])
    (tmp_path / "opened.json").unlink()
    with pytest.raises(PhotonError, match="this update of alpha was in a sum over other silos before"):
        cohort.open()
