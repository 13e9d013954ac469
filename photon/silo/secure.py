"""A silo's part in a secure sum: its keys, its shares, its masks, and what it refuses to tell.

`photon.federation.secure` has the protocol. A silo may be asked by another process every time, so what it
must remember of an attempt lies in its state folder, for its owner alone, until it has helped to unmask the
sum.

Three things a silo never does: mask two updates with the same keys, hand in shares both of a silo's own mask
and of its key, and help to unmask two sums with one update in them over different silos, whose difference
would be somebody's update (`photon.silo.opened`).
"""

import base64
from collections.abc import Mapping
from pathlib import Path

import torch
from cryptography.fernet import InvalidToken
from pydantic import BaseModel, ValidationError

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.files.atomic import write_bytes
from photon.flower_compat import decrypt, encrypt, generate_shared_key
from photon.link.encoding import Packed, PackedGroups, unpack
from photon.link.messages import (
    AdvertiseKeys,
    CheckShares,
    Complaints,
    EncryptedShares,
    HandedShare,
    PublicKeys,
    Scalar,
    ShareKeys,
    Shares,
    TrainRequest,
    Unmask,
)
from photon.privacy.masking import add_mask, as_sent
from photon.privacy.sharing import (
    context_of,
    deal,
    fits,
    mask_key,
    new_secret,
    private_of,
    public_of,
    read_public,
    scalar,
)
from photon.silo.kept import reply_file
from photon.silo.opened import Opened, round_key, silos_key, update_key
from photon.silo.site import SiloSite
from photon.strategy.contract import Contract


class _Share(BaseModel):
    """What one silo entrusts to another: its shares of the secrets of its own mask and of its masking key."""

    attempt: str
    sender: str
    receiver: str
    own: Scalar
    masking: Scalar


class _Attempt(BaseModel):
    """What a silo remembers of an attempt.

    Attributes
    ----------
    sharing, masking, own
        Its private keys.
    keys
        Everybody's public keys, once they are handed out.
    shares
        Sender to share, of those that are as they should be, and its own.
    silos
        Those that mask, once it has masked its update.
    updates
        What tells that update, in hexadecimal: all of it, and each tensor of sums.
    done
        Whether it has helped to unmask the sum; the secrets are then gone.
    """

    attempt: str
    run_id: str = ""
    round: int = 0
    sharing: str = ""
    masking: str = ""
    own: str = ""
    threshold: int = 0
    keys: dict[str, PublicKeys] = {}
    shares: dict[str, _Share] = {}
    checked: bool = False
    silos: list[str] = []
    updates: list[str] = []
    done: bool = False


def advertise_keys(request: AdvertiseKeys, site: SiloSite) -> PublicKeys:
    """Begin an attempt with new keys, and forget the one before."""
    attempt = _Attempt(
        attempt=request.attempt,
        run_id=request.run_id,
        round=request.round,
        sharing=scalar(new_secret()),
        masking=scalar(new_secret()),
        own=scalar(new_secret()),
    )
    _write(_path(request.silo, site), attempt)
    return _public(attempt)


def share_keys(request: ShareKeys, site: SiloSite) -> EncryptedShares:
    """Share the silo's secrets among all, so that any ``threshold`` of them can bring one back.

    Raises
    ------
    PhotonError
        If the threshold is no majority, the silo's own keys are not among those handed out, or it has shared
        its secrets before.
    """
    path, attempt = _current(request.silo, request.attempt, site)
    names = sorted(request.keys)
    if attempt.keys:
        raise PhotonError(f"secure aggregation: {request.silo} has already shared its keys in this attempt")
    if not len(names) < 2 * request.threshold <= 2 * len(names):
        raise PhotonError(
            f"secure aggregation: a threshold of {request.threshold} of {len(names)} silos is not a "
            "majority; set privacy.threshold"
        )
    apart = {key for keys in request.keys.values() for key in (keys.sharing, keys.masking, keys.own)}
    if request.keys.get(request.silo) != _public(attempt) or len(apart) < 3 * len(names):
        raise PhotonError(
            f"secure aggregation: the keys that {request.silo} was given are not those advertised"
        )
    own, of_own = deal(
        int(attempt.own, 16), request.threshold, names, context_of(request.attempt, request.silo, "own")
    )
    masking, of_masking = deal(
        int(attempt.masking, 16),
        request.threshold,
        names,
        context_of(request.attempt, request.silo, "masking"),
    )
    tokens = {}
    for name in names:
        share = _Share(
            attempt=request.attempt,
            sender=request.silo,
            receiver=name,
            own=scalar(own[name]),
            masking=scalar(masking[name]),
        )
        if name == request.silo:
            attempt.shares = {name: share}
            continue
        channel = _channel(attempt.sharing, request.keys[name].sharing, name)
        tokens[name] = encrypt(channel, share.model_dump_json().encode()).decode()
    attempt.threshold, attempt.keys = request.threshold, dict(request.keys)
    _write(path, attempt)
    return EncryptedShares(shares=tokens, own=of_own, masking=of_masking)


