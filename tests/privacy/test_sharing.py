"""Shares of a private key: any t bring it back, and none that is not what was dealt passes."""

import itertools
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from photon.link.messages import Dealing
from photon.privacy import sharing
from photon.privacy.sharing import ORDER, combine, deal, expected, fits, new_secret, public_of, scalar

NAMES = ["a", "b", "c", "d", "e"]


def test_any_t_shares_bring_the_secret_back_and_fewer_do_not() -> None:
    secret = new_secret()
    shares, _ = deal(secret, 3, NAMES, "context")
    numbered = {i: shares[name] for i, name in enumerate(NAMES, 1)}
    for chosen in itertools.combinations(numbered, 3):
        assert combine({i: numbered[i] for i in chosen}) == secret
    for chosen in itertools.combinations(numbered, 2):
        assert combine({i: numbered[i] for i in chosen}) != secret
    # 5 + 7 x at x = 2 and 3, by hand.
    assert combine({2: 19, 3: 26}) == 5


def test_the_order_is_that_of_the_curve() -> None:
    ec.derive_private_key(ORDER - 1, ec.SECP384R1())
    with pytest.raises(ValueError, match="key"):
        ec.derive_private_key(ORDER, ec.SECP384R1())


def test_a_share_fits_its_own_dealing_holder_and_context_alone() -> None:
    secret = new_secret()
    shares, dealing = deal(secret, 3, NAMES, "context")
    agreed = expected(dealing, public_of(secret), 3, NAMES, "context")
    assert all(fits(shares[name], agreed[name], name, "context") for name in NAMES)
    assert not fits(shares["a"], agreed["b"], "b", "context")
    assert not fits(shares["a"] ^ 1, agreed["a"], "a", "context")
    assert not fits(shares["a"] + ORDER, agreed["a"], "a", "context")
    assert not fits(shares["a"], agreed["a"], "a", "another")
    with pytest.raises(ValueError, match="not the secret of the public key"):
        expected(dealing, public_of(secret), 3, NAMES, "another")
    with pytest.raises(ValueError, match="not the secret of the public key"):
        expected(dealing, public_of(new_secret()), 3, NAMES, "context")
    for threshold, names in ((2, NAMES), (3, NAMES[:-1]), (3, [*NAMES, "f"])):
        with pytest.raises(ValueError, match="not among all, or not for the threshold"):
            expected(dealing, public_of(secret), threshold, names, "context")


def cheat(bend: Callable[[int, int], int]) -> tuple[int, dict[str, int], Dealing]:
    """Deal with shares that are bent, holder by holder, before the dealer is bound to them."""
    secret = new_secret()
    f, g = ([new_secret() for _ in range(3)] for _ in range(2))
    f[0] = secret
    shares = {name: bend(i, sharing._at(f, i)) % ORDER for i, name in enumerate(NAMES, 1)}
    commitments = {
        name: sharing._commitment(shares[name], sharing._at(g, i), name, "context")
        for i, name in enumerate(NAMES, 1)
    }
    blind = public_of(g[0])
    challenge = sharing._challenge(public_of(secret), blind, commitments, 3, "context")
    proof = [scalar(b + challenge * a) for a, b in zip(f, g, strict=True)]
    return secret, shares, Dealing(commitments=commitments, blind=blind, proof=proof)


@pytest.mark.parametrize(
    ("bend", "good"),
    [
        (lambda i, share: share, "abcde"),
        (lambda i, share: share + (i == 2), "acde"),
        (lambda i, share: share + i**3, ""),
        # Of one polynomial, and of another secret.
        (lambda i, share: share + 1, ""),
    ],
)
def test_a_dealer_cannot_commit_to_shares_of_no_polynomial(
    bend: Callable[[int, int], int], good: str
) -> None:
    secret, shares, dealing = cheat(bend)
    agreed = expected(dealing, public_of(secret), 3, NAMES, "context")
    assert [name for name in NAMES if fits(shares[name], agreed[name], name, "context")] == list(good)
