"""Secure aggregation: the server learns the sum of the cohort's updates, and of no single one.

The protocol is the pairwise masking of Bonawitz et al. (2017), against a server that is curious but keeps to
it, and with shares that can be checked, against a silo that does not:

1. Everybody sends three new public keys, and gets those of all (`agree`).
2. Everybody splits two secrets, the seed of its own mask and the private key of its shared masks, so that any
   t shares bring one back, sends each of the others its shares, which only that one can read, and tells all
   what they can be checked against (`agree`; `photon.privacy.sharing`).
3. Everybody is handed the shares that are for it, and complains of those that are not as they should be. Who
   is accused is left out (`agree`).
4. Everybody trains, and sends its update as integers x with masks on it:
   y_u = x_u + M(b_u) + Σ_{v>u} M(s_uv) − Σ_{v<u} M(s_uv)  modulo 2^32 (`add`).
5. Of those whose y_u has arrived the others hand in shares of b_u, of those who dropped out meanwhile shares
   of their key: so what does not vanish from Σ y_u can be taken off (`opened`). A share that is not what its
   dealer has bound itself to is not used.

`photon.silo.secure` is the other side.
"""

import base64
import json
import math
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from photon.config.schema import PrivacySection
from photon.errors import PhotonError, RunError
from photon.federation.exchange import Failure
from photon.federation.failures import UndoneError
from photon.files.atomic import write_text
from photon.flower_compat import bytes_to_public_key, generate_shared_key
from photon.link.messages import (
    AdvertiseKeys,
    Body,
    CheckShares,
    Complaints,
    EncryptedShares,
    Expected,
    HandedShare,
    Masking,
    PublicKeys,
    ShareKeys,
    Shares,
    TrainReport,
    TrainRequest,
    Unmask,
)
from photon.privacy.masking import FixedPoint, Integers, Quantizer, add, add_mask, as_integers
from photon.privacy.sharing import (
    combine,
    context_of,
    expected,
    fits,
    mask_key,
    private_of,
    public_of,
    read_public,
)
from photon.strategy.contract import Contract

Kind = TypeVar("Kind", bound=Body)
#: Sends each silo a body, and returns the answers of those who gave one.
Ask = Callable[[Mapping[str, Body], type[Body]], Mapping[str, Body | Failure]]


class OpenedSums:
    """Which silos the sums of the last rounds were over: a round that is repeated is over the same ones.

    Parameters
    ----------
    path
        File in the run's folder, which outlives a checkpoint that is damaged.
    keep
        Rounds that are remembered.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._path = path
        self._keep = keep

    def of(self, request: TrainRequest) -> list[str] | None:
        """Return the silos of the sum of a request's round; None: it was not unmasked."""
        return self._read().get(f"{request.run_id}/{request.round}")

    def add(self, request: TrainRequest, silos: Collection[str]) -> None:
        """Remember a sum that is about to be unmasked."""
        key = f"{request.run_id}/{request.round}"
        others = [(name, told) for name, told in self._read().items() if name != key]
        write_text(self._path, json.dumps(dict([*others, (key, sorted(silos))][-self._keep :])))

    def _read(self) -> dict[str, list[str]]:
        try:
            return dict(json.loads(self._path.read_text()))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise PhotonError(f"{self._path}: cannot be read ({error}); remove the file") from error


