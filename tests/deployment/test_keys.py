"""Keys and certificates: what other programs think of them, what a client accepts over a real connection, what is refused."""

from __future__ import annotations

import datetime as dt
import shutil
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedmed.deployment import keys
from fedmed.errors import UserError

HOSTS = ("fl.example.org", "10.1.2.3")
OPENSSH, PLAIN = serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()


@pytest.fixture(scope="module")
def authority() -> keys.Pair:
    """One authority for all tests of this file."""
    return keys.new_authority("fl.example.org")


@contextmanager
def served(server: keys.Pair, folder: Path) -> Iterator[int]:
    """A TLS server on loopback, which closes every connection after the handshake; gives its port."""
    (folder / "server.crt").write_bytes(server.public)
    (folder / "server.key").write_bytes(server.private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(1)
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def connect(port: int, ca: Path, name: str) -> str:
    """Do a strict handshake as a client that knows the server as `name`; gives the TLS version."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        return str(secure.version())


def test_a_client_accepts_every_name_and_address_and_no_other(authority: keys.Pair, tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.public)
    with served(keys.new_server_certificate(authority, HOSTS), tmp_path) as port:
        for name in (*HOSTS, "localhost", "127.0.0.1", "::1"):
            assert connect(port, ca, name) == "TLSv1.3"
        for name in ("other.example.org", "10.1.2.4"):
            with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch|IP address mismatch"):
                connect(port, ca, name)


def test_a_client_refuses_another_authority_and_an_expired_certificate(authority: keys.Pair, tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_bytes(keys.new_authority("fl.example.org").public)  # of the same name, with another key
    with (
        served(keys.new_server_certificate(authority, HOSTS), tmp_path) as port,
        pytest.raises(ssl.SSLCertVerificationError, match=r"signature failure|unable to get local issuer|self-signed"),
    ):
        connect(port, ca, "localhost")
    ca.write_bytes(authority.public)
    with (
        served(keys.new_server_certificate(authority, HOSTS, days=-2), tmp_path) as port,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        connect(port, ca, "localhost")


def test_httpx_which_flower_uses_accepts_it(authority: keys.Pair, tmp_path: Path) -> None:
    import httpx

    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.public)
    with served(keys.new_server_certificate(authority, HOSTS), tmp_path) as port:
        with (
            httpx.Client(verify=ssl.create_default_context(cafile=str(ca)), trust_env=False) as client,
            pytest.raises(httpx.RemoteProtocolError),
        ):
            client.get(f"https://127.0.0.1:{port}/health")  # the server speaks no HTTP: it got that far
        with (
            httpx.Client(trust_env=False) as client,
            pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"),
        ):
            client.get(f"https://127.0.0.1:{port}/health")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the command openssl is not installed")
def test_openssl_finds_no_fault_under_its_strict_rules(authority: keys.Pair, tmp_path: Path) -> None:
    ca, server = tmp_path / "ca.crt", tmp_path / "server.crt"
    ca.write_bytes(authority.public)
    server.write_bytes(keys.new_server_certificate(authority, HOSTS).public)
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", HOSTS[0]]
    done = subprocess.run([*command, "-CAfile", str(ca), str(server)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(ca), "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        text=True,
        timeout=20,
    ).stdout
    assert shown.strip().partition("=")[2] == keys.fingerprint(keys.read_certificate(ca))


def test_dates_names_and_rights(authority: keys.Pair) -> None:
    ca = x509.load_pem_x509_certificate(authority.public)
    server = x509.load_pem_x509_certificate(keys.new_server_certificate(authority, HOSTS, days=825).public)
    assert 3649.9 < keys.days_left(ca) <= 3650 and 824.9 < keys.days_left(server) <= 825
    assert keys.days_left(server, now=server.not_valid_after_utc + dt.timedelta(days=3)) == -3
    assert server.not_valid_before_utc < dt.datetime.now(dt.UTC) - dt.timedelta(minutes=59)
    assert keys.hosts_of(server) == (*HOSTS, "localhost", "127.0.0.1", "::1") and keys.hosts_of(ca) == ()
    assert keys.is_signed_by(server, ca) and keys.is_signed_by(ca, ca)
    assert not keys.is_signed_by(server, x509.load_pem_x509_certificate(keys.new_authority("x").public))
    rights = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert rights.critical and rights.value.ca and rights.value.path_length == 0
    rights = server.extensions.get_extension_for_class(x509.BasicConstraints)
    assert rights.critical and not rights.value.ca
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert len({ca.serial_number, server.serial_number}) == 2


def test_a_long_host_name_still_makes_a_certificate(authority: keys.Pair) -> None:
    host = ".".join(["a" * 60] * 4)
    made = x509.load_pem_x509_certificate(keys.new_server_certificate(authority, [host]).public)
    assert keys.hosts_of(made)[0] == host
    assert x509.load_pem_x509_certificate(keys.new_authority(host).public)


@pytest.mark.parametrize(
    ("text", "host"),
    [("FL.Example.org.", "fl.example.org"), (" 10.0.0.1 ", "10.0.0.1"), ("[FD00::1]", "fd00::1"), ("node_1", "node_1")],
)
def test_hosts_come_in_their_usual_spelling(text: str, host: str) -> None:
    assert keys.check_host(text) == host


@pytest.mark.parametrize(
    "text", ["", "a b", "fl.example.org:8000", "https://fl.example.org", "10.0.0.256", "-a.org", "*.a.org", "ä.org"]
)
def test_what_is_no_host_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a host name or an IP address"):
        keys.check_host(text)
    if text.endswith(":8000"):
        with pytest.raises(UserError, match="--port"):
            keys.check_host(text)


# ---------------------------------------------------------------------- files and permissions


def test_secrets_are_written_for_their_owner_only_and_whole(tmp_path: Path) -> None:
    path = keys.write_secret(tmp_path / "new" / "key", b"one")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    keys.write_secret(path, b"two")
    assert path.read_bytes() == b"two" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_loose_permissions_are_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = keys.write_secret(tmp_path / "key", b"x")
    keys.check_private(path, "the key")
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"mode 0{mode:o}.*chmod 600 {path}"):
        keys.check_private(path, "the key")
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    with pytest.raises(UserError, match=f"chmod 700 {folder}"):
        keys.check_private(folder, "the folder")
    with pytest.raises(UserError, match="No such file"):
        keys.check_private(tmp_path / "none", "the key")


def test_certificate_files_that_are_none(authority: keys.Pair, tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    with pytest.raises(UserError, match="No such file"):
        keys.read_certificate(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="is no certificate; expected PEM"):
        keys.read_certificate(path)
    path.write_bytes(authority.private)
    with pytest.raises(UserError, match="holds a private key") as caught:
        keys.read_certificate(path)
    assert authority.private.decode().splitlines()[1] not in str(caught.value)


def test_server_key_and_certificate_must_belong_together(authority: keys.Pair, tmp_path: Path) -> None:
    one, two = (keys.new_server_certificate(authority, HOSTS) for _ in range(2))
    key, certificate = keys.write_secret(tmp_path / "k", one.private), keys.write_secret(tmp_path / "c", one.public)
    assert keys.hosts_of(keys.read_server_pair(key, certificate))[:2] == HOSTS
    keys.write_secret(key, two.private)
    with pytest.raises(UserError, match="does not belong to"):
        keys.read_server_pair(key, certificate)
    keys.write_secret(key, b"nonsense")
    with pytest.raises(UserError, match="is no private key in PEM"):
        keys.read_server_pair(key, certificate)
    key.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        keys.read_server_pair(key, certificate)


# ---------------------------------------------------------------------- keys of the sites


def private_file(folder: Path, content: bytes) -> Path:
    """A private key file with proper permissions."""
    return keys.write_secret(folder / "site.key", content)


def test_both_halves_of_a_site_key_say_the_same(tmp_path: Path) -> None:
    pair = keys.new_site_key()
    private, public = private_file(tmp_path, pair.private), tmp_path / "site.pub"
    public.write_bytes(pair.public)
    key = keys.read_public_key(public)
    assert keys.read_site_key(private) == key
    assert key.line.startswith("ecdsa-sha2-nistp384 ") and pair.public.decode() == f"{key.line}\n"
    loaded = serialization.load_ssh_public_key(pair.public)
    pem = loaded.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert keys.fingerprint_of_pem(pem) == key.fingerprint  # Flower sends it in this form
    public.write_bytes(pair.public.strip() + b" somebody@hospital\n\n")  # with a comment, as ssh-keygen writes it
    assert keys.read_public_key(public) == key


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="the command ssh-keygen is not installed")
def test_ssh_keygen_and_we_understand_each_other(tmp_path: Path) -> None:
    pair = keys.new_site_key()
    (tmp_path / "ours.pub").write_bytes(pair.public)
    shown = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "ours.pub")], capture_output=True, text=True, timeout=20
    ).stdout
    assert shown.split()[1] == keys.read_public_key(tmp_path / "ours.pub").fingerprint
    theirs = tmp_path / "theirs"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "256", "-N", "", "-f", str(theirs)]
    subprocess.run(command, check=True, timeout=20)
    assert keys.read_site_key(theirs) == keys.read_public_key(tmp_path / "theirs.pub")
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "a password", "-f", str(theirs)], check=True, timeout=20)
    with pytest.raises(UserError, match="has a password"):
        keys.read_site_key(theirs)


def test_a_private_key_in_place_of_the_public_one_is_refused_and_not_shown(tmp_path: Path) -> None:
    pair = keys.new_site_key()
    path = private_file(tmp_path, pair.private)
    with pytest.raises(UserError, match="holds a private key, which must not leave the site") as caught:
        keys.read_public_key(path)
    body = pair.private.decode().splitlines()[1:-1]
    assert not any(line in str(caught.value) for line in body)
    with pytest.raises(UserError, match="is no private key in OpenSSH format"):
        keys.read_site_key(private_file(tmp_path, pair.public))


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    def ssh(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> bytes:
        return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)

    other = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(UserError, match="expected an ECDSA key on P-384 or P-256, got Ed25519"):
        keys.parse_public_key(ssh(other.public_key()), "site.pub")
    with pytest.raises(UserError, match="got Ed25519"):
        keys.read_site_key(private_file(tmp_path, other.private_bytes(serialization.Encoding.PEM, OPENSSH, PLAIN)))
    with pytest.raises(UserError, match="got ECDSA on secp521r1"):
        keys.parse_public_key(ssh(ec.generate_private_key(ec.SECP521R1()).public_key()), "site.pub")
    assert keys.parse_public_key(ssh(ec.generate_private_key(ec.SECP256R1()).public_key()), "site.pub").fingerprint


def test_broken_keys(tmp_path: Path) -> None:
    for content, words in (
        (b"", "found 0 lines"),
        (b"ecdsa-sha2-nistp384 AAAA", "is no public key"),
        (b"a\nb", "2 lines"),
        (b"\xff", "is no"),
    ):
        with pytest.raises(UserError, match=words):
            keys.parse_public_key(content, "site.pub")
    whole = keys.new_site_key().private
    with pytest.raises(UserError, match="damaged"):
        keys.read_site_key(private_file(tmp_path, whole[:80] + whole[120:]))
    loose = private_file(tmp_path, whole)
    loose.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        keys.read_site_key(loose)
    for content in (b"", b"nonsense", whole):
        assert keys.fingerprint_of_pem(content) is None
