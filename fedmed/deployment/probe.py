"""Why a site does not reach its coordinator: name, connection, TLS, answer, one after the other, each failure in one line.

Asks for the page /health and sends nothing else. It goes straight to the coordinator; Flower takes the proxy of the environment, if any.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedmed.errors import UserError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

TIMEOUT_S = 5.0  # of each of the four steps
_NOT_YET, _EXPIRED = 9, 10  # OpenSSL's numbers for what is wrong with a certificate
_OTHER_NAME = (62, 64)
_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")
_ANSWER_BYTES = 65536


@dataclass(frozen=True)
class Finding:
    """How far a probe came: `stage` is name, connection, tls or answer (where it failed, or the last), `text` one line that says what to do."""

    ok: bool
    stage: str
    text: str


def probe(host: str, port: int, ca_file: Path, timeout_s: float = TIMEOUT_S) -> Finding:
    """Try to reach a coordinator as a site does. Never raises for what the network does."""
    address = _join(host, port)
    try:
        context = ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        reason = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
        return Finding(False, "tls", f"cannot use the CA file {ca_file} ({reason}); ask the coordinator for ca.crt")
    try:
        plain = socket.create_connection((host, port), timeout_s)
    except OSError as error:
        return _no_connection(error, host, port, timeout_s)
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return _health(secure, address)
        except ssl.SSLCertVerificationError as error:
            return Finding(False, "tls", _bad_certificate(error, host, port, ca_file, timeout_s))
        except OSError as error:  # ssl.SSLError too
            return Finding(False, "tls", _no_tls(error, host, port, timeout_s))


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _no_connection(error: OSError, host: str, port: int, timeout_s: float) -> Finding:
    """No TCP connection: a name without address, nothing that listens, or no way there."""
    address = _join(host, port)
    if isinstance(error, socket.gaierror):
        text = f"no address is known for {host!r}; check the spelling of `coordinator`, the name server, the VPN"
        return Finding(False, "name", text)
    if isinstance(error, ConnectionRefusedError):
        text = f"nothing listens on {address}; has the coordinator been started (`fedmed coordinator start DIR`), is the port right?"
    elif isinstance(error, TimeoutError):
        text = f"no answer from {address} within {timeout_s:g} s; a firewall may drop outgoing connections to this port"
    else:
        text = f"{address} cannot be reached ({error.strerror or error}); check network and VPN"
    return Finding(False, "connection", text + _proxy_note(host))


def _proxy_note(host: str) -> str:
    """A remark for machines behind a proxy, which Flower would take."""
    proxied = "https" in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
    return " (HTTPS_PROXY is set: Flower goes through that proxy, this check does not)" if proxied else ""


def _no_tls(error: OSError, host: str, port: int, timeout_s: float) -> str:
    """The handshake broke off, and not over the certificate."""
    address = _join(host, port)
    if isinstance(error, TimeoutError):
        return (
            f"{address} takes connections but does not begin TLS within {timeout_s:g} s; is it the coordinator's port?"
        )
    if getattr(error, "reason", None) in _PLAIN or _answers_in_plain_text(host, port, timeout_s):
        return (
            f"{address} answers in plain text, without TLS; sites never talk to that: "
            "the coordinator must be started with `fedmed coordinator start DIR`"
        )
    reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
    return f"{address} broke off the TLS handshake ({reason}); another program may listen there, or a firewall cut it"


def _answers_in_plain_text(host: str, port: int, timeout_s: float) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s) as connection:
        connection.sendall(_request(_join(host, port)))
        return connection.recv(5) == b"HTTP/"
    return False


def _bad_certificate(error: ssl.SSLCertVerificationError, host: str, port: int, ca_file: Path, timeout_s: float) -> str:
    """What is wrong with the coordinator's certificate, and whose turn it is."""
    from fedmed.deployment import keys

    address = _join(host, port)
    shown = _shown_certificate(host, port, timeout_s)
    if error.verify_code in _OTHER_NAME:
        names = f" (good for {', '.join(keys.hosts_of(shown))})" if shown is not None else ""
        return (
            f"the certificate of {address} is not for {host!r}{names}; use one of its names in `coordinator`, "
            "or the coordinator makes one with this name: `fedmed coordinator renew DIR --host ...`"
        )
    if error.verify_code in (_EXPIRED, _NOT_YET):
        dates = f" ({shown.not_valid_before_utc:%Y-%m-%d} to {shown.not_valid_after_utc:%Y-%m-%d})" if shown else ""
        state = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        return (
            f"the certificate of {address} {state}{dates}; the coordinator renews it with `fedmed coordinator renew DIR`, "
            "unless the clock of this machine is wrong"
        )
    with contextlib.suppress(UserError):
        own = keys.fingerprint(keys.read_certificate(ca_file))
        return (
            f"the certificate of {address} was not signed by the authority in {ca_file} (SHA-256 {own[:23]}...); "
            "either this is another coordinator's ca.crt, or somebody stands in between: compare by telephone"
        )
    return f"the certificate of {address} cannot be verified ({error.verify_message}); ask the coordinator for ca.crt"


def _shown_certificate(host: str, port: int, timeout_s: float) -> Certificate | None:
    """The certificate a server shows, unverified, for the words of an error; None when there is none."""
    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection((host, port), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    return None


def _request(address: str) -> bytes:
    return f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()


def _health(secure: ssl.SSLSocket, address: str) -> Finding:
    """Ask a server whose certificate is good whether it is a SuperLink."""
    answer = b""
    try:
        secure.sendall(_request(address))
        while len(answer) < _ANSWER_BYTES and b"\r\n\r\n" not in answer:
            piece = secure.recv(4096)
            if not piece:
                break
            answer += piece
    except OSError as error:
        answer = b""
        reason = f" ({error.strerror or type(error).__name__})"
    else:
        reason = ""
    status = answer.split(b"\r\n", 1)[0].decode("ascii", errors="replace")
    if status.startswith("HTTP/") and status.split()[1:2] == ["200"]:
        return Finding(True, "answer", f"{address} answers ({secure.version()})")
    what = f"{status[:60]!r}" if status else f"nothing{reason}"
    return Finding(
        False,
        "answer",
        f"{address} has the right certificate but answers {what} to /health; is it the coordinator's port?",
    )