class SecureSum:
    """One attempt at a round's sum. Of it the next one has the names of the silos that it was over, no keys.

    Parameters
    ----------
    privacy
        Threshold, range, and what updates are bounded by.
    requests
        The round's train requests by silo.
    contract
        What is masked of their replies.
    ask
        How to reach the silos.
    on_failure
        Called with a silo that takes no further part, and why.
    warn
        Called with what a user should know of.
    opened
        What earlier attempts were over; None: nothing is remembered.
    federations
        Participants whose updates ``privacy.clip_norm`` does not bound.

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
        contract: Contract,
        ask: Ask,
        on_failure: Callable[[str, Failure], None],
        warn: Callable[[str], None],
        opened: OpenedSums | None = None,
        federations: Collection[str] = (),
    ) -> None:
        self._attempt = uuid.uuid4().hex
        self._memory = opened
        self._first = next(iter(requests.values()))
        self._round = self._first.round
        self._before = opened.of(self._first) if opened else None
        if self._before and set(self._before) < set(requests):
            warn(
                f"round {self._round}: its sum was unmasked before, and is over the same silos again: "
                f"{', '.join(self._before)}"
            )
            requests = {name: requests[name] for name in requests if name in self._before}
        self._requests = requests
        self._ask = ask
        self._on_failure = on_failure
        self._warn = warn
        self._privacy = privacy
        self._federations = frozenset(federations)
        self._keys: dict[str, PublicKeys] = {}
        #: Owner to holder to what its shares of the owner's two secrets must agree with.
        self._expected: dict[str, dict[str, dict[str, Expected]]] = {}
        #: Those who mask, and those whose masked update has arrived.
        self._masking: list[str] = []
        self._survivors: list[str] = []
        self._total: Integers = {}
        self._threshold = len(requests) if contract.needs_all else threshold_of(privacy, len(requests))
        self._contract = contract
        contract.quantizer(privacy, len(requests))

    def agree(self) -> dict[str, TrainRequest]:
        """Let the cohort agree on keys, and return the requests of those who have, with what they need."""
        advertised = self._all_answers(
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
            lambda _, keys: _problem_with_keys(keys),
        )
        self._keys = self._without({**advertised}, _twice(advertised))
        dealt = self._all_answers(
            {
                name: ShareKeys(attempt=self._attempt, silo=name, threshold=self._threshold, keys=self._keys)
                for name in self._keys
            },
            EncryptedShares,
            self._problem_with_shares,
        )
        complaints = self._all_answers(
            {name: self._handed(name, dealt) for name in dealt},
            Complaints,
            lambda name, told: (
                None
                if set(told.senders) <= set(dealt) - {name}
                else "it complains of silos that sent nothing"
            ),
        )
        accused = _left_out({name: set(told.senders) & set(complaints) for name, told in complaints.items()})
        self._masking = sorted(self._without({**complaints}, accused))
        masking = Masking(attempt=self._attempt, silos=self._masking)
        return {name: self._requests[name].model_copy(update={"masking": masking}) for name in self._masking}

    def add(self, name: str, masked: Mapping[str, torch.Tensor]) -> None:
        """Add what a silo has masked to the sum."""
        integers = {key: as_integers(tensor) for key, tensor in masked.items()}
        if self._total:
            add(self._total, integers)
        else:
            self._total = {key: values.copy() for key, values in integers.items()}
        self._survivors.append(name)

    @property
    def opens_sums(self) -> bool:
        """Whether what is unmasked are sums in float64; else it is the mean of updates."""
        return self._contract.masks_sums

    def opened(self) -> dict[str, torch.Tensor]:
        """Unmask the sum; return the mean of the survivors' updates, float32, or their sums, float64.

        Raises
        ------
        RunError
            If fewer silos than the threshold have sent an update, or help to unmask the sum; if an earlier
            sum of the round was over more silos; or if the sum is none of integers of this many silos.
        """
        survivors = sorted(self._survivors)
        dropped = [name for name in self._masking if name not in survivors]
        self._enough(len(survivors), "sent a masked update")
        if self._before == self._masking and dropped:
            raise RunError(
                f"secure aggregation: a sum of round {self._round} was unmasked before with an update of "
                f"{', '.join(dropped)}, from which none has come now; resume the run when they are back"
            )
        if self._memory is not None:
            self._memory.add(self._first, survivors)
        answers = self._ask(
            {
                name: Unmask(attempt=self._attempt, silo=name, survivors=survivors, dropped=dropped)
                for name in survivors
            },
            Shares,
        )
        told = {name: answer for name, answer in answers.items() if isinstance(answer, Shares)}
        failed = {name: answer.reason for name, answer in answers.items() if isinstance(answer, Failure)}
        good = {
            name: self._good_shares(
                name, "own", {holder: one.masks.get(name) for holder, one in told.items()}, failed
            )
            for name in survivors
        } | {
            name: self._good_shares(
                name, "masking", {holder: one.keys.get(name) for holder, one in told.items()}, failed
            )
            for name in dropped
        }
        self._enough(min(map(len, good.values())), "helped to unmask the sum", _reasons(failed))
        if failed:
            self._warn(f"round {self._round}: the sum was unmasked without the help of {_reasons(failed)}")
        for name in survivors:
            secret = self._secret(good[name], self._keys[name].own)
            add_mask(self._total, mask_key(secret), subtract=True)
        for name in dropped:
            self._take_off(name, self._secret(good[name], self._keys[name].masking), survivors)
        quantizer = self._quantizer()
        try:
            quantizer.check_sum(self._total, len(survivors))
        except RunError as error:
            raise UndoneError(str(error)) from error
        return quantizer.decode(self._total, len(survivors))

    def _quantizer(self) -> Quantizer | FixedPoint:
        # The range of integers is that which the silos took it from: all that were handed each other's keys.
        return self._contract.quantizer(self._privacy, len(self._keys))

    def check_norm(self, mean: Mapping[str, torch.Tensor], reports: Mapping[str, TrainReport]) -> None:
        """Check that a mean is no longer than updates as they were reported, and are bounded, can make it.

        A norm is at most the mean of the norms. With ``privacy.clip_norm`` = C and noise of σ_k = z_k C_k at
        silo k the mean of n updates has a norm of at most C + (√d + 8) √(Σ σ_k²) / n, but for a chance of
        10^-14 (d coordinates). Of a federation, which nothing bounds, what it reports takes the place of C.

        Parameters
        ----------
        reports
            Of those whose updates are in it.

        Raises
        ------
        UndoneError
            If it is longer. Nobody can tell whose fault that is.
        """
        count, dimension = len(reports), sum(tensor.numel() for tensor in mean.values())
        norm = math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in mean.values()))
        clip_norm = self._privacy.clip_norm
        reported, bound, noise = 0.0, 0.0, []
        for name, report in reports.items():
            reported += (report.update_norm or 0.0) / count
            if clip_norm is None or name in self._federations:
                bound += (report.update_norm or 0.0) / count
                continue
            bound += clip_norm / count
            # A silo's own rule may ask for more noise than the run does.
            own = report.privacy.noise_multiplier * report.privacy.clip_norm if report.privacy else 0.0
            noise.append(max(self._privacy.noise_multiplier * clip_norm, own))
        bound += (math.sqrt(dimension) + 8) * math.hypot(*noise) / count
        # Half a step for each coordinate; and reported norms are of single precision.
        quantizer = self._quantizer()
        assert isinstance(quantizer, Quantizer), "sums have no norm that anybody has told"
        slack = quantizer.step / 2 * math.sqrt(dimension)
        for most, told in (
            (reported, f"they are reported to have one of {reported:.3g} on average"),
            (bound, f"privacy.clip_norm and noise leave them one of {bound:.3g}"),
        ):
            if not norm <= most * 1.001 + slack:
                raise UndoneError(
                    f"the mean of {count} masked updates has a norm of {norm:.3g}, and "
                    f"{told}: one is not what it should be, and masks hide which"
                )

    def _good_shares(
        self, owner: str, what: str, shares: Mapping[str, str | None], failed: dict[str, str]
    ) -> dict[int, int]:
        """Return the shares of an owner's secret that are what was dealt, by the number of their holder.

        Parameters
        ----------
        shares
            Holder to its share as it was handed in.
        failed
            To which a holder is added whose share is missing or another.
        """
        context = context_of(self._attempt, owner, what)
        number = {name: i for i, name in enumerate(sorted(self._keys), 1)}
        good: dict[int, int] = {}
        for holder, text in shares.items():
            if text is not None and fits(int(text, 16), self._expected[owner][what][holder], holder, context):
                good[number[holder]] = int(text, 16)
            else:
                failed[holder] = f"what it handed in is not what {owner} has dealt"
        return good

    def _secret(self, shares: Mapping[int, int], public: str) -> int:
        """Bring back the secret of a public key."""
        secret = combine(dict(list(shares.items())[: self._threshold]))
        if public_of(secret) != public:
            raise AssertionError("shares that fit their dealing make another secret")
        return secret

    def _take_off(self, name: str, secret: int, survivors: list[str]) -> None:
        """Take off the masks that survivors share with a silo that has dropped out."""
        key = private_of(secret)
        for other in survivors:
            shared = generate_shared_key(key, bytes_to_public_key(self._keys[other].masking.encode()))
            add_mask(self._total, base64.urlsafe_b64decode(shared), subtract=other < name)

    def _problem_with_shares(self, name: str, answer: EncryptedShares) -> str | None:
        """Check what all may know of a silo's shares, and keep it."""
        names = sorted(self._keys)
        if set(answer.shares) != set(names) - {name}:
            return "its shares are not for all others"
        try:
            self._expected[name] = {
                what: expected(dealing, public, self._threshold, names, context_of(self._attempt, name, what))
                for what, dealing, public in (
                    ("own", answer.own, self._keys[name].own),
                    ("masking", answer.masking, self._keys[name].masking),
                )
            }
        except ValueError as error:
            return f"its shares are wrong: {error}"
        return None

    def _handed(self, name: str, dealt: Mapping[str, EncryptedShares]) -> CheckShares:
        """Return what the others have for a silo."""
        shares = {
            sender: HandedShare(
                token=answer.shares[name],
                own=self._expected[sender]["own"][name],
                masking=self._expected[sender]["masking"][name],
            )
            for sender, answer in dealt.items()
            if sender != name
        }
        return CheckShares(attempt=self._attempt, silo=name, shares=shares)

    def _all_answers(
        self, bodies: Mapping[str, Body], kind: type[Kind], problem_with: Callable[[str, Kind], str | None]
    ) -> dict[str, Kind]:
        """Ask all, and return the answers that are as they should be."""
        answers: dict[str, Kind] = {}
        reasons = {}
        for name, answer in self._ask(bodies, kind).items():
            if isinstance(answer, Failure):
                failure = answer
            else:
                assert isinstance(answer, kind)
                problem = problem_with(name, answer)
                if problem is None:
                    answers[name] = answer
                    continue
                failure = Failure("rejected", f"secure aggregation: {problem}")
            self._on_failure(name, failure)
            reasons[name] = failure.reason
        self._enough(len(answers), "took part in agreeing on keys", _reasons(reasons))
        return answers

    def _without(self, answers: dict[str, Kind], left_out: Mapping[str, str]) -> dict[str, Kind]:
        """Return the answers but those of silos that are left out, each for a reason."""
        for name, reason in left_out.items():
            self._on_failure(name, Failure("rejected", f"secure aggregation: {reason}"))
            del answers[name]
        self._enough(len(answers), "took part in agreeing on keys", _reasons(left_out))
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


