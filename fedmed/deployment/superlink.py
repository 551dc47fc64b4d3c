"""Flower's SuperLink as the coordinator runs it: `python -m fedmed.deployment.superlink ARGUMENTS OF flower-superlink`.

In front of it stands the wall (`flower_tasks.Wall`). What the wall, the sites' API or TLS refuse is logged in one line that says who
tried, what is wrong, and what to do; a caller that keeps trying is named once a minute. The environment variable FEDMED_COORDINATOR names
the coordinator's folder, from which the names of approved keys are read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmed.deployment.coordinator_folder import read_sites
from fedmed.engines.flower_tasks import Refusal, run_superlink_behind_wall
from fedmed.errors import UserError

FOLDER = "FEDMED_COORDINATOR"  # environment variable: the coordinator's folder
MARK = "refused: "  # begins every line of this module
AGAIN_S = 60.0  # after which the same caller is named again
MOST_CALLERS = 1000  # remembered at once: a flood from many addresses costs no memory

# What OpenSSL calls the failure of a handshake (the first entry with a word in it counts) -> what is wrong and what to do; {ca}: file that
# sites need, {hosts}: names in the server certificate.
_TLS_REASONS = (
    (
        ("HTTP_REQUEST",),
        "spoke plain HTTP: this port speaks TLS only, so a site must be given {ca} and nothing like --insecure",
    ),
    (
        ("UNKNOWN_CA",),
        "does not trust this coordinator: give that site {ca} (compare the fingerprint with `fedmed coordinator status`)",
    ),
    (
        ("CERTIFICATE_EXPIRED",),
        "holds the server certificate for expired: see `fedmed coordinator status`; either `fedmed coordinator renew`, "
        "or that machine's clock is wrong",
    ),
    (
        ("BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN"),
        "rejects the server certificate: the address it uses must be one of {hosts} (add others with "
        "`fedmed coordinator renew --host ...`), and its ca.crt be {ca}",
    ),
    (
        ("WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL", "PACKET_LENGTH", "UNEXPECTED_MESSAGE", "BAD_RECORD"),
        "does not speak TLS 1.2 or newer: a site is started with `fedmed site start`; nothing else belongs on this port",
    ),
)


class Refusals:
    """Puts refused attempts into words, and passes on each kind from each caller once in `AGAIN_S` seconds."""

    def __init__(self, write: Callable[[str], None], folder: Path | None, clock: Callable[[], float] = time.monotonic):
        self._write, self._folder, self._clock = write, folder, clock
        self._last: dict[tuple[str, str], tuple[float, int]] = {}  # caller, kind -> when it was written, times since

    def request(self, refusal: Refusal) -> None:
        """Take a request that the wall or the sites' API refused; other errors of that API are Flower's to log."""
        host, last = refusal.host, refusal.path.rsplit("/", 1)[-1]
        if refusal.status == 403 and not refusal.path.startswith("/v1/fleet/"):
            path = _printable(refusal.path)
            self._say(host, "control", f"{host} asked for {path}: only the coordinator's own machine may control it")
        elif refusal.status == 412 and last == "register-node":
            self._say(
                host, "no key",
                f"a site without a key tried to join from {host}: its site.yaml must name its key, and the public half be approved",
            )  # fmt: skip
        elif refusal.status == 401 or (refusal.status == 412 and last == "activate-node"):
            self._say(host, *self._about_key(refusal))

    def handshake(self, host: str, error: ssl.SSLError) -> None:
        """Take a connection that ended before TLS was set up."""
        code = str(error.reason or error)
        found = next((text for words, text in _TLS_REASONS if any(word in code for word in words)), "")
        text = (
            found.format(ca=self._ca(), hosts=self._hosts()) if found else f"could not set up TLS ({_printable(code)})"
        )
        self._say(host, found or code, f"{host} {text}")

    def _about_key(self, refusal: Refusal) -> tuple[str, str]:
        """Kind and text for a request whose key or signature was not accepted."""
        host, (fingerprint, name) = refusal.host, self._who(refusal.key)
        if fingerprint is None:
            path = _printable(refusal.path)
            return "no key", f"{host} asked for {path} without a site's key: a site is started with `fedmed site start`"
        if name is None:
            return fingerprint, (
                f"a site with an unknown key tried to join from {host}: if {fingerprint} is what the site reads on its side, approve its "
                "public key (`fedmed coordinator approve site.pub --name NAME`); after a revocation it needs a new pair"
            )
        if refusal.status == 401:
            return f"{name} 401", (
                f"{name} from {host}: its request was not signed as it should be; most often a clock is wrong by more than five minutes, "
                "so set that of both machines"
            )
        return f"{name} 412", (
            f"{name} from {host}: Flower counts it as online still, and lets it in by itself a minute after its last sign of life; should "
            "it not, the database was lost: approve its public key again"
        )

    def _who(self, key: bytes) -> tuple[str | None, str | None]:
        """Fingerprint of a key, and the name it was approved under; None for what is not known."""
        from fedmed.deployment.keys import fingerprint_of_pem

        fingerprint, sites = fingerprint_of_pem(key), {}
        if self._folder is not None:
            with contextlib.suppress(UserError):
                sites = read_sites(self._folder)
        return fingerprint, next((name for name, site in sites.items() if site.fingerprint == fingerprint), None)

    def _ca(self) -> str:
        return "this coordinator's ca.crt" if self._folder is None else str(self._folder / "ca.crt")

    def _hosts(self) -> str:
        from fedmed.deployment.keys import hosts_of, read_certificate

        if self._folder is not None:
            with contextlib.suppress(UserError):
                return ", ".join(hosts_of(read_certificate(self._folder / "tls" / "server.crt")))
        return "those in the certificate"

    def _say(self, host: str, kind: str, text: str) -> None:
        now = self._clock()
        when, since = self._last.get((host, kind), (-AGAIN_S, 0))
        if now - when < AGAIN_S:
            self._last[host, kind] = (when, since + 1)
            return
        self._last.pop((host, kind), None)  # to the end of the queue
        if len(self._last) >= MOST_CALLERS:
            self._last.pop(next(iter(self._last)))
        self._last[host, kind] = (now, 0)
        self._write(f"{MARK}{text}{f' ({since} more times before)' if since else ''}")


def _printable(path: str) -> str:
    """A path that a caller made up, fit for a log: at most 80 plain characters."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in path[:80])


