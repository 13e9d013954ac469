"""Keys and certificates, checked by others: a certificate verifier, a TLS handshake, Flower's own readers."""

import datetime
import ipaddress
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from photon.deployment import keys
from photon.errors import PhotonError

HOSTS = ["aggregator.example.org", "localhost", "127.0.0.1", "::1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An authority and a certificate for ``HOSTS``."""
    made = tmp_path / "keys"
    keys.make_authority(made)
    keys.make_server_certificate(made, HOSTS)
    return made


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def shake_hands(folder: Path, authority: Path, host: str) -> str | None:
    """Serve one TLS connection on loopback; return the client's problem with it, if any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    secured.recv(1)
            except (ssl.SSLError, OSError):
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        client = ssl.create_default_context(cafile=str(authority))
        # What newer Pythons check by default.
        client.verify_flags |= ssl.VERIFY_X509_STRICT
        try:
            with (
                socket.create_connection(listener.getsockname()) as raw,
                client.wrap_socket(raw, server_hostname=host),
            ):
                return None
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join()


@pytest.mark.parametrize("host", HOSTS)
def test_the_chain_verifies_for_every_host(folder: Path, host: str) -> None:
    try:
        name: x509.IPAddress | x509.DNSName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    store = Store([load(folder / "authority.crt")])
    chain = PolicyBuilder().store(store).build_server_verifier(name).verify(load(folder / "server.crt"), [])
    assert len(chain) == 2
    assert shake_hands(folder, folder / "authority.crt", host) is None


def test_another_host_or_another_authority_is_turned_away(folder: Path, tmp_path: Path) -> None:
    keys.make_authority(tmp_path / "other")
    with pytest.raises(VerificationError):
        PolicyBuilder().store(Store([load(tmp_path / "other" / "authority.crt")])).build_server_verifier(
            x509.DNSName("localhost")
        ).verify(load(folder / "server.crt"), [])
    problem = shake_hands(folder, tmp_path / "other" / "authority.crt", "localhost")
    assert problem is not None
    assert "Hostname mismatch" in str(shake_hands(folder, folder / "authority.crt", "example.net"))


def test_the_authority_signs_servers_and_nothing_below_them(folder: Path) -> None:
    authority, server = load(folder / "authority.crt"), load(folder / "server.crt")
    server.verify_directly_issued_by(authority)
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert authority.serial_number != server.serial_number
    now = datetime.datetime.now(datetime.UTC)
    for certificate, days in ((authority, keys.AUTHORITY_DAYS), (server, keys.SERVER_DAYS)):
        assert certificate.not_valid_before_utc < now
        assert abs(
            certificate.not_valid_after_utc - now - datetime.timedelta(days=days)
        ) < datetime.timedelta(1)


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    keys.make_authority(tmp_path / "keys", days=3)
    keys.make_server_certificate(tmp_path / "keys", ["localhost"], days=30)
    ends = [load(tmp_path / "keys" / f"{name}.crt").not_valid_after_utc for name in ("authority", "server")]
    assert ends[0] == ends[1]


def test_a_node_key_is_what_flower_reads(tmp_path: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve

    private, public = keys.make_node_key(tmp_path / "keys", "site-a")
    key = serialization.load_ssh_private_key(private.read_bytes(), password=None)
    assert uses_nist_ec_curve(key.public_key())
    assert try_load_public_key(public) == public_key_to_bytes(key.public_key())
    assert keys.read_node_key(private).private_numbers() == key.private_numbers()


def test_secrets_are_for_their_owner_alone(folder: Path) -> None:
    keys.make_node_key(folder, "site-a")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}
    assert modes[folder.name] == 0o700
    assert all(modes[name] == 0o600 for name in ("authority.key", "server.key", "site-a"))
    assert (folder / ".gitignore").read_text() == "*\n"


MAKERS: dict[str, Callable[[Path, bool], object]] = {
    "authority.key": lambda folder, force: keys.make_authority(folder, force=force),
    "server.key": lambda folder, force: keys.make_server_certificate(folder, ["localhost"], force=force),
    "site-a": lambda folder, force: keys.make_node_key(folder, "site-a", force=force),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_overwritten_unless_forced(folder: Path, name: str) -> None:
    keys.make_node_key(folder, "site-a")
    before = (folder / name).read_bytes()
    with pytest.raises(PhotonError, match=r"exists already.*--force"):
        MAKERS[name](folder, False)
    assert (folder / name).read_bytes() == before
    MAKERS[name](folder, True)
    assert (folder / name).read_bytes() != before


@pytest.mark.parametrize(
    "host", ["", "https://example.org", "example.org:8000", "a b", "-a.org", "1.2.3.400", "x" * 64, "*.org"]
)
def test_what_is_no_host_is_refused(folder: Path, host: str) -> None:
    with pytest.raises(PhotonError, match="not a host name or IP address"):
        keys.make_server_certificate(folder, [host], force=True)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.pub", ".hidden", "x" * 65])
def test_what_is_no_node_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PhotonError, match="node name"):
        keys.make_node_key(tmp_path / "keys", name)


def test_misuse_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match=r"authority\.crt: cannot be read"):
        keys.make_server_certificate(tmp_path / "empty", ["localhost"])
    with pytest.raises(PhotonError, match="at least one day"):
        keys.make_authority(folder, days=0, force=True)
    (folder / "authority.key").chmod(0o640)
    with pytest.raises(PhotonError, match=r"others may use this private file.*chmod 600"):
        keys.make_server_certificate(folder, ["localhost"], force=True)
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o755)
    with pytest.raises(PhotonError, match=r"others may use this folder.*chmod 700"):
        keys.make_authority(open_folder)
    keys.make_authority(tmp_path / "other")
    for name in ("authority.key", "authority.crt"):
        (folder / name).unlink()
    (tmp_path / "other" / "authority.key").rename(folder / "authority.key")
    keys.make_authority(tmp_path / "third")
    (tmp_path / "third" / "authority.crt").rename(folder / "authority.crt")
    with pytest.raises(PhotonError, match=r"not the key of authority\.crt"):
        keys.make_server_certificate(folder, ["localhost"], force=True)


def test_a_node_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    _, public = keys.make_node_key(tmp_path / "keys", "site-a")
    other = tmp_path / "keys" / "other"
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    other.chmod(0o600)
    with pytest.raises(PhotonError, match="not an ECDSA key"):
        keys.read_node_key(other)
    with pytest.raises(PhotonError, match="not a private key"):
        keys.read_node_key(public)
    other.write_text("nonsense")
    with pytest.raises(PhotonError, match="neither a certificate nor a key"):
        keys.show_key_file(other)


def test_show_tells_what_a_file_is_and_nothing_secret(folder: Path) -> None:
    private, public = keys.make_node_key(folder, "site-a")
    server = keys.show_key_file(folder / "server.crt")
    assert server["hosts"] == ", ".join(HOSTS)
    assert server["issuer"] == "CN=Photon authority"
    assert keys.show_key_file(private)["fingerprint"] == keys.show_key_file(public)["fingerprint"]
    assert keys.show_key_file(public)["name"] == "site-a"
    secret = private.read_text().splitlines()[3]
    for file in folder.iterdir():
        if file.name != ".gitignore":
            assert secret not in str(keys.show_key_file(file))
