"""`fedmed site start` and `status`: a SuperNode and an executor kept running, every event one line, every failure with its reason.

    STATE/flower/          Flower's own settings and work folder
    STATE/secret           shared by the two processes; made anew at each start
    STATE/logs/site.log    everything they say (unless `log` names another file)
    STATE/status.json      the last event, for `fedmed site status`
    STATE/lock             held while the site runs
    STATE/<experiment>-<hash>/    what a run leaves at the site

All of it is the owner's only.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedmed.deployment import keys, supervise
from fedmed.deployment.only_one import holder, only_one
from fedmed.deployment.probe import probe
from fedmed.deployment.site_config import SiteConfig, read_site_config
from fedmed.deployment.site_log import BACK, CONNECTED, LOST, MARK
from fedmed.engines.flower_internals import free_port
from fedmed.engines.ray import environment
from fedmed.errors import FedMedError, UserError
from fedmed.files import json_ready, read_json, write_json

GIVE_UP_S = (
    60.0  # without connection, after which a SuperNode ends and its end is explained; less than supervise.STEADY_S
)
LOCK_WAIT_S = 1.0  # somebody who only looks at the lock holds it for a moment
CHECK_LIMIT_S = 600.0  # for reading the data file once
SUPERNODE, EXECUTOR = "supernode", "executor"
NOT_RUNNING = 3  # exit code of `status`
_LEFT_OUT = ("RAY_TMPDIR", "SSLKEYLOGFILE")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # some of MONAI's networks would fetch their weights


def start(path: str | Path, say: Callable[[str], None]) -> int:
    """Run a site until Ctrl-C or SIGTERM; gives the exit code. `say` gets one line per event.

    Raises `UserError` for what makes starting pointless: site.yaml, data, key, certificate, state folder, a site that runs already.
    """
    config = read_site_config(path)
    make_state_folder(config.state)
    with lock(config):
        (config.state / "status.json").unlink(missing_ok=True)  # of a site that was killed
        check_first(path, config)
        narrator = Narrator(config, say)
        narrator(f"site {config.name!r} starts; log: {config.log_file}")
        found = probe(config.host, config.port, config.ca)
        if not found.ok:
            narrator(f"warning: {found.text}")
        try:
            code = supervise.keep_running(
                children(config, Path(path).resolve(), free_port()),
                say=narrator,
                explain=narrator.explain,
                give_up_s=config.reconnect_hours * 3600,
            )
            narrator(f"site {config.name!r} has ended")
            return code
        finally:
            (config.state / "secret").unlink(missing_ok=True)
            (config.state / "status.json").unlink(missing_ok=True)


def make_state_folder(path: Path) -> None:
    """Make the state folder with mode 0700 if it is not there, and refuse one that others may look into. Raises `UserError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / "flower").mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the state folder {path}: {error.strerror}") from error
    keys.check_private(path, "the state folder")


def check_first(path: str | Path, config: SiteConfig) -> None:
    """Check what a start needs, in a process of its own: what reads the data needs much memory. Raises `UserError`."""
    command = [sys.executable, "-P", "-m", "fedmed.deployment.site_check", str(path)]
    try:
        done = subprocess.run(
            command,
            env=child_environment(config.state / "flower"),
            capture_output=True,
            text=True,
            timeout=CHECK_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise FedMedError(
            f"the data file could not be read within {CHECK_LIMIT_S:g} s; is its disk all right?"
        ) from error
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    if problems:
        raise UserError("the site cannot start:\n  " + "\n  ".join(problems))
    if done.returncode:
        raise FedMedError(f"the check before the start failed: {supervise.telling_line('', done.stderr.splitlines())}")


def child_environment(home: Path) -> dict[str, str]:
    """The environment of the site's processes: Flower quiet and at home in `home`, nothing fetched, this machine without a proxy."""
    env = {name: value for name, value in environment(home, threads=1).items() if name not in _LEFT_OUT}
    direct = ",".join(filter(None, [env.get("NO_PROXY") or env.get("no_proxy"), "127.0.0.1", "localhost"]))
    return env | _OFFLINE | {"NO_PROXY": direct, "no_proxy": direct}


def children(config: SiteConfig, path: Path, port: int) -> list[supervise.Child]:
    """The two processes of a site. They share a secret, which only they can read and which no command line shows."""
    home = config.state / "flower"
    secret = keys.write_secret(config.state / "secret", secrets.token_hex(32).encode())
    env = child_environment(home)

    def child(name: str, *words: object) -> supervise.Child:
        command = (sys.executable, "-P", "-m", f"fedmed.deployment.{name}", *map(str, words))
        return supervise.Child(name, command, env, home, config.log_file, echo=MARK)

    return [
        child(
            SUPERNODE, "--superlink", config.coordinator, "--root-certificates", config.ca,
            "--auth-supernode-private-key", config.key, "--isolation", "process", "--superexec-auth-secret-file", secret,
            "--host", "127.0.0.1", "--port", port, "--max-wait-time", f"{GIVE_UP_S:g}",
        ),
        child(EXECUTOR, path, "--port", port, "--secret", secret),
    ]  # fmt: skip


# ---------------------------------------------------------------------- what is said


class Narrator:
    """Takes the lines of the supervisor and its children: says them, keeps the last for `status`, and asks why a connection failed."""

    def __init__(self, config: SiteConfig, say: Callable[[str], None]) -> None:
        self.config, self._say, self._lock = config, say, threading.Lock()
        self._connected = False
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")

    def __call__(self, line: str) -> None:
        """Take a line."""
        text = line.removeprefix(MARK)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        time_of, text = (text[:19], text[20:]) if line.startswith(MARK) else (now, text)
        with self._lock:
            if text in (CONNECTED, BACK):
                self._connected = True
            elif text == LOST or text.startswith(f"{SUPERNODE} "):
                self._connected = False
            status = {"since": self._since, "connected": self._connected, "event": text, "at": time_of}
            with contextlib.suppress(OSError):  # a full disk stops nobody
                write_json(self.config.state / "status.json", json_ready(status))
            self._say(f"{time_of} {text}")
        if text == LOST:
            threading.Thread(target=self._why, daemon=True).start()

    def _why(self) -> None:
        found = probe(self.config.host, self.config.port, self.config.ca)
        text = f"{found.text} to this check, so the connection may be back soon" if found.ok else found.text
        with contextlib.suppress(OSError), self.config.log_file.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self(text)

    def explain(self, name: str, lines: Sequence[str]) -> str | None:
        """Why a child has ended, from its last lines and, for a SuperNode, from a look at the coordinator."""
        own = [line.removeprefix(MARK)[20:] for line in lines if line.startswith(MARK) and " ERROR: " in line]
        if name != SUPERNODE:
            return own[-1].removeprefix("ERROR: ") if own else None
        said = "\n".join(lines)
        if "address already in use" in said:
            return "its port on this machine was taken by another program; stop the site and start it again"
        found = probe(self.config.host, self.config.port, self.config.ca)
        if not found.ok:
            return found.text
        if "[code: 2004]" in said or "Failed to activate" in said:
            return self._not_approved()
        return None

    def _not_approved(self) -> str:
        try:
            fingerprint = keys.read_site_key(self.config.key).fingerprint
        except UserError as error:
            return str(error)
        return (
            f"the coordinator does not let this site's key in ({fingerprint}); after a crash or a cut connection that passes within two "
            "minutes, else the key is in use elsewhere, was revoked, or was never approved: send the public key (.pub) to the coordinator, "
            "who runs `fedmed coordinator approve`"
        )


# ---------------------------------------------------------------------- one site at a time, and how it is


def lock(config: SiteConfig) -> AbstractContextManager[None]:
    """Be the one process that runs a site's state folder. Raises `UserError` when there is one."""

    def refusal(pid: str) -> UserError:
        return UserError(
            f"a site runs already with the state folder {config.state}; stop it first, or give this one another `state`"
        )

    return only_one(config.state / "lock", refusal, LOCK_WAIT_S)


def is_running(config: SiteConfig) -> bool:
    """Whether `fedmed site start` runs with this state folder."""
    try:
        return holder(config.state / "lock") is not None
    except OSError:
        return False


def status(config: SiteConfig) -> tuple[bool, str]:
    """Whether the site runs and is connected, and one line about it."""
    if not is_running(config):
        return False, f"site {config.name!r} is not running; start it with `fedmed site start`"
    try:
        found: dict[str, Any] = read_json(config.state / "status.json")
    except UserError:
        return False, f"site {config.name!r} is starting"
    state = "connected" if found["connected"] else "not connected"
    return bool(found["connected"]), (
        f"site {config.name!r} runs since {found['since']}, {state} to {config.coordinator}; last, {found['at']}: {found['event']}"
    )