def watch_handshakes(told: Callable[[str, ssl.SSLError], None]) -> Callable[[], None]:
    """Call `told(address, error)` for every TLS handshake that fails on asyncio's own event loops; gives what undoes it.

    asyncio passes these errors to nobody: hence its private method is replaced. Should it be gone one day, the lines are missing and nothing
    else. A connection that just ends (a port scan, a health check) is no failure.
    """
    original = SSLProtocol._fatal_error

    def watched(self: Any, exc: BaseException, message: str = "Fatal error on transport") -> None:
        if isinstance(exc, ssl.SSLError) and "handshake" in message:
            transport = getattr(self, "_transport", None)
            peer = transport.get_extra_info("peername") if transport is not None else None
            told(str(peer[0]) if peer else "unknown", exc)
        original(self, exc, message)

    SSLProtocol._fatal_error = watched  # type: ignore[method-assign]

    def undo() -> None:
        SSLProtocol._fatal_error = original  # type: ignore[method-assign]

    return undo


def main() -> None:
    """Run the SuperLink with this process's arguments; files it makes are its owner's only."""
    import uvicorn

    os.umask(0o077)
    folder = os.environ.get(FOLDER)
    refusals = Refusals(functools.partial(print, flush=True), Path(folder) if folder else None)
    watch_handshakes(refusals.handshake)
    uvicorn.run = functools.partial(uvicorn.run, loop="asyncio")  # uvloop, its choice when installed, cannot be watched
    run_superlink_behind_wall(refusals.request)


if __name__ == "__main__":
    main()
