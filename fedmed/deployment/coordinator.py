"""What a coordinator does with its folder: keep the SuperLink running, approve and revoke sites, see how things stand."""

from __future__ import annotations

import datetime as dt
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedmed.config import nearest
from fedmed.deployment import keys, superlink, supervise
from fedmed.deployment.coordinator_folder import ApprovedSite, CoordinatorFolder
from fedmed.deployment.only_one import holder, only_one
from fedmed.deployment.probe import probe
from fedmed.deployment.site_config import LONGEST_NAME
from fedmed.engines.flower_internals import CONNECTION, last_json_object
from fedmed.engines.flwr_commands import FlwrCommands
from fedmed.engines.ray_log import clean
from fedmed.errors import FedMedError, UserError

# --bind -> what the SuperLink listens on; it must be loopback too, whence the coordinator controls it.
BINDS = {"0.0.0.0": "0.0.0.0", "127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", "::": ""}
GIVE_UP_S = 900.0  # without a SuperLink that stays up
UP_LIMIT_S = 90.0  # for the SuperLink to answer, before somebody is told that it does not; it needs about 3 s
LOCK_WAIT_S = 1.0  # somebody who only looks at the lock holds it for a moment
RENEW_DAYS = 30  # left, from which on a new certificate is asked for


# ---------------------------------------------------------------------- running


def start(path: str | Path, bind: str = "0.0.0.0", *, say: Callable[[str], None]) -> int:
    """Keep the SuperLink of a coordinator's folder running until Ctrl-C or SIGTERM; gives the exit code.

    Every event is one line through `say`. Raises `UserError` for a folder that does not pass its checks, a coordinator
    that runs already, and a port that is taken.
    """
    folder = CoordinatorFolder.open(path)
    if bind not in BINDS:
        raise UserError(
            f"--bind: expected 0.0.0.0 (all addresses), :: (those of IPv6 too) or 127.0.0.1 (this machine only), got {bind!r}; "
            "who may connect is a matter of the firewall"
        )
    with _lock(folder):
        _check_free(BINDS[bind], folder.port)
        left = keys.days_left(folder.certificate())
        if left < RENEW_DAYS:
            say(
                f"the server certificate ends in {left:.0f} days: `fedmed coordinator renew {folder.path}`, then restart"
            )
        say(f"starting the coordinator of {folder.path} on port {folder.port}; log: {folder.log_file}")
        stop = threading.Event()
        threading.Thread(target=_announce, args=(folder, say, stop), daemon=True).start()
        try:
            child = superlink_child(folder, bind)
            return supervise.keep_running([child], say=say, explain=_explain, give_up_s=GIVE_UP_S, stop=stop)
        finally:
            stop.set()


def superlink_child(folder: CoordinatorFolder, bind: str) -> supervise.Child:
    """The SuperLink as a program to keep running; state on disk, so that runs survive its restart."""
    options = {
        "--host": BINDS[bind], "--port": str(folder.port), "--database": str(folder.database),
        "--ssl-ca-certfile": str(folder.ca_file), "--ssl-certfile": str(folder.server_certificate),
        "--ssl-keyfile": str(folder.server_key), "--isolation": "process",
        "--superexec-auth-secret-file": str(folder.secret_file),
    }  # fmt: skip
    words = [word for option in options.items() for word in option]
    return supervise.Child(
        name="SuperLink",
        command=(sys.executable, "-m", "fedmed.deployment.superlink", *words, "--enable-supernode-auth"),
        env=folder.environment() | {superlink.FOLDER: str(folder.path)},
        cwd=folder.flower_home,
        log=folder.log_file,
        echo=superlink.MARK,
    )


def _announce(folder: CoordinatorFolder, say: Callable[[str], None], stop: threading.Event) -> None:
    """Say once when the SuperLink answers, or that it does not."""
    deadline = time.monotonic() + UP_LIMIT_S
    while not stop.wait(0.3):
        reason = problem(folder, timeout_s=2.0)
        if reason is None:
            names = ", ".join(folder.sites()) or "none"
            say(f"up; sites reach it at {' or '.join(folder.public_addresses)}; approved: {names}; Ctrl-C stops it")
            return
        if time.monotonic() > deadline:
            say(f"no answer from the SuperLink after {UP_LIMIT_S:g} s: {reason}; see {folder.log_file}")
            return


def _explain(name: str, lines: Sequence[str]) -> str | None:
    if any("address already in use" in line for line in lines):
        return "its port is taken by another program; stop that one"
    return None


