"""Certificates and keys of a federation, in the formats that Flower reads; ours.

A certificate authority of the federation signs the server's certificate, so that nodes know that
they talk to the server. Every client has a key pair: with the private key its SuperNode proves who
it is to the SuperLink, and the server knows the public key of each client.
"""

import datetime
import ipaddress
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from droppeft.errors import DroppeftError
from droppeft.files import sync, write_atomically

AUTHORITY, SERVER, PUBLIC_KEYS = "authority", "server", "clients"
"""Folders: of the certificate authority, of the server, and in it of the clients' public keys."""

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
CERTIFICATE, KEY, SECRET = "server.crt", "server.key", "superexec.secret"

AUTHORITY_DAYS, SERVER_DAYS = 3650, 730
"""Lifetimes of the two certificates."""

HERE = ("localhost", "127.0.0.1", "::1")
"""Names by which the server's own machine reaches it; they are part of its certificate."""


@dataclass(frozen=True)
class Made:
    """What a call has made.

    Attributes:
        clients: numbers of the clients whose keys are new.
        server_ends: end of the server's certificate, in UTC; ``None`` if it is not new.
    """

    clients: tuple[int, ...]
    server_ends: datetime.datetime | None


def make_federation(folder: Path, hosts: Sequence[str], clients: int) -> Made:
    """Make a folder with the keys of a new federation: one folder for each party.

    Args:
        folder: the new folder.
        hosts: names and IP addresses by which the nodes reach the server.
        clients: number of clients.

    Raises:
        DroppeftError: the folder exists, or a host is neither a name nor an address.
    """
    if folder.exists():
        raise DroppeftError(
            f"{folder} exists already; nothing is overwritten: choose another folder, or add "
            "clients to it with --clients, or renew the server's certificate with --renew"
        )
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *HERE))]
    with _made_at_once(folder) as new:
        authority = _new_folder(new / AUTHORITY)
        key = ec.generate_private_key(ec.SECP384R1())
        _write(authority / CA_KEY, _pem(key))
        _write(authority / CA_CERTIFICATE, _certificate_pem(_authority_certificate(key)))
        server = _new_folder(new / SERVER)
        _new_folder(server / PUBLIC_KEYS)
        _write(server / CA_CERTIFICATE, (authority / CA_CERTIFICATE).read_bytes())
        _write(server / SECRET, secrets.token_hex(32).encode())
        ends = _certify_server(new, names)
        for client in range(clients):
            _add_client(new, client)
    return Made(tuple(range(clients)), ends)


def add_clients(folder: Path, clients: int) -> Made:
    """Make the keys of further clients of a federation, so that it has ``clients`` of them.

    A call that was interrupted is completed by the same call.

    Raises:
        DroppeftError: the folder holds no federation, or as many clients already.
    """
    _check_federation(folder)
    present = 1 + max(read_public_keys(folder / SERVER / PUBLIC_KEYS).values())
    if clients <= present:
        raise DroppeftError(
            f"{folder} has keys of {present} clients already, and nothing is overwritten; "
            f"--clients {present + 1} adds one"
        )
    for client in range(present, clients):
        _add_client(folder, client)
    return Made(tuple(range(present, clients)), None)


def renew_server(folder: Path, hosts: Sequence[str]) -> Made:
    """Replace the server's certificate and key; clients need no new files.

    A call that was interrupted is completed by the same call.

    Args:
        hosts: as for :func:`make_federation`; without any, those of the old certificate remain.

    Raises:
        DroppeftError: the folder holds no federation, or the authority's certificate has ended.
    """
    _check_federation(folder)
    names: list[x509.GeneralName] = [_general_name(host) for host in dict.fromkeys((*hosts, *HERE))]
    if not hosts:
        old = x509.load_pem_x509_certificate((folder / SERVER / CERTIFICATE).read_bytes())
        names = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return Made((), _certify_server(folder, names))


