"""The probe of a coordinator, against real TLS sockets that are wrong in every way a hospital may meet."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmed.deployment import keys
from fedmed.deployment.probe import probe
from fedmed.engines.flower_internals import free_port

Answer = Callable[[socket.socket], None]
HEALTHY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def authority() -> keys.Pair:
    """The coordinator's authority."""
    return keys.new_authority("test")


@pytest.fixture
def ca(tmp_path: Path, authority: keys.Pair) -> Path:
    """The file that sites were given."""
    return write(tmp_path / "ca.crt", authority.public)


def write(path: Path, content: bytes) -> Path:
    """Write a file with mode 0600."""
    return keys.write_secret(path, content)


def says(text: bytes) -> Answer:
    """A server's part in one connection: read the request, send this."""

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(text)

    return answer


@contextlib.contextmanager
def server(answer: Answer, context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> Iterator[int]:
    """Listen on a free port until left, each connection in its own thread; gives the port."""
    listener = socket.create_server((host, 0))
    end = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if context is None:
                return answer(connection)
            with context.wrap_socket(connection, server_side=True) as secure:
                return answer(secure)

    def listen() -> None:
        while not end.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        end.set()
        listener.close()


def tls(folder: Path, pair: keys.Pair) -> ssl.SSLContext:
    """A server's context with this key and certificate."""
    key, certificate = write(folder / "server.key", pair.private), write(folder / "server.crt", pair.public)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def test_a_healthy_coordinator(tmp_path: Path, authority: keys.Pair, ca: Path) -> None:
    with server(says(HEALTHY), tls(tmp_path, keys.new_server_certificate(authority, ["fl.example.org"]))) as port:
        found = probe("127.0.0.1", port, ca)
    assert found.ok and found.stage == "answer"
    assert "TLSv1" in found.text


def test_the_certificate_of_another_authority(tmp_path: Path, ca: Path) -> None:
    stranger = keys.new_authority("test")  # same name, other key
    with server(says(HEALTHY), tls(tmp_path, keys.new_server_certificate(stranger, ["localhost"]))) as port:
        found = probe("127.0.0.1", port, ca)
    assert not found.ok and found.stage == "tls"
    assert "was not signed by the authority in" in found.text and "compare by telephone" in found.text


def test_an_expired_certificate(tmp_path: Path, authority: keys.Pair, ca: Path) -> None:
    old = keys.new_server_certificate(authority, ["localhost"], days=-1)
    with server(says(HEALTHY), tls(tmp_path, old)) as port:
        found = probe("127.0.0.1", port, ca)
    assert not found.ok and found.stage == "tls"
    assert "has expired (20" in found.text and "fedmed coordinator renew DIR" in found.text


def test_a_certificate_for_another_name(tmp_path: Path, authority: keys.Pair, ca: Path) -> None:
    context = tls(tmp_path, keys.new_server_certificate(authority, ["fl.example.org"]))
    with server(says(HEALTHY), context, host="127.0.0.2") as port:
        found = probe("127.0.0.2", port, ca)
    assert not found.ok and found.stage == "tls"
    assert "is not for '127.0.0.2'" in found.text and "fl.example.org" in found.text


@pytest.mark.parametrize("first_word", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"])
def test_a_server_without_tls(ca: Path, first_word: bytes) -> None:
    with server(says(first_word)) as port:
        found = probe("127.0.0.1", port, ca)
    assert not found.ok and found.stage == "tls"
    assert "in plain text, without TLS" in found.text


def test_nothing_listens(ca: Path) -> None:
    found = probe("127.0.0.1", free_port(), ca)
    assert not found.ok and found.stage == "connection"
    assert "nothing listens on" in found.text and "fedmed coordinator start" in found.text


def test_a_port_that_takes_connections_and_says_nothing(ca: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = probe("127.0.0.1", silent.getsockname()[1], ca, timeout_s=0.3)
    assert not found.ok and found.stage == "tls"
    assert "does not begin TLS within 0.3 s" in found.text


def test_a_port_that_hangs_up(ca: Path) -> None:
    with server(lambda connection: None) as port:
        found = probe("127.0.0.1", port, ca)
    assert not found.ok and found.stage == "tls" and "broke off the TLS handshake" in found.text


def test_a_name_without_address(ca: Path) -> None:
    found = probe("no-such-host.invalid", 8000, ca)
    assert not found.ok and found.stage == "name" and "no address is known for 'no-such-host.invalid'" in found.text


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 Not Found\r\n\r\n", b"hello\r\n\r\n", b""])
def test_the_right_certificate_on_another_program(
    tmp_path: Path, authority: keys.Pair, ca: Path, answer: bytes
) -> None:
    with server(says(answer), tls(tmp_path, keys.new_server_certificate(authority, ["localhost"]))) as port:
        found = probe("127.0.0.1", port, ca)
    assert not found.ok and found.stage == "answer" and "has the right certificate but answers" in found.text


@pytest.mark.parametrize("content", [b"", b"no certificate"])
def test_a_ca_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    found = probe("127.0.0.1", 1, write(tmp_path / "ca.crt", content))
    assert not found.ok and "it holds no certificate" in found.text
    assert "No such file" in probe("127.0.0.1", 1, tmp_path / "missing.crt").text


def test_a_proxy_is_pointed_out(ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "")
    assert "HTTPS_PROXY is set" in probe("127.0.0.1", free_port(), ca).text
