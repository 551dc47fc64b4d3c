"""Keys and certificates of a deployment: the coordinator's authority and server certificate, the key pairs of the sites.

A coordinator has an authority of its own (a self-signed certificate, `ca.crt`), which its sites trust and nobody else; the authority signs
the server certificate. A site proves who it is with a key pair whose public half the coordinator has approved. All keys are ECDSA on the
curve P-384; sites may bring P-256 as well. Texts are bytes as they stand in the files: certificates and server keys PEM, site keys OpenSSH.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmed.errors import UserError

AUTHORITY_DAYS = 3650  # ten years
EARLIER = dt.timedelta(hours=1)  # certificates begin in the past: a site's clock may be late
ALWAYS = ("localhost", "127.0.0.1", "::1")  # how the coordinator's own machine calls it
CURVES = (ec.SECP384R1, ec.SECP256R1)
GROUP_AND_OTHERS = 0o077
LONGEST_COMMON_NAME = 64  # X.520

_DNS_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?)*")


class Pair(NamedTuple):
    """A private key and what is shown of it: a certificate, or an OpenSSH public key (one line)."""

    private: bytes
    public: bytes


class PublicKey(NamedTuple):
    """A site's public key: one line of OpenSSH text without comment, and its fingerprint as `ssh-keygen -l` prints it."""

    line: str
    fingerprint: str


# ---------------------------------------------------------------------- files and permissions


def write_secret(path: Path, content: bytes) -> Path:
    """Write a file that only its owner can read, complete or not at all; its folder, if new, gets mode 0700."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_private(path: Path, what: str) -> None:
    """Raise `UserError` if anybody but the owner may do anything with a file or folder; `what` names it for people."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from error
    if stat.S_IMODE(mode) & GROUP_AND_OTHERS:
        right = "700" if stat.S_ISDIR(mode) else "600"
        raise UserError(
            f"{what} {path} may be read or changed by others (mode {stat.S_IMODE(mode):04o}): chmod {right} {path}"
        )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}") from error


# ---------------------------------------------------------------------- certificates


def check_host(text: str) -> str:
    """Give a host name or IP address in its usual spelling. Raises `UserError` for anything else, a port included."""
    host = text.strip().strip("[]").lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host) or host.replace(".", "").isdigit():
        hint = "; give the port with --port" if re.fullmatch(r"[^:]+:\d+", host) else ""
        raise UserError(f"--host: expected a host name or an IP address, got {text!r}{hint}")
    return host


def new_authority(label: str, days: float = AUTHORITY_DAYS) -> Pair:
    """Make an authority that may sign server certificates and nothing below them; `label` tells it from others."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"FedMed authority of {label}")
    builder = _builder(name, name, key.public_key(), days, key.public_key())
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return Pair(_pem(key), builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def new_server_certificate(authority: Pair, hosts: Sequence[str], days: float = 825) -> Pair:
    """Make a server key and its certificate for `hosts` (names and addresses) and this machine's own names.

    `days` may be negative, for a certificate that has expired.
    """
    issuer, signer = x509.load_pem_x509_certificate(authority.public), _load_pem_key(authority.private)
    key = ec.generate_private_key(ec.SECP384R1())
    names = list(dict.fromkeys([*(check_host(host) for host in hosts), *ALWAYS]))
    builder = _builder(_name(names[0]), issuer.subject, key.public_key(), days, signer.public_key())
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_alternative(name) for name in names]), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return Pair(_pem(key), builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:LONGEST_COMMON_NAME])])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float, signer: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:  # fmt: skip
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=days)
    start = min(now, end) - EARLIER
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_pem_key(content: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(content, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key")
    return key


def read_certificate(path: Path, what: str = "certificate") -> x509.Certificate:
    """Read the first certificate of a PEM file. Raises `UserError`; one that has expired is read all the same."""
    content = _read(path, what)
    if b"PRIVATE KEY" in content and b"BEGIN CERTIFICATE" not in content:
        raise UserError(f"{path} holds a private key; expected a {what} (-----BEGIN CERTIFICATE-----)")
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError:
        raise UserError(f"{path} is no {what}; expected PEM text (-----BEGIN CERTIFICATE-----)") from None


def read_server_pair(private: Path, public: Path) -> x509.Certificate:
    """Read the server certificate and check that the key is its own. Raises `UserError`."""
    certificate = read_certificate(public, "server certificate")
    check_private(private, "the server's private key")
    try:
        key = _load_pem_key(_read(private, "server's private key"))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{private} is no private key in PEM without a password") from None
    if key.public_key() != certificate.public_key():
        raise UserError(f"the key {private} does not belong to the certificate {public}")
    return certificate


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority has issued the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def days_left(certificate: x509.Certificate, now: dt.datetime | None = None) -> float:
    """Days until a certificate ends; negative when it has."""
    return (certificate.not_valid_after_utc - (now or dt.datetime.now(dt.UTC))).total_seconds() / 86400


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Names and addresses a server certificate is good for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate in pairs of hexadecimal digits, as `openssl x509 -fingerprint -sha256` prints it."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


# ---------------------------------------------------------------------- keys of the sites


def new_site_key() -> Pair:
    """Make a site's key pair: P-384, OpenSSH format, no password (the site starts without anybody at hand)."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return Pair(private, f"{_public(key.public_key(), 'the new key').line}\n".encode())


def parse_public_key(content: bytes, where: str) -> PublicKey:
    """Read a public key in OpenSSH format. Raises `UserError`, which never quotes the content."""
    if b"PRIVATE KEY" in content:
        raise UserError(
            f"{where} holds a private key, which must not leave the site: delete this copy, let the site make a new "
            "pair (`fedmed site keygen`) and send the .pub file only"
        )
    lines = [line for line in content.splitlines() if line.strip()]
    if len(lines) != 1:
        raise UserError(f"{where}: expected one public key on one line, found {len(lines)} lines")
    try:
        key = serialization.load_ssh_public_key(lines[0].strip())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{where} is no public key; expected one line that begins with ecdsa-sha2-nistp384 (`fedmed site keygen` makes one)"
        ) from None
    return _public(key, where)


def read_public_key(path: Path) -> PublicKey:
    """Read a site's public key file. Raises `UserError`."""
    return parse_public_key(_read(path, "public key"), str(path))


def read_site_key(path: Path) -> PublicKey:
    """Check a site's private key file (permissions, format, curve) and give its public half. Raises `UserError`."""
    check_private(path, "the private key")
    content = _read(path, "private key")
    make_one = "make a pair with `fedmed site keygen DIR`"
    if b"PRIVATE KEY" not in content:
        raise UserError(f"{path} is no private key in OpenSSH format; {make_one}")
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path} has a password, which nobody could type at the start; {make_one}") from None
    except ValueError:
        raise UserError(f"{path} is no private key in OpenSSH format, or is damaged; {make_one}") from None
    return _public(key.public_key(), str(path))


def fingerprint_of_pem(content: bytes) -> str | None:
    """Fingerprint of a public key in PEM, as Flower sends it; None when it is none."""
    try:
        return _public(serialization.load_pem_public_key(content), "").fingerprint
    except (ValueError, UnsupportedAlgorithm, UserError):
        return None


def _public(key: object, where: str) -> PublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVES):
        kind = f"ECDSA on {key.curve.name}" if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise UserError(f"{where}: expected an ECDSA key on P-384 or P-256, got {kind.removesuffix('PublicKey')}")
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return PublicKey(line, f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}")
