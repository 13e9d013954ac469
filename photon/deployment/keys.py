"""The keys of a federation: a certificate authority, the aggregator's certificate, a key pair per node.

TLS shows a silo that it talks to the aggregator: the aggregator's certificate is signed by an authority
that the silo was given. A node key shows the aggregator which silo it talks to: the silo keeps the private
half and hands over the public one.
"""

import datetime
import ipaddress
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from photon.errors import PhotonError, printable
from photon.files.atomic import write_bytes

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS = 3650
SERVER_DAYS = 365

#: A certificate counts from a little before it was made, for machines whose clocks are behind.
_CLOCK_SKEW = datetime.timedelta(minutes=10)
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


def make_authority(folder: Path, *, days: int = AUTHORITY_DAYS, force: bool = False) -> list[Path]:
    """Make a certificate authority: ``authority.key``, to be kept secret, and ``authority.crt`` for all.

    Parameters
    ----------
    folder
        Folder to write to, made with mode 0700.
    days
        How long it is valid.
    force
        Replace an authority that is there. Certificates that it signed are worthless then.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    PhotonError
        If there is an authority already, or the folder is open to others or cannot be written.
    """
    from cryptography import x509

    files = [folder / "authority.key", folder / "authority.crt"]
    _prepare(folder, files, force)
    key = _new_key()
    name = _name("Photon authority")
    builder = (
        _certificate(name, name, key, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    )
    return _write_pair(files, key, _sign(builder, key))


def make_server_certificate(
    folder: Path, hosts: Sequence[str], *, days: int = SERVER_DAYS, force: bool = False
) -> list[Path]:
    """Make the aggregator's ``server.key`` and ``server.crt``, signed by the authority in ``folder``.

    Parameters
    ----------
    folder
        Folder with ``authority.key`` and ``authority.crt``.
    hosts
        Every host name and IP address by which silos reach the aggregator.
    days
        How long it is valid; never longer than the authority.
    force
        Replace a certificate that is there, for instance to renew it.

    Raises
    ------
    PhotonError
        If there is no authority, a host is none, or the files exist.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    names = _subject_alternatives(hosts)
    files = [folder / "server.key", folder / "server.crt"]
    authority = read_certificate(folder / "authority.crt")
    authority_key = _read_authority_key(folder / "authority.key", authority)
    _prepare(folder, files, force)
    key = _new_key()
    builder = (
        _certificate(_name(hosts[0]), authority.subject, key, authority_key, days, authority)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return _write_pair(files, key, _sign(builder, authority_key))


def make_node_key(folder: Path, name: str, *, force: bool = False) -> list[Path]:
    """Make a node's key pair: ``NAME``, which stays with the silo, and ``NAME.pub`` for the aggregator.

    Parameters
    ----------
    folder
        Folder to write to, made with mode 0700.
    name
        Name of the files, and comment of the public key.
    force
        Replace a key pair that is there.

    Raises
    ------
    PhotonError
        If the name cannot be a file's, the files exist, or the folder is open to others.
    """
    from cryptography.hazmat.primitives import serialization

    if not _NODE.fullmatch(name) or name.endswith(".pub"):
        raise PhotonError(
            f"node name {name!r}: use letters, digits and . _ + - (at most 64), and not the ending .pub"
        )
    files = [folder / name, folder / f"{name}.pub"]
    _prepare(folder, files, force)
    key = _new_key()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(files[0], private, 0o600)
    _write(files[1], public + f" {name}\n".encode(), 0o644)
    return files


def show_key_file(path: Path) -> dict[str, str]:
    """Return what a certificate or key file is, in words; nothing secret.

    Raises
    ------
    PhotonError
        If the file is none of those that this module makes.
    """
    content = _read(path)
    if b"BEGIN CERTIFICATE" in content:
        return _show_certificate(read_certificate(path))
    if b"PRIVATE KEY" in content:
        return _show_private_key(path, content)
    return {"kind": "public key of a node", **_show_public_key(content, path)}


def read_certificate(path: Path) -> "x509.Certificate":
    """Read a PEM certificate.

    Raises
    ------
    PhotonError
        If the file is missing or is none.
    """
    from cryptography import x509

    content = _read(path)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError:
        raise PhotonError(f"{path}: not a certificate in PEM form; `photon keys` makes such files") from None


def load_certificate(der: bytes) -> "x509.Certificate":
    """Return the certificate of an authority, of its DER form.

    Raises
    ------
    ValueError
        If it is none.
    """
    from cryptography import x509

    certificate = x509.load_der_x509_certificate(der)
    try:
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        authority = False
    if not authority:
        raise ValueError("not the certificate of an authority")
    return certificate


def load_public_key(text: bytes) -> None:
    """Check that a line of OpenSSH's form is a public key that Flower takes from a node.

    Raises
    ------
    ValueError
        If it is none.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("not a public key in OpenSSH's form") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("not an ECDSA key; `photon keys node` makes one")


def read_node_key(path: Path) -> "EllipticCurvePrivateKey":
    """Read a node's private key in the form that Flower takes: ECDSA on a NIST curve, OpenSSH, no password.

    Raises
    ------
    PhotonError
        If the file is missing, readable by others than its owner, or of another kind.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    content = _read(path)
    if b"PRIVATE KEY" not in content:
        raise PhotonError(f"{path}: not a private key; is it the public half? The node needs the private one")
    check_private(path)
    try:
        key = serialization.load_ssh_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise PhotonError(
            f"{path}: not an OpenSSH private key without a password; make one with `photon keys node`"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1
    ):
        raise PhotonError(f"{path}: not an ECDSA key on a NIST curve; make one with `photon keys node`")
    return key


def check_private(path: Path) -> None:
    """Refuse a secret file that others than its owner may use.

    Raises
    ------
    PhotonError
        If they may.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise PhotonError(
            f"{path}: others may use this private file (mode {mode:04o}); run: chmod 600 {path}"
        )


def _prepare(folder: Path, files: Sequence[Path], force: bool) -> None:
    """Make the folder if need be, and refuse to overwrite."""
    there = [file for file in files if file.exists()]
    if there and not force:
        raise PhotonError(f"{there[0]}: exists already; keep it, or replace it with --force")
    try:
        if not folder.exists():
            folder.mkdir(mode=0o700, parents=True)
            # A key must not get into a repository, wherever its folder is.
            _write(folder / ".gitignore", b"*\n", 0o600)
        mode = stat.S_IMODE(folder.stat().st_mode)
    except OSError as error:
        raise PhotonError(f"{folder}: cannot be a folder for keys ({error.strerror})") from None
    if mode & 0o077:
        raise PhotonError(
            f"{folder}: others may use this folder (mode {mode:04o}); "
            f"run chmod 700 {folder}, or name a new one"
        )


def _new_key() -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _name(common_name: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    # A common name holds at most 64 characters; what counts is the list of alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _certificate(
    subject: "x509.Name",
    issuer: "x509.Name",
    key: "EllipticCurvePrivateKey",
    issuer_key: "EllipticCurvePrivateKey",
    days: int,
    authority: "x509.Certificate | None" = None,
) -> "x509.CertificateBuilder":
    from cryptography import x509

    if days < 1:
        raise PhotonError(f"--days {days}: a certificate is valid for at least one day")
    begin = datetime.datetime.now(datetime.UTC) - _CLOCK_SKEW
    end = begin + datetime.timedelta(days=days)
    if authority is not None:
        end = min(end, authority.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )


def _sign(builder: "x509.CertificateBuilder", key: "EllipticCurvePrivateKey") -> "x509.Certificate":
    from cryptography.hazmat.primitives import hashes

    return builder.sign(key, hashes.SHA384())


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject_alternatives(hosts: Sequence[str]) -> "list[x509.GeneralName]":
    from cryptography import x509

    if not hosts:
        raise PhotonError("name every host name and IP address of the aggregator with --host")
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        if (problem := host_problem(host)) is not None:
            raise PhotonError(f"--host {printable(host)}: {problem}")
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def host_problem(host: str) -> str | None:
    """Return why a text cannot be a host name or IP address, or None."""
    try:
        # What may follow an address of the local link is any text at all.
        good = "%" not in host and bool(ipaddress.ip_address(host))
    except ValueError:
        good = bool(_HOST.fullmatch(host)) and len(host) <= 253 and not host.rpartition(".")[2].isdigit()
    return None if good else "not a host name or IP address; leave out scheme, port and path"


def _read_authority_key(path: Path, authority: "x509.Certificate") -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    content = _read(path)
    check_private(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        raise PhotonError(
            f"{path}: not a private key in PEM form; make one with `photon keys authority`"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise PhotonError(f"{path}: not the key of authority.crt beside it; both must come from one call")
    return key


def _write_pair(
    files: Sequence[Path], key: "EllipticCurvePrivateKey", certificate: "x509.Certificate"
) -> list[Path]:
    from cryptography.hazmat.primitives import serialization

    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(files[0], private, 0o600)
    _write(files[1], certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return list(files)


def _write(path: Path, content: bytes, mode: int) -> None:
    try:
        write_bytes(path, content, mode=mode)
    except OSError as error:
        raise PhotonError(f"{path}: cannot be written ({error.strerror})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PhotonError(
            f"{path}: cannot be read ({error.strerror}); `photon keys` makes such files"
        ) from None


def _show_certificate(certificate: "x509.Certificate") -> dict[str, str]:
    from cryptography import x509

    extensions = certificate.extensions
    authority = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    shown = {
        "kind": "certificate of an authority" if authority else "certificate of an aggregator",
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
    }
    if not authority:
        shown["hosts"] = ", ".join(certificate_hosts(certificate))
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    shown |= {
        "valid from": f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
        "valid until": f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        + (f" ({left.days} days)" if left.days >= 0 else " (over)"),
        "serial": f"{certificate.serial_number:x}",
        "fingerprint": certificate_fingerprint(certificate),
    }
    return shown


def certificate_fingerprint(certificate: "x509.Certificate") -> str:
    """Return a certificate's fingerprint, as people compare it."""
    from cryptography.hazmat.primitives import hashes

    return f"SHA256 {certificate.fingerprint(hashes.SHA256()).hex(':')}"


def certificate_hosts(certificate: "x509.Certificate") -> list[str]:
    """Return the host names and IP addresses that a certificate is for."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]


def _show_private_key(path: Path, content: bytes) -> dict[str, str]:
    from cryptography.hazmat.primitives import serialization

    mode = f"{stat.S_IMODE(path.stat().st_mode):04o}"
    if b"OPENSSH" in content:
        public = read_node_key(path).public_key()
        text = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        return {"kind": "private key of a node", **_show_public_key(text, path), "mode": mode}
    return {"kind": "private key of a certificate", "mode": mode}


def _show_public_key(content: bytes, path: Path) -> dict[str, str]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    from photon.federation.names import openssh_fingerprint

    try:
        serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise PhotonError(f"{path}: neither a certificate nor a key that `photon keys` makes") from None
    kind, _, *comment = content.split(maxsplit=2)
    shown = {"type": kind.decode(), "fingerprint": openssh_fingerprint(content)}
    return shown | ({"name": comment[0].decode().strip()} if comment else {})
