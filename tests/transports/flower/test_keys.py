"""Keys of a federation: Flower reads them, only their owner can, and nothing is overwritten."""

import itertools
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from typer.testing import CliRunner

from droppeft.cli import app
from droppeft.transports.flower import keys
from droppeft.transports.flower.keys import (
    add_clients,
    make_federation,
    read_public_keys,
    renew_server,
)
from refusals import refused

HOSTS = ("server.example.org", "192.0.2.7")


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    make_federation(tmp_path / "keys", HOSTS, 2)
    return tmp_path / "keys"


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "server" / "server.crt").read_bytes())


def test_flower_reads_the_keys_and_each_belongs_to_its_client(federation: Path) -> None:
    check_keys(federation, 2)


def check_keys(federation: Path, clients: int) -> None:
    known = read_public_keys(federation / "server" / "clients")
    for client in range(clients):
        private = load_ssh_private_key(
            (federation / f"client-{client}" / f"client-{client}.key").read_bytes(), None
        )
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public = federation / "server" / "clients" / f"client-{client}.pub"
        as_flower_sends_it = public_key_to_bytes(private.public_key())
        assert try_load_public_key(public) == as_flower_sends_it
        assert known[as_flower_sends_it] == client


def test_the_authority_of_each_party_signed_the_server_for_its_names(federation: Path) -> None:
    given = certificate(federation)
    for party in ("authority", "server", "client-0", "client-1"):
        content = (federation / party / "ca.crt").read_bytes()
        given.verify_directly_issued_by(x509.load_pem_x509_certificate(content))
    names = given.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org", "localhost"]
    addresses = [str(one) for one in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["192.0.2.7", "127.0.0.1", "::1"]


def test_only_the_owner_can_read_anything(federation: Path) -> None:
    for path in (federation, *federation.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_clients_are_added_and_the_certificate_is_renewed(federation: Path) -> None:
    before = {path: path.read_bytes() for path in federation.rglob("*") if path.is_file()}
    assert add_clients(federation, 4).clients == (2, 3)
    assert set(read_public_keys(federation / "server" / "clients").values()) == {0, 1, 2, 3}
    old = certificate(federation)
    renew_server(federation, ())
    new = certificate(federation)
    same = x509.SubjectAlternativeName
    assert new.extensions.get_extension_for_class(same) == old.extensions.get_extension_for_class(
        same
    )
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"server.crt", "server.key"}


def test_nothing_is_overwritten_or_left_half_made(federation: Path, tmp_path: Path) -> None:
    with refused("keys exists already"):
        make_federation(federation, HOSTS, 2)
    with refused("keys of 2 clients already"):
        add_clients(federation, 2)
    with refused("neither a host name nor an IP address"):
        make_federation(tmp_path / "other", ["https://server.example.org"], 2)
    with refused("holds no keys of a federation"):
        renew_server(tmp_path, ())
    done = CliRunner().invoke(app, ["keys", str(federation), "--renew", "--clients", "3"])
    assert "--renew and --clients are two steps" in str(done.exception)
    assert list(tmp_path.iterdir()) == [federation]


@pytest.mark.parametrize("written", range(6))
def test_the_same_call_completes_one_that_was_interrupted(
    federation: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each file that an added client (4 files) and a renewal (2) write."""
    write, count = keys.write_atomically, itertools.count()

    def killed(path: Path, content: bytes, *, private: bool) -> None:
        if next(count) == written:
            raise KeyboardInterrupt
        write(path, content, private=private)

    monkeypatch.setattr(keys, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        _ = add_clients(federation, 3), renew_server(federation, ())
    monkeypatch.undo()
    if written < 4:
        assert add_clients(federation, 3).clients == (2,)
    renew_server(federation, ())
    check_keys(federation, 3)
    loaded = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server = federation / "server"
    loaded.load_cert_chain(server / "server.crt", server / "server.key")  # raises if no pair
    assert {path.name for path in federation.iterdir()} == {
        *("authority", "server", "client-0", "client-1", "client-2")
    }


@pytest.mark.parametrize("wrong", ["damaged", "twice", "none"])
def test_public_keys_are_checked(federation: Path, wrong: str) -> None:
    keys = federation / "server" / "clients"
    first, second = sorted(keys.iterdir())
    if wrong == "damaged":
        second.write_text("ecdsa-sha2-nistp384 AAAA")
    elif wrong == "twice":
        second.write_bytes(first.read_bytes())
    else:
        first.unlink()
        second.unlink()
    said = {"damaged": "client-1.pub is not", "twice": "key of client 0 too", "none": "no public"}
    with refused(said[wrong]):
        read_public_keys(keys)


def test_the_command_prints_commands_that_name_files_which_exist(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    done = CliRunner().invoke(app, ["keys", str(folder), "--host", "::7", "--clients", "2"])
    assert done.exit_code == 0, done.output
    assert "droppeft supernode --superlink [::7]:8000 " in done.output
    words = {word.strip("'\":") for word in done.output.replace("=", " ").split()}
    named = {Path(word) for word in words if word.startswith(str(folder))}
    assert len(named) > 10
    assert {path.name for path in named if not path.exists()} == {"superlink.db"}
