"""What the SuperLink refuses, and the one line that says so: the wall's paths, keys that are not approved, TLS that fails."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives import serialization

from fedmed.deployment import keys, superlink
from fedmed.deployment.coordinator_folder import ApprovedSite, CoordinatorFolder
from fedmed.deployment.superlink import Refusals, watch_handshakes
from fedmed.engines.flower_tasks import Refusal, Wall

ELSEWHERE = ("10.9.8.7", 5555)


class App:
    """An ASGI app that answers everything with one status and counts its calls."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.calls = status, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b"app"})


def ask(
    wall: Wall, path: str, client: object, kind: str = "http", headers: list[tuple[bytes, bytes]] | None = None
) -> list[dict[str, Any]]:
    """Send one request through the wall and give what came back."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": kind, "path": path, "client": client, "headers": headers or []}
    asyncio.run(wall(scope, None, send))
    return sent


# ---------------------------------------------------------------------- the wall


@pytest.mark.parametrize(
    ("client", "path", "status"),
    [
        (ELSEWHERE, "/v1/fleet/pull-messages", 200),
        (ELSEWHERE, "/health", 200),
        (ELSEWHERE, "/v1/control/start-run", 403),
        (ELSEWHERE, "/v1/runtime/acquire-task", 403),
        (ELSEWHERE, "/docs", 403),
        (ELSEWHERE, "/v1/fleet", 403),
        (ELSEWHERE, "//v1/fleet/x", 403),
        (ELSEWHERE, "", 403),
        (("fd00::2", 1, 0, 0), "/v1/control/start-run", 403),
        (None, "/v1/control/start-run", 403),
        (("not an address", 1), "/v1/control/start-run", 403),
        (("127.0.0.1", 1), "/v1/control/start-run", 200),
        (("127.8.8.8", 1), "/v1/control/start-run", 200),
        (("::1", 1, 0, 0), "/v1/control/start-run", 200),
        (("::ffff:127.0.0.1", 1, 0, 0), "/v1/control/start-run", 200),
        (("::ffff:10.0.0.1", 1, 0, 0), "/v1/control/start-run", 403),
    ],
)
def test_other_machines_reach_the_sites_paths_only(client: object, path: str, status: int) -> None:
    app = App()
    refused: list[Refusal] = []
    answer = ask(Wall(app, refused.append), path, client)
    assert answer[0]["status"] == status
    assert app.calls == (status == 200)
    host = client[0] if isinstance(client, tuple) else "unknown"
    assert refused == ([] if status == 200 else [Refusal(host, path, 403, b"")])


def test_no_websockets_for_other_machines_and_the_lifespan_always() -> None:
    app = App()
    assert ask(Wall(app), "/v1/control/stream", ELSEWHERE, "websocket") == [{"type": "websocket.close", "code": 1008}]
    assert app.calls == 0
    ask(Wall(app), "/v1/control/stream", ("127.0.0.1", 1), "websocket")
    ask(Wall(app), "", None, "lifespan")
    assert app.calls == 2


def test_the_hook_hears_of_sites_that_are_refused_with_their_key() -> None:
    refused: list[Refusal] = []
    wall = Wall(App(401), refused.append)
    key = [(b"host", b"x"), (b"flwr-public-key", base64.b64encode(b"PEM text"))]
    assert ask(wall, "/v1/fleet/pull-messages", ELSEWHERE, headers=key)[0]["status"] == 401
    ask(wall, "/v1/fleet/pull-messages", ("127.0.0.1", 1), headers=[(b"flwr-public-key", b"no base64 \xff")])
    ask(wall, "/v1/control/start-run", ("127.0.0.1", 1))  # the coordinator's own mistakes are its own to see
    assert refused == [
        Refusal("10.9.8.7", "/v1/fleet/pull-messages", 401, b"PEM text"),
        Refusal("127.0.0.1", "/v1/fleet/pull-messages", 401, b""),
    ]
    assert ask(Wall(App(401)), "/v1/fleet/pull-messages", ELSEWHERE)[0]["status"] == 401  # without a hook


# ---------------------------------------------------------------------- words


class Lines:
    """Refusals with a clock of our own; `lines` is what was written."""

    def __init__(self, folder: Path | None = None) -> None:
        self.lines: list[str] = []
        self.now = 0.0
        self.refusals = Refusals(self.lines.append, folder, lambda: self.now)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorFolder:
    """A coordinator with one approved site."""
    made = CoordinatorFolder.create(tmp_path_factory.mktemp("coordinator") / "fl", ["fl.example.org"])
    with made.changed_sites() as sites:
        public, _ = APPROVED
        sites["north"] = ApprovedSite(1, public.fingerprint, "2026-01-01", public.line)
    return made


def key_pair() -> tuple[keys.PublicKey, bytes]:
    """A public key as the coordinator keeps it and as Flower sends it."""
    text = keys.new_site_key().public
    public = serialization.load_ssh_public_key(text)
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return keys.parse_public_key(text, "new"), pem


APPROVED, UNKNOWN = key_pair(), key_pair()


@pytest.mark.parametrize(
    ("path", "status", "key", "words"),
    [
        (
            "register-node",
            412,
            UNKNOWN,
            "a site without a key tried to join from 10.9.8.7: its site.yaml must name its key",
        ),
        (
            "activate-node",
            412,
            UNKNOWN,
            rf"unknown key tried to join from 10.9.8.7: if {re.escape(UNKNOWN[0].fingerprint)} .* approve",
        ),
        ("pull-messages", 401, UNKNOWN, "a site with an unknown key tried to join"),
        ("activate-node", 412, APPROVED, "north from 10.9.8.7: Flower counts it as online still"),
        ("pull-messages", 401, APPROVED, "north from 10.9.8.7: .* a clock is wrong"),
        ("pull-messages", 401, None, "without a site's key: a site is started with `fedmed site start`"),
    ],
)
def test_a_refused_site_is_named_with_what_to_do(
    folder: CoordinatorFolder, path: str, status: int, key: tuple[object, bytes] | None, words: str
) -> None:
    told = Lines(folder.path)
    told.refusals.request(Refusal("10.9.8.7", f"/v1/fleet/{path}", status, key[1] if key else b""))
    (line,) = told.lines
    assert line.startswith(superlink.MARK) and re.search(words, line)
    assert "\n" not in line


def test_an_attempt_to_control_is_told_with_a_harmless_path() -> None:
    told = Lines()
    told.refusals.request(Refusal("10.9.8.7", "/v1/control/start-run\n\x1b[31m" + "x" * 500, 403, b""))
    (line,) = told.lines
    assert "10.9.8.7 asked for /v1/control/start-run??[31mxxx" in line and "own machine may control it" in line
    assert len(line) < 250


def test_other_errors_of_the_sites_api_are_flowers_to_log() -> None:
    told = Lines()
    for path, status in (
        ("push-object", 412),
        ("pull-messages", 500),
        ("deactivate-node", 412),
        ("x", 404),
        ("x", 403),
    ):
        told.refusals.request(Refusal("10.9.8.7", f"/v1/fleet/{path}", status, UNKNOWN[1]))
    assert told.lines == []


def test_one_line_a_minute_for_each_caller_and_trouble(folder: CoordinatorFolder) -> None:
    told = Lines(folder.path)

    def attempt(host: str, path: str, key: bytes) -> None:
        told.refusals.request(Refusal(host, path, 401, key))

    for _ in range(5):
        attempt("10.0.0.1", "/v1/fleet/pull-messages", UNKNOWN[1])
        attempt("10.0.0.1", "/v1/fleet/push-messages", UNKNOWN[1])
    assert len(told.lines) == 1
    attempt("10.0.0.2", "/v1/fleet/pull-messages", UNKNOWN[1])
    attempt("10.0.0.1", "/v1/fleet/pull-messages", APPROVED[1])
    assert len(told.lines) == 3
    told.now = superlink.AGAIN_S - 0.1
    attempt("10.0.0.1", "/v1/fleet/pull-messages", UNKNOWN[1])
    assert len(told.lines) == 3
    told.now = superlink.AGAIN_S
    attempt("10.0.0.1", "/v1/fleet/pull-messages", UNKNOWN[1])
    assert len(told.lines) == 4 and told.lines[-1].endswith("(10 more times before)")


def test_a_flood_from_many_addresses_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(superlink, "MOST_CALLERS", 10)
    told = Lines()
    for number in range(100):
        told.refusals.request(Refusal(f"10.0.0.{number}", "/docs", 403, b""))
    assert len(told.refusals._last) == 10


def test_a_damaged_list_of_sites_does_not_silence_the_log(tmp_path: Path) -> None:
    (tmp_path / "sites.json").write_text("{")
    told = Lines(tmp_path)
    told.refusals.request(Refusal("10.0.0.1", "/v1/fleet/activate-node", 412, APPROVED[1]))
    assert "unknown key" in told.lines[0]
    error = ssl.SSLError(1, "x")
    error.reason = "SSLV3_ALERT_BAD_CERTIFICATE"
    told.refusals.handshake("10.0.0.1", error)
    assert "must be one of those in the certificate" in told.lines[1]


# ---------------------------------------------------------------------- TLS


@contextlib.contextmanager
def tls_server(folder: CoordinatorFolder, told: Lines) -> Iterator[int]:
    """A real uvicorn server with the coordinator's certificate, watched; gives its port."""
    config = uvicorn.Config(
        App(), host="127.0.0.1", port=0, loop="asyncio", log_level="error",
        ssl_certfile=str(folder.server_certificate), ssl_keyfile=str(folder.server_key),
    )  # fmt: skip
    server = uvicorn.Server(config)
    undo = watch_handshakes(told.refusals.handshake)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        undo()
        server.should_exit = True
        thread.join(20)


