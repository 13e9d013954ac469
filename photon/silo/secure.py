"""A silo's part in a secure sum: its keys, its shares, its masks, and what it refuses to tell.

`photon.federation.secure` has the protocol. A silo may be asked by another process every time, so what it
must remember of an attempt lies in its state folder, for its owner alone, until it has helped to unmask the
sum.

Three things a silo never does: mask two updates with the same keys, hand in shares both of a silo's own mask
and of its key, and help to unmask two sums of one round over different silos, whose difference would be
somebody's update.
"""

import base64
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from cryptography.fernet import InvalidToken
from pydantic import BaseModel, ValidationError

from photon.config.schema import RunConfig
from photon.errors import PhotonError
from photon.files.atomic import write_bytes
from photon.flower_compat import (
    bytes_to_private_key,
    bytes_to_public_key,
    create_shares,
    decrypt,
    encrypt,
    generate_key_pairs,
    generate_shared_key,
    private_key_to_bytes,
    public_key_to_bytes,
)
from photon.link.encoding import Packed, PackedGroups, unpack
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
from photon.privacy.masking import Quantizer, add_mask
from photon.silo.site import SiloSite


class _Share(BaseModel):
    """What one silo entrusts to another: its shares of the seed of its own mask, and of its key (base64)."""

    attempt: str
    sender: str
    receiver: str
    seed: str
    key: str


class _Attempt(BaseModel):
    """What a silo remembers of an attempt.

    Attributes
    ----------
    sharing_key, masking_key
        Private keys, PEM.
    seed
        Of its own mask, base64.
    keys
        Everybody's public keys, once they are handed out.
    kept
        Its own shares of its own secrets.
    received
        Sender to share.
    opened
        The survivors of the sum of this round that it has helped to unmask, in this attempt or before.
    done
        Whether it was this attempt; the secrets are then gone.
    """

    attempt: str
    run_id: str
    model_id: str
    round: int
    sharing_key: str = ""
    masking_key: str = ""
    seed: str = ""
    threshold: int = 0
    keys: dict[str, PublicKeys] = {}
    kept: _Share | None = None
    received: dict[str, _Share] = {}
    masked: bool = False
    opened: list[str] | None = None
    done: bool = False


def advertise_keys(request: AdvertiseKeys, site: SiloSite) -> PublicKeys:
    """Begin an attempt with new keys, and forget the one before."""
    path = _path(request.silo, site)
    before = _read(path)
    this_round = (request.run_id, request.model_id, request.round)
    same_round = before is not None and (before.run_id, before.model_id, before.round) == this_round
    sharing, masking = generate_key_pairs(), generate_key_pairs()
    _write(
        path,
        _Attempt(
            attempt=request.attempt,
            run_id=request.run_id,
            model_id=request.model_id,
            round=request.round,
            sharing_key=private_key_to_bytes(sharing[0]).decode(),
            masking_key=private_key_to_bytes(masking[0]).decode(),
            seed=_text(os.urandom(32)),
            opened=before.opened if before and same_round else None,
        ),
    )
    return PublicKeys(
        sharing=public_key_to_bytes(sharing[1]).decode(), masking=public_key_to_bytes(masking[1]).decode()
    )


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
    own = _public(attempt)
    if request.keys.get(request.silo) != own or len({k.masking for k in request.keys.values()}) < len(names):
        raise PhotonError(
            f"secure aggregation: the keys that {request.silo} was given are not those advertised"
        )
    seeds = create_shares(_bytes(attempt.seed), request.threshold, len(names))
    keys = create_shares(attempt.masking_key.encode(), request.threshold, len(names))
    private = bytes_to_private_key(attempt.sharing_key.encode())
    tokens = {}
    for name, seed, key in zip(names, seeds, keys, strict=True):
        share = _Share(
            attempt=request.attempt, sender=request.silo, receiver=name, seed=_text(seed), key=_text(key)
        )
        if name == request.silo:
            attempt.kept = share
            continue
        channel = generate_shared_key(private, bytes_to_public_key(request.keys[name].sharing.encode()))
        tokens[name] = encrypt(channel, share.model_dump_json().encode()).decode()
    attempt.threshold, attempt.keys = request.threshold, dict(request.keys)
    _write(path, attempt)
    return EncryptedShares(shares=tokens)