def _check_free(host: str, port: int) -> None:
    """Raise `UserError` when the port cannot be had; the SuperLink's own words for it are lost in its log."""
    try:
        with socket.socket(socket.AF_INET6 if host == "" else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be used: {error.strerror}; stop the program that holds it, or choose another port with "
            "`fedmed coordinator renew DIR --port N` (and in every site.yaml)"
        ) from error


def _lock(folder: CoordinatorFolder) -> AbstractContextManager[None]:
    """Be the one coordinator of a folder. Raises `UserError` when there is one."""

    def refusal(pid: str) -> UserError:
        return UserError(
            f"the coordinator of {folder.path} runs already, as process {pid}; "
            "`fedmed coordinator status` says how it is, Ctrl-C or SIGTERM there stops it"
        )

    return only_one(folder.lock_file, refusal, LOCK_WAIT_S)


def running_pid(folder: CoordinatorFolder) -> str | None:
    """Process id of the coordinator that runs in the folder; None when none does."""
    return holder(folder.lock_file)


def problem(folder: CoordinatorFolder, timeout_s: float = 3.0) -> str | None:
    """Why the SuperLink gives no answer on this machine, and what to do; None when it does."""
    finding = probe("127.0.0.1", folder.port, folder.ca_file, timeout_s)
    return None if finding.ok else finding.text


# ---------------------------------------------------------------------- sites


def check_name(name: str) -> str:
    """Check the name of a site: the rule of site.yaml. Raises `UserError`."""
    if not name.isprintable() or name != name.strip() or not 0 < len(name) <= LONGEST_NAME:
        raise UserError(
            f"--name: expected one line of 1 to {LONGEST_NAME} characters without blanks around it, got {name!r}"
        )
    return name


def approve(folder: CoordinatorFolder, public_key: Path, name: str) -> ApprovedSite:
    """Let the site with this public key join under a name. Raises `UserError`, and `FedMedError` when the SuperLink is down."""
    key, name = keys.read_public_key(public_key), check_name(name)
    with folder.changed_sites() as sites:
        holder = next((other for other, site in sites.items() if site.fingerprint == key.fingerprint), None)
        if holder not in (None, name):
            raise UserError(f"this key is approved already, as {holder!r}; every site has a key pair of its own")
        if name in sites and holder is None:
            raise UserError(
                f"{name!r} is approved already with another key ({sites[name].fingerprint}); choose another name, or "
                f"take that key's right away first: fedmed coordinator revoke --name {name!r}"
            )
        if name in sites and sites[name].node_id in nodes(folder):
            raise UserError(f"{name!r} is approved already with this key, since {sites[name].since}")
        answer = _flwr(folder, "register", str(public_key.resolve()), CONNECTION, f"--name={name}")
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        sites[name] = ApprovedSite(int(answer["node-id"]), key.fingerprint, now, key.line)
        return sites[name]


def revoke(folder: CoordinatorFolder, name: str) -> ApprovedSite:
    """Take a site's right to join away, for good: its key cannot be approved again. Raises as `approve` does."""
    with folder.changed_sites() as sites:
        if name not in sites:
            raise UserError(f"no approved site is called {name!r}{nearest(name, sites)}")
        if sites[name].node_id in nodes(folder):
            _flwr(folder, "unregister", str(sites[name].node_id), CONNECTION)
        return sites.pop(name)


def nodes(folder: CoordinatorFolder) -> dict[int, dict[str, Any]]:
    """What Flower knows of the registered sites, by node id. Raises `FedMedError` when the SuperLink is down."""
    listed = _flwr(folder, "ls", CONNECTION).get("nodes", [])
    return {int(node["node-id"]): node for node in listed if node.get("status") != "unregistered"}


def _flwr(folder: CoordinatorFolder, *words: str) -> dict[str, Any]:
    """Call `flwr supernode` and give its answer; raises `FedMedError` when there is none, or it is no."""
    reason = problem(folder)
    if reason is not None:
        raise FedMedError(f"the coordinator must be running for this: {reason}")
    commands = FlwrCommands(folder.flower_home, folder.environment(), log=folder.log_file)
    output = commands.call("supernode", *words, "--format", "json")
    try:
        answer = last_json_object(output)
    except ValueError:
        answer = {"error-message": clean(output) or "no answer"}
    if not answer.get("success"):
        text = " ".join(str(answer.get("error-message", answer)).split())[-300:]
        if "already in use" in text:
            raise UserError(
                "Flower knows this key already: it was revoked, or an approval broke off. A key is approved once: let the "
                "site make a new pair (`fedmed site keygen`) and send its public half"
            )
        raise FedMedError(f"Flower refused `supernode {words[0]}`: {text}")
    return answer