def check_shares(request: CheckShares, site: SiloSite) -> Complaints:
    """Keep the shares that others have for this silo, and tell whose are not what they should be.

    Raises
    ------
    PhotonError
        If the silo has not shared its own, has been asked before, or a sender is unknown.
    """
    path, attempt = _current(request.silo, request.attempt, site)
    if not attempt.keys or attempt.checked:
        raise PhotonError(f"secure aggregation: it is not the time to hand {request.silo} shares")
    if not set(request.shares) <= set(attempt.keys) - {request.silo}:
        raise PhotonError(f"secure aggregation: {request.silo} was handed shares of silos without keys")
    complaints = []
    for sender, handed in request.shares.items():
        channel = _channel(attempt.sharing, attempt.keys[sender].sharing, sender)
        share = _opened(channel, handed, sender, request.silo, request.attempt)
        if share is None:
            complaints.append(sender)
        else:
            attempt.shares[sender] = share
    attempt.checked = True
    _write(path, attempt)
    return Complaints(senders=complaints)


def prepare(request: TrainRequest, site: SiloSite, config: RunConfig, *, is_federation: bool) -> None:
    """See to it that what is trained, or was, may be in the sum that a request is for.

    A round that was in a sum over other silos is trained anew where that comes with fresh noise: the reply
    that is kept is given up.

    Raises
    ------
    PhotonError
        If it would come out as it was.
    """
    if request.masking is None:
        return
    before = Opened(site.state / request.silo).last(round_key(request.run_id, request.round))
    if before is None or before == silos_key(request.masking.silos):
        return
    if is_federation or not _has_fresh_noise(site):
        raise _over_others(request.silo)
    reply_file(request, site, config).unlink(missing_ok=True)


def mask(
    request: TrainRequest,
    reply: PackedGroups,
    site: SiloSite,
    config: RunConfig,
    contract: Contract,
) -> PackedGroups:
    """Return a trained update, or sums, as masked integers of the tensors' shapes.

    Those of an update are int32 with the bits of uint32, those of sums int64 with the bits of uint64. What
    the strategy looks at one by one, as WorldLM at key layers, stays as it is.

    With u < v in name order, silo u adds the mask that it shares with v and v subtracts it, so that they
    vanish from the sum; each adds a mask of its own beside them.

    Parameters
    ----------
    contract
        Says what is masked.

    Raises
    ------
    PhotonError
        If the request brings no masking, the silo has masked before in this attempt, too few mask, it lacks
        a share of one of them, what it has was in a sum over others, or a value is beyond its range.
    """
    masking, silo = request.masking, request.silo
    assert masking is not None, "the configuration asks for it"
    path, attempt = _current(silo, masking.attempt, site)
    silos = set(masking.silos)
    if attempt.silos:
        raise PhotonError(f"secure aggregation: {silo} has already masked an update with these keys")
    if (request.run_id, request.round) != (attempt.run_id, attempt.round):
        raise PhotonError("secure aggregation: the keys of this attempt were made for another round")
    if silo not in silos or not silos <= set(attempt.shares) or len(silos) < max(2, attempt.threshold):
        raise PhotonError(
            f"secure aggregation: the shares of {len(silos & set(attempt.shares))} of {len(silos)} silos are "
            "not enough to unmask the sum"
        )
    if contract.needs_all and (len(silos) < len(attempt.keys) or attempt.threshold < len(silos)):
        raise PhotonError(
            f"secure aggregation: the sum is of all {len(attempt.keys)} silos or none, and "
            f"{attempt.threshold} of {len(silos)} could unmask it"
        )
    update = {name: _tensor(packed, name) for name, packed in contract.masked_of(reply).items()}
    keys = [update_key(update), *(_keys_of_sums(update) if contract.masks_sums else [])]
    opened = Opened(site.state / silo)
    if any(opened.last(key) not in (None, silos_key(silos)) for key in keys):
        raise _over_others(silo)
    total = contract.quantizer(config.privacy, len(attempt.keys)).encode(update)
    # Kept before anything leaves: these keys are used up.
    attempt.silos, attempt.updates = sorted(silos), [key.hex() for key in keys]
    _write(path, attempt)
    add_mask(total, mask_key(int(attempt.own, 16)))
    for other in attempt.silos:
        if other != silo:
            shared = _channel(attempt.masking, attempt.keys[other].masking, other)
            add_mask(total, base64.urlsafe_b64decode(shared), subtract=other < silo)
    return contract.with_masked(reply, {name: Packed(as_sent(values)) for name, values in total.items()})


