"""A run as a child process: in a session of its own, never longer alive than this process, its output in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from fedmed.deployment import die_with_parent
from fedmed.deployment.supervise import how_it_ended

REASON_LINES = 5  # of a log, when a run failed
_TAIL_BYTES = 20_000
_KILL_S = 10.0  # for a killed process to be gone


class Child(Protocol):
    """A run under way, as far as whoever waits for it needs to know."""

    def poll(self) -> int | None:
        """Exit code, None while it runs."""

    def interrupt(self) -> None:
        """Ask it to stop, as Ctrl-C does."""

    def kill(self) -> None:
        """End it and all it has started, and wait until it is gone; does nothing when it is."""

    def reason(self) -> str:
        """Why it failed: how it ended and the telling lines of its output."""


class Process:
    """The real thing: a process and the file that has its output."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """SIGINT, which writes a checkpoint; SIGTERM where this process was started with SIGINT ignored, since children inherit that."""
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        self._send(signal.SIGTERM if ignored else signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL to its whole process group."""
        self._send(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # held by the system, as with a dead network drive
            self._process.wait(_KILL_S)

    def reason(self) -> str:
        """How it ended and the telling lines of its output."""
        code = self._process.poll()
        said = (
            [] if code is not None and code < 0 else telling_lines(read_tail(self._log))
        )  # a killed process does not say why
        return "\n".join([f"it {how_it_ended(code)}", *said])

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def start_child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
    """Start a command with `environment` added to that of this process; its output becomes the content of `log`, readable by its owner only.

    The kernel kills it when this process ends, whatever way (Linux). Call it from the main thread: the promise is to the thread.
    """
    wrapper = [sys.executable, "-I", "-S", str(die_with_parent.__file__), str(os.getpid())]
    with _open_log(log) as stream:
        process = subprocess.Popen(
            [*wrapper, *command],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to this process alone, which then ends its children in order
        )
    return Process(process, log)


def _open_log(log: Path) -> IO[bytes]:
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")


def read_tail(path: Path) -> list[str]:
    """The last lines of a file, at most 20 kB of it; none when it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def telling_lines(lines: Sequence[str]) -> list[str]:
    """The lines of a log that say why a run failed: from the last that begins with "error:" on, else the last three; at most five."""
    spoken = [line.rstrip()[:300] for line in lines if line.strip()]
    starts = [i for i, line in enumerate(spoken) if line.startswith(("error:", "internal error:"))]
    return spoken[starts[-1] :][:REASON_LINES] if starts else spoken[-3:]