def read_public_keys(folder: Path) -> Mapping[bytes, int]:
    """Read the public keys of the clients; the number of a client is in its file's name.

    Returns:
        The client's number for each key, which is in the form in which Flower hands it on.

    Raises:
        DroppeftError: there are no keys, a file is no key, or two files hold the same key.
    """
    found: dict[bytes, int] = {}
    for path in sorted(folder.glob("client-*.pub")):
        number = path.stem.removeprefix("client-")
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise DroppeftError(f"{path} is not a public key: {error}") from None
        if not number.isdecimal() or not isinstance(key, ec.EllipticCurvePublicKey):
            raise DroppeftError(f"{path} is not client-NUMBER.pub with an elliptic curve key")
        if (known := found.setdefault(_public_pem(key), int(number))) != int(number):
            raise DroppeftError(f"{path} has the key of client {known} too; each needs its own")
    if not found:
        raise DroppeftError(f"{folder} has no public keys of clients, such as client-0.pub")
    return found


def _check_federation(folder: Path) -> None:
    missing = [
        path
        for path in (folder / AUTHORITY / CA_KEY, folder / SERVER / CERTIFICATE)
        if not path.is_file()
    ]
    if missing:
        raise DroppeftError(f"{folder} holds no keys of a federation: {missing[0]} is missing")


def _add_client(federation: Path, client: int) -> None:
    """Make the keys of a client; the public key of one whose folder is there is made from it."""
    folder = federation / f"client-{client}"
    private = f"client-{client}.key"
    if not folder.exists():
        with _made_at_once(folder) as new:
            _write(
                new / private,
                ec.generate_private_key(ec.SECP384R1()).private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.OpenSSH,
                    serialization.NoEncryption(),
                ),
            )
            _write(new / CA_CERTIFICATE, (federation / AUTHORITY / CA_CERTIFICATE).read_bytes())
            _write(new / "node.toml", _node_file(client).encode())
    try:
        key = serialization.load_ssh_private_key((folder / private).read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise DroppeftError(
            f"{folder} exists already, but its {private} cannot be read ({error}); move the folder "
            "away"
        ) from None
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    keys = federation / SERVER / PUBLIC_KEYS
    _write(keys / f"client-{client}.pub", public + f" client-{client}\n".encode())


def _node_file(client: int) -> str:
    return f'client = {client}\ndata = "rows.csv"  # the rows of this site\n'


def _certify_server(federation: Path, names: Sequence[x509.GeneralName]) -> datetime.datetime:
    """Write a new certificate of the server; return when it ends."""
    authority = federation / AUTHORITY
    ca_key = serialization.load_pem_private_key((authority / CA_KEY).read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((authority / CA_CERTIFICATE).read_bytes())
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    start = _now()
    end = min(start + datetime.timedelta(days=SERVER_DAYS), issuer.not_valid_after_utc)
    if end <= start:
        raise DroppeftError(f"{authority / CA_CERTIFICATE} has ended; make a new federation")
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder("droppeft server", issuer.subject, key, start, end)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(_issued_by(ca_key), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    server = federation / SERVER
    _write(server / KEY, _pem(key))
    _write(server / CERTIFICATE, _certificate_pem(certificate))
    return end


def _authority_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    start = _now()
    end = start + datetime.timedelta(days=AUTHORITY_DAYS)
    name = _name("droppeft federation")
    return (
        _builder("droppeft federation", name, key, start, end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(_issued_by(key), critical=False)
        .sign(key, hashes.SHA384())
    )


def _builder(
    subject: str,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - datetime.timedelta(hours=1))  # clocks of nodes may be late
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _issued_by(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removesuffix(".").split(".")
    if not all(label and label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise DroppeftError(
            f"--host {host} is neither a host name nor an IP address; give it without a scheme, "
            "port or path, such as server.example.org"
        )
    return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


@contextmanager
def _made_at_once(folder: Path) -> Iterator[Path]:
    """Yield a new folder that gets its name when it is complete."""
    if folder.exists():
        raise DroppeftError(f"{folder} exists already, and nothing is overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))  # mode 0700
    try:
        yield partial
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _new_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def _write(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read."""
    write_atomically(path, content, private=True)