def shake_hands(port: int, ca: Path, name: str) -> None:
    """Connect with TLS, ask for a page, and raise what the client raises."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname=name) as s,
    ):
        s.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert s.recv(100).startswith(b"HTTP/1.1 200")


def speak(port: int, words: bytes) -> None:
    """Connect without TLS and say something."""
    with socket.create_connection(("127.0.0.1", port), 5) as plain:
        plain.settimeout(5)
        with contextlib.suppress(OSError):
            if words:
                plain.sendall(words)
                plain.recv(100)


def wait_for(told: Lines, count: int) -> None:
    """Wait until that many lines have been written; the server hears of some failures after the client."""
    deadline = time.monotonic() + 10
    while len(told.lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(told.lines) == count, told.lines


def test_every_way_to_fail_at_tls_is_one_line_that_says_what_to_do(folder: CoordinatorFolder, tmp_path: Path) -> None:
    told, other = Lines(folder.path), tmp_path / "other.crt"
    other.write_bytes(keys.new_authority("other").public)
    with tls_server(folder, told) as port:
        shake_hands(port, folder.ca_file, "localhost")
        speak(port, b"")  # a port scan or a health check of TCP: no failure
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(port, other, "localhost")
        wait_for(told, 1)
        assert f"127.0.0.1 does not trust this coordinator: give that site {folder.ca_file}" in told.lines[0]
        with pytest.raises(ssl.SSLCertVerificationError):
            shake_hands(port, folder.ca_file, "fl2.example.org")
        wait_for(told, 2)
        assert "the address it uses must be one of fl.example.org, localhost" in told.lines[1]
        speak(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(told, 3)
        assert "127.0.0.1 spoke plain HTTP: this port speaks TLS only" in told.lines[2]
        speak(port, b"EHLO somebody\r\n")
        wait_for(told, 4)
        assert "does not speak TLS 1.2 or newer" in told.lines[3]
        shake_hands(port, folder.ca_file, "localhost")
    assert len(told.lines) == 4


def test_a_certificate_the_client_holds_for_expired(tmp_path: Path) -> None:
    folder = CoordinatorFolder.create(tmp_path / "fl", ["fl.example.org"], days=-1)
    told = Lines(folder.path)
    with tls_server(folder, told) as port:
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            shake_hands(port, folder.ca_file, "localhost")
        wait_for(told, 1)
    assert "holds the server certificate for expired" in told.lines[0] and "renew" in told.lines[0]


def test_an_unheard_of_failure_is_told_in_its_own_word(folder: CoordinatorFolder) -> None:
    told = Lines(folder.path)
    error = ssl.SSLError(1, "x")
    error.reason = "NO_SUCH_THING"
    told.refusals.handshake("10.0.0.1", error)
    assert told.lines == ["refused: 10.0.0.1 could not set up TLS (NO_SUCH_THING)"]
