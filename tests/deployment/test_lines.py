"""The lines that aggregator and silo send to each other, and what people paste in their place."""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from photon.deployment import keys
from photon.deployment.lines import LONGEST, AggregatorLine, SiloLine, aggregator_line
from photon.errors import PhotonError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines") / "keys"
    keys.make_authority(folder)
    keys.make_server_certificate(folder, ["localhost"])
    keys.make_node_key(folder, "node")
    return folder


@pytest.fixture(scope="module")
def invitation(made: Path) -> AggregatorLine:
    return aggregator_line("aggregator.example.org", 8000, made / "authority.crt")


@pytest.fixture(scope="module")
def application(made: Path) -> SiloLine:
    kind, key, _ = (made / "node.pub").read_text().split()
    return SiloLine(name="hospital", key=f"{kind} {key}")


def forged(kind: str, content: object, version: int = 1) -> str:
    """Write a line as its definition says, with code of its own."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    payload = base64.urlsafe_b64encode(zlib.compress(text)).rstrip(b"=").decode()
    body = f"photon-{kind}-{version}.{payload}"
    return f"{body}.{hashlib.sha256(body.encode()).hexdigest()[:8]}"


def test_a_line_comes_back_as_it_was_and_is_one_word_of_a_shell(
    invitation: AggregatorLine, application: SiloLine, made: Path
) -> None:
    import shlex

    for one in (invitation, application):
        line = one.line()
        assert type(one).read(f"  {line}\n") == one
        assert shlex.quote(line) == line
        assert len(line) < LONGEST / 2
    assert invitation.address == "aggregator.example.org:8000"
    assert AggregatorLine.read(invitation.line()).certificate() == (made / "authority.crt").read_bytes()
    assert application.public_key() == (made / "node.pub").read_bytes().replace(b"node", b"hospital")
    shown = keys.show_key_file(made / "authority.crt")["fingerprint"]
    assert invitation.fingerprint == shown
    assert application.fingerprint == keys.show_key_file(made / "node.pub")["fingerprint"]


def test_a_line_has_no_secret(invitation: AggregatorLine, application: SiloLine, made: Path) -> None:
    for line, fields in ((invitation, {"host", "port", "authority"}), (application, {"name", "key"})):
        payload = line.line().split(".")[1]
        content = json.loads(zlib.decompress(base64.urlsafe_b64decode(payload + "==")))
        assert set(content) == fields
    key = serialization.load_pem_private_key((made / "authority.key").read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    secret = key.private_numbers().private_value.to_bytes(48)
    assert secret not in base64.b64decode(invitation.authority)


def test_an_address_of_version_6_has_brackets(made: Path) -> None:
    assert aggregator_line("::1", 1, made / "authority.crt").address == "[::1]:1"


@pytest.mark.parametrize("cut", [1, 9, 10, 200])
def test_a_line_that_lost_its_end_is_told(invitation: AggregatorLine, cut: int) -> None:
    with pytest.raises(PhotonError, match="damaged or cut off"):
        AggregatorLine.read(invitation.line()[:-cut])


def test_a_letter_that_changed_is_told(application: SiloLine) -> None:
    line = application.line()
    for place in range(0, len(line), 7):
        changed = line[:place] + ("A" if line[place] != "A" else "B") + line[place + 1 :]
        with pytest.raises(PhotonError):
            SiloLine.read(changed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no line of Photon"),
        ("hello", "'hello' is no line of Photon"),
        ("../../etc/passwd", "no line of Photon"),
        ("\x1b[31mred\x07", r"x1b\[31mred.*x07' is no line"),
        ("photon-silo-1", "damaged or cut off"),
        ("photon-silo-1.AAAA.00000000", "damaged or cut off"),
        ("photon-silo-1.\x00.\n.00000000", "damaged or cut off"),
        ("x" * (LONGEST + 1), "4,097 characters"),
        ("photon-silo-1.ü.00000000", "damaged or cut off"),
        ("\ud800", "no line of Photon"),
    ],
)
def test_what_is_no_line_is_told_in_one_printable_line(text: str, said: str) -> None:
    with pytest.raises(PhotonError, match=said) as raised:
        SiloLine.read(text)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300


def test_lines_of_another_kind_or_version(invitation: AggregatorLine, application: SiloLine) -> None:
    with pytest.raises(PhotonError, match=r"another kind, photon-aggregator; .*`photon silo init"):
        SiloLine.read(invitation.line())
    with pytest.raises(PhotonError, match=r"another kind, photon-silo; .*`photon aggregator init"):
        AggregatorLine.read(application.line())
    with pytest.raises(PhotonError, match="version 2, and this Photon reads version 1"):
        SiloLine.read(forged("silo", application.model_dump(), version=2))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../../etc"}, "no name of a silo"),
        ({"name": "a/b"}, "no name of a silo"),
        ({"name": "a b"}, "no name of a silo"),
        ({"name": ".."}, "no name of a silo"),
        ({"name": "--help"}, "no name of a silo"),
        ({"name": "a\n"}, "no name of a silo"),
        ({"name": "a\x1b[2J"}, "no name of a silo"),
        ({"name": "x" * 65}, "at most 64"),
        ({"name": 7}, "name"),
        ({"key": "ssh-rsa AAAA"}, "public key"),
        ({"key": "x" * 1001}, "at most 1000"),
        ({"key": 'command="rm" ecdsa-sha2-nistp384 AAAA'}, "no public key"),
        ({"path": "/etc"}, "path"),
    ],
)
def test_a_silo_cannot_say_what_it_likes(application: SiloLine, change: dict[str, Any], said: str) -> None:
    with pytest.raises(PhotonError, match=said) as raised:
        SiloLine.read(forged("silo", application.model_dump() | change))
    assert str(raised.value).isprintable()


def test_a_key_of_another_kind_is_refused(application: SiloLine) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    text = (
        Ed25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    with pytest.raises(PhotonError, match="not an ECDSA key"):
        SiloLine.read(forged("silo", {"name": "a", "key": text.decode()}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "https://example.org/x"}, "leave out scheme"),
        ({"host": "a b"}, "not a host name"),
        ({"host": "fe80::1%\x1b[2J"}, "not a host name"),
        ({"host": ""}, "not a host name"),
        ({"port": 0}, "port"),
        ({"port": 70000}, "port"),
        ({"port": "8000"}, "port"),
        ({"authority": "AAAA"}, "no certificate of an authority"),
        ({"authority": "%%%"}, "no certificate of an authority"),
    ],
)
def test_an_aggregator_cannot_say_what_it_likes(
    invitation: AggregatorLine, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(PhotonError, match=said) as raised:
        AggregatorLine.read(forged("aggregator", invitation.model_dump() | change))
    assert str(raised.value).isprintable()


def test_the_servers_own_certificate_is_no_authority(invitation: AggregatorLine, made: Path) -> None:
    der = keys.read_certificate(made / "server.crt").public_bytes(serialization.Encoding.DER)
    changed = invitation.model_dump() | {"authority": base64.b64encode(der).decode()}
    with pytest.raises(PhotonError, match="no certificate of an authority"):
        AggregatorLine.read(forged("aggregator", changed))


def test_a_line_that_unpacks_to_much_more_is_no_line() -> None:
    with pytest.raises(PhotonError, match="payload"):
        SiloLine.read(forged("silo", b" " * 1_000_000 + b"{}"))
    with pytest.raises(PhotonError, match="payload"):
        SiloLine.read(forged("silo", b"\xff\xfe"))