def mask(
    request: TrainRequest,
    masking: Masking,
    reply: PackedGroups,
    site: SiloSite,
    config: RunConfig,
    masked: Collection[str],
) -> PackedGroups:
    """Return a trained update as masked integers: int32 with the bits of uint32, of the parameters' shapes.

    What the strategy looks at one by one, as WorldLM at key layers, stays as it is.

    With u < v in name order, silo u adds the mask that it shares with v and v subtracts it, so that they
    vanish from the sum; each adds a mask of its own beside them.

    Parameters
    ----------
    masked
        Parameters of the contract that are masked.

    Raises
    ------
    PhotonError
        If the silo has masked before in this attempt, too few shared their keys, or a share is not genuine.
    """
    path, attempt = _current(request.silo, masking.attempt, site)
    if attempt.masked:
        raise PhotonError(f"secure aggregation: {request.silo} has already masked an update with these keys")
    if not set(masking.shares) < set(attempt.keys) or len(masking.shares) + 1 < attempt.threshold:
        raise PhotonError(
            f"secure aggregation: the shares of {len(masking.shares)} others are not enough to unmask the sum"
        )
    private = bytes_to_private_key(attempt.sharing_key.encode())
    for sender, token in masking.shares.items():
        channel = generate_shared_key(private, bytes_to_public_key(attempt.keys[sender].sharing.encode()))
        attempt.received[sender] = _opened(channel, token, sender, request.silo, masking.attempt)
    update = {name: _tensor(packed, name) for name, packed in reply["params"].items() if name in masked}
    total = Quantizer(config.privacy.range, len(attempt.keys)).encode(update)
    # Kept before anything leaves: these keys are used up.
    attempt.masked = True
    _write(path, attempt)
    add_mask(total, _bytes(attempt.seed))
    masking_key = bytes_to_private_key(attempt.masking_key.encode())
    for other in attempt.received:
        shared = generate_shared_key(masking_key, bytes_to_public_key(attempt.keys[other].masking.encode()))
        add_mask(total, base64.urlsafe_b64decode(shared), subtract=other < request.silo)
    integers = {name: Packed(torch.from_numpy(values.view(np.int32))) for name, values in total.items()}
    return {**reply, "params": {**reply["params"], **integers}}


def unmask(request: Unmask, site: SiloSite) -> Shares:
    """Tell what unmasks the sum, once, and forget all secrets of the attempt.

    Raises
    ------
    PhotonError
        If it was told before, if a silo is both a survivor and dropped, or if the sum would be over too few
        silos, or over others than an earlier sum of the same round.
    """
    path, attempt = _current(request.silo, request.attempt, site)
    survivors, dropped = set(request.survivors), set(request.dropped)
    if not attempt.masked or attempt.kept is None or request.silo not in survivors:
        raise PhotonError(f"secure aggregation: {request.silo} has sent nothing that could be unmasked")
    if survivors & dropped or survivors | dropped != {request.silo, *attempt.received}:
        raise PhotonError("secure aggregation: survivors and dropped silos are not those that shared keys")
    if len(survivors) < attempt.threshold:
        raise PhotonError(
            f"secure aggregation: a sum over {len(survivors)} silos is below the threshold of "
            f"{attempt.threshold}"
        )
    if attempt.opened is not None and set(attempt.opened) != survivors:
        raise PhotonError(
            "secure aggregation: a sum of this round was unmasked before, over other silos; the difference "
            f"would be somebody's update. It takes these again: {', '.join(attempt.opened)}"
        )
    shares = {**attempt.received, request.silo: attempt.kept}
    told = Shares(
        masks={name: shares[name].seed for name in request.survivors},
        keys={name: shares[name].key for name in request.dropped},
    )
    _write(
        path,
        _Attempt(
            attempt=attempt.attempt,
            run_id=attempt.run_id,
            model_id=attempt.model_id,
            round=attempt.round,
            opened=sorted(survivors),
            done=True,
        ),
    )
    return told


def _current(silo: str, attempt: str, site: SiloSite) -> tuple[Path, _Attempt]:
    path = _path(silo, site)
    found = _read(path)
    if found is None or found.attempt != attempt:
        raise PhotonError(f"secure aggregation: {silo} knows nothing of this attempt; the server begins anew")
    if found.done:
        raise PhotonError(f"secure aggregation: {silo} has already helped to unmask this sum")
    return path, found


def _opened(channel: bytes, token: str, sender: str, receiver: str, attempt: str) -> _Share:
    try:
        share = _Share.model_validate_json(decrypt(channel, token.encode()))
    except (InvalidToken, ValidationError, ValueError) as error:
        raise PhotonError(f"secure aggregation: what {sender} shared cannot be read") from error
    if (share.sender, share.receiver, share.attempt) != (sender, receiver, attempt):
        raise PhotonError(f"secure aggregation: what {sender} shared is not meant for {receiver}, or not now")
    return share


def _public(attempt: _Attempt) -> PublicKeys:
    sharing, masking = (
        public_key_to_bytes(bytes_to_private_key(key.encode()).public_key()).decode()
        for key in (attempt.sharing_key, attempt.masking_key)
    )
    return PublicKeys(sharing=sharing, masking=masking)


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


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
