"""Verifiable sharing of a private key: no share can be wrong, at its dealer or its holder, and go unnoticed.

A secret is a private key k of P-384, whose public key K = k·G is known. All arithmetic is modulo the order q
of the curve. The dealer draws f, g of degree t − 1 with f(0) = k, and gives holder i = 1, 2, … its share f(i)
(Shamir 1979). Beside it everybody is told

    commitments C_i = H(f(i), g(i)),   B = g(0)·G,   h = g + c·f   with c = H(K, B, all C_i).

Before c is known the dealer has bound itself to all f(i) and g(i), so h is of degree t − 1 and goes through
g(i) + c·f(i) only if the f(i) lie on one polynomial, but for a chance of 2^-256. In the same way
h(0)·G = B + c·K, which everybody can see, says that its secret is k. Whoever is shown a share checks
H(f(i), h(i) − c·f(i)) = C_i: a holder the dealer's, and later the server the holder's. g hides f in h, so
less than t shares still tell nothing of k.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence

from Crypto.PublicKey import ECC
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from photon.flower_compat import bytes_to_public_key, public_key_to_bytes
from photon.link.messages import Dealing, Expected

#: Number of points of P-384, FIPS 186.
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
_CURVE = ec.SECP384R1()


def context_of(attempt: str, dealer: str, what: str) -> str:
    """Return what a dealing is bound to: the attempt, whose secret it is, and which."""
    return json.dumps([attempt, dealer, what])


def new_secret() -> int:
    """Draw a private key."""
    return 1 + secrets.randbelow(ORDER - 1)


def private_of(secret: int) -> ec.EllipticCurvePrivateKey:
    """Return a private key as the library's object.

    Raises
    ------
    ValueError
        If it is none.
    """
    return ec.derive_private_key(secret, _CURVE)


def public_of(secret: int) -> str:
    """Return the public key of a private one, PEM."""
    return public_key_to_bytes(private_of(secret).public_key()).decode()


def read_public(text: str) -> ec.EllipticCurvePublicKey:
    """Read a public key.

    Raises
    ------
    ValueError
        If it is not one of P-384, or is written in other letters than `public_of` writes it in.
    """
    try:
        key = bytes_to_public_key(text.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError("it is no public key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("it is no public key of P-384")
    if public_key_to_bytes(key).decode() != text:
        raise ValueError("its public key is written in another way")
    return key


def mask_key(secret: int) -> bytes:
    """Return the key of the mask that a secret stands for, 32 bytes."""
    return hashlib.sha256(b"photon mask" + secret.to_bytes(48)).digest()


def deal(secret: int, threshold: int, names: Sequence[str], context: str) -> tuple[dict[str, int], Dealing]:
    """Split a secret among holders.

    Parameters
    ----------
    threshold
        Shares that bring it back.
    names
        The holders, in the order that all know.
    context
        Whose secret it is, which, and when; a dealing of another context does not fit.

    Returns
    -------
    tuple
        The holders' shares, and what all may know.
    """
    secret_side = [secret, *(secrets.randbelow(ORDER) for _ in range(threshold - 1))]
    blind_side = [new_secret(), *(secrets.randbelow(ORDER) for _ in range(threshold - 1))]
    shares = {name: _at(secret_side, i) for i, name in enumerate(names, 1)}
    commitments = {
        name: _commitment(shares[name], _at(blind_side, i), name, context) for i, name in enumerate(names, 1)
    }
    blind = public_of(blind_side[0])
    challenge = _challenge(public_of(secret), blind, commitments, threshold, context)
    proof = [scalar(g + challenge * f) for f, g in zip(secret_side, blind_side, strict=True)]
    return shares, Dealing(commitments=commitments, blind=blind, proof=proof)


def expected(
    dealing: Dealing, public: str, threshold: int, names: Sequence[str], context: str
) -> dict[str, Expected]:
    """Return what each holder's share must agree with; the other parameters are those of `deal`.

    Raises
    ------
    ValueError
        If the dealing is not one of this public key's secret, among these holders.
    """
    if set(dealing.commitments) != set(names) or len(dealing.proof) != threshold:
        raise ValueError("it is not among all, or not for the threshold")
    proof = [int(text, 16) for text in dealing.proof]
    challenge = _challenge(public, dealing.blind, dealing.commitments, threshold, context)
    generator = ECC.construct(curve="P-384", d=1).pointQ
    if generator * (proof[0] % ORDER) != _point(dealing.blind) + _point(public) * challenge:
        raise ValueError("what is shared is not the secret of the public key")
    return {
        name: Expected(
            commitment=dealing.commitments[name], challenge=scalar(challenge), response=scalar(_at(proof, i))
        )
        for i, name in enumerate(names, 1)
    }


def fits(share: int, expected: Expected, name: str, context: str) -> bool:
    """Return whether a share is the one that its dealer has bound itself to."""
    blind = (int(expected.response, 16) - int(expected.challenge, 16) * share) % ORDER
    return 0 <= share < ORDER and _commitment(share, blind, name, context) == expected.commitment


def combine(shares: Mapping[int, int]) -> int:
    """Return the secret of as many shares as the threshold: holder, from 1 on, to share."""
    total = 0
    for i, share in shares.items():
        above = below = 1
        for j in shares:
            if j != i:
                above, below = above * j % ORDER, below * (j - i) % ORDER
        total += share * above * pow(below, -1, ORDER)
    return total % ORDER


def scalar(value: int) -> str:
    """Return a number modulo the order as it is written in messages."""
    return f"{value % ORDER:096x}"


def _at(coefficients: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % ORDER
    return value


def _commitment(share: int, blind: int, name: str, context: str) -> str:
    return hashlib.sha256(json.dumps([context, name, scalar(share), scalar(blind)]).encode()).hexdigest()


def _challenge(public: str, blind: str, commitments: Mapping[str, str], threshold: int, context: str) -> int:
    told = json.dumps([context, threshold, public, blind, sorted(commitments.items())])
    return int.from_bytes(hashlib.sha256(told.encode()).digest())


def _point(public: str) -> ECC.EccPoint:
    numbers = read_public(public).public_numbers()
    return ECC.EccPoint(numbers.x, numbers.y, "P-384")