def _problem_with_keys(keys: PublicKeys) -> str | None:
    for what, text in keys:
        try:
            read_public(text)
        except ValueError as error:
            return f"its {what} key: {error}"
    return None


def _twice(keys: Mapping[str, PublicKeys]) -> dict[str, str]:
    """Return the silos that have a key in common, or have one twice.

    Nobody knows another's keys before it has sent its own, so an honest silo is none of them.
    """
    owners: dict[str, list[str]] = {}
    for name, own in keys.items():
        for _, text in own:
            owners.setdefault(text, []).append(name)
    return {
        name: f"a public key came more than once, from {', '.join(sorted(set(names)))}"
        for names in owners.values()
        if len(names) > 1
        for name in names
    }


def _left_out(complaints: Mapping[str, set[str]]) -> dict[str, str]:
    """Return who is left out, so that no complaint remains between two that are not, and why.

    A complaint does not tell which of the two lies. Who has most of them, made or received, goes first: a
    liar has one with each whom it accuses, or who accuses it, and an honest silo has one with a liar alone.
    Of two with as many the accused goes.

    Parameters
    ----------
    complaints
        Silo to those that it accuses.
    """
    pairs = {(accuser, accused) for accuser, named in complaints.items() for accused in named}
    gone: dict[str, str] = {}
    while pairs:
        of = {name: [pair for pair in pairs if name in pair] for pair in pairs for name in pair}
        accused = {name: sum(pair[1] == name for pair in pairs) for name in of}
        worst = max(sorted(of), key=lambda name: (len(of[name]), accused[name]))
        others = sorted({name for pair in of[worst] for name in pair} - {worst})
        gone[worst] = (
            f"its shares cannot be used by {', '.join(others)}"
            if accused[worst]
            else f"it complains of the shares of {', '.join(others)}"
        )
        pairs -= set(of[worst])
    return gone


def _reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