def unmask(request: Unmask, site: SiloSite) -> Shares:
    """Tell what unmasks the sum, once, and forget all secrets of the attempt.

    Raises
    ------
    PhotonError
        If it was told before, if a silo is both a survivor and dropped, or if the sum would be over too few
        silos, or over others than an earlier sum that the same update is in.
    """
    path, attempt = _current(request.silo, request.attempt, site)
    survivors, dropped = set(request.survivors), set(request.dropped)
    if not attempt.silos or request.silo not in survivors:
        raise PhotonError(f"secure aggregation: {request.silo} has sent nothing that could be unmasked")
    if survivors & dropped or survivors | dropped != set(attempt.silos):
        raise PhotonError("secure aggregation: survivors and dropped silos are not those that shared keys")
    if len(survivors) < attempt.threshold:
        raise PhotonError(
            f"secure aggregation: a sum over {len(survivors)} silos is below the threshold of "
            f"{attempt.threshold}"
        )
    opened = Opened(site.state / request.silo)
    updates, of_round = list(map(bytes.fromhex, attempt.updates)), round_key(attempt.run_id, attempt.round)
    binding = updates if _has_fresh_noise(site) else [*updates, of_round]
    if any(opened.last(key) not in (None, silos_key(survivors)) for key in binding):
        raise _over_others(request.silo)
    # Remembered before anything is told.
    opened.add([*updates, of_round], survivors)
    told = Shares(
        masks={name: attempt.shares[name].own for name in request.survivors},
        keys={name: attempt.shares[name].masking for name in request.dropped},
    )
    _write(path, _Attempt(attempt=attempt.attempt, done=True))
    return told


def _keys_of_sums(sums: Mapping[str, torch.Tensor]) -> list[bytes]:
    """Return what tells each tensor of sums.

    Of two requests on one text some may be equal and others not, and the difference of two sums tells of one
    tensor as well as of all. Numbers by themselves, and zeros, are equal by chance, and tell nothing that is
    not counted.
    """
    return [update_key({name: sums[name]}) for name in sorted(sums) if sums[name].ndim and sums[name].any()]


def _has_fresh_noise(site: SiloSite) -> bool:
    """Tell whether what is trained again leaves with noise that was never used."""
    return site.privacy.noise_multiplier > 0 and site.privacy.seed is None


def _over_others(silo: str) -> PhotonError:
    return PhotonError(
        f"secure aggregation: this update of {silo} was in a sum over other silos before, and the difference "
        "would be somebody's update; resume the run with all silos of that sum (docs/privacy.md)"
    )


def _current(silo: str, attempt: str, site: SiloSite) -> tuple[Path, _Attempt]:
    path = _path(silo, site)
    found = _read(path)
    if found is None or found.attempt != attempt:
        raise PhotonError(f"secure aggregation: {silo} knows nothing of this attempt; the server begins anew")
    if found.done:
        raise PhotonError(f"secure aggregation: {silo} has already helped to unmask this sum")
    return path, found


def _channel(private: str, public: str, other: str) -> bytes:
    """Return the key that a silo has in common with another."""
    try:
        return generate_shared_key(private_of(int(private, 16)), read_public(public))
    except ValueError as error:
        raise PhotonError(f"secure aggregation: the key of {other}: {error}") from error


def _opened(channel: bytes, handed: HandedShare, sender: str, receiver: str, attempt: str) -> _Share | None:
    """Return what a sender has for this silo; None: it is not what it should be."""
    try:
        share = _Share.model_validate_json(decrypt(channel, handed.token.encode()))
    except (InvalidToken, ValidationError, ValueError):
        return None
    # The channel between two is the same in both directions, so the letter says whose it is.
    meant = (share.sender, share.receiver, share.attempt) == (sender, receiver, attempt)
    agrees = all(
        fits(int(value, 16), expected, receiver, context_of(attempt, sender, what))
        for what, value, expected in (
            ("own", share.own, handed.own),
            ("masking", share.masking, handed.masking),
        )
    )
    return share if meant and agrees else None


def _public(attempt: _Attempt) -> PublicKeys:
    sharing, masking, own = (
        public_of(int(secret, 16)) for secret in (attempt.sharing, attempt.masking, attempt.own)
    )
    return PublicKeys(sharing=sharing, masking=masking, own=own)


def _tensor(packed: Packed, name: str) -> torch.Tensor:
    tensor = unpack(packed, name)
    assert isinstance(tensor, torch.Tensor), "the configuration refuses codecs"
    return tensor


def _path(silo: str, site: SiloSite) -> Path:
    return site.state / silo / "secure.json"


def _read(path: Path) -> _Attempt | None:
    try:
        return _Attempt.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise PhotonError(f"{path}: cannot be read ({type(error).__name__}); remove the file") from error


def _write(path: Path, attempt: _Attempt) -> None:
    write_bytes(path, attempt.model_dump_json().encode(), mode=0o600)
