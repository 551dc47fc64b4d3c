"""Keeps the programs of one end of a deployment running: restarts what ends, says so, and gives up after a while.

A child that ends is started again after 1, 2, 4 ... 60 seconds, and each time one line says what ended, why, and when it is tried again.
Nothing survives the supervisor: Ctrl-C and SIGTERM end the children first, and `die_with_parent.py` sees to the rest.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from fedmed.engines.signals import handled
from fedmed.errors import UserError

FIRST_DELAY_S = 1.0  # before the first restart; doubled each time
LONGEST_DELAY_S = 60.0
STEADY_S = 120.0  # a child that lived longer than this counts as having worked
GRACE_S = 10.0  # from SIGTERM to SIGKILL
TICK_S = 0.1  # how soon the end of a child is seen
LOG_BYTES = 10_000_000  # of one log file
LOG_FILES = 5  # the current one and four older ones, NAME.1 to NAME.4
TAIL_LINES = 200  # kept for `explain`
GAVE_UP = 3  # exit code: cannot go on

_WRAPPER = Path(__file__).with_name("die_with_parent.py")
_ESCAPES = re.compile(rb"\x1b\[[0-9;]*[A-Za-z]")

Explain = Callable[[str, Sequence[str]], "str | None"]


@dataclass(frozen=True)
class Child:
    """A program to keep running: name for people, command, whole environment, working directory, file for its output.

    `echo`: lines of its output that begin with this are also said. Children may share a log; each line then begins with the name
    of its child.
    """

    name: str
    command: tuple[str, ...]
    env: dict[str, str]
    cwd: Path
    log: Path
    echo: str = ""


def telling_line(name: str, lines: Sequence[str]) -> str | None:
    """Pick the last line of a child's output that looks like an error, else the last one; None when it said nothing."""
    from fedmed.engines.ray_log import telling_lines

    spoken = [line for line in lines if line.strip()]
    found = telling_lines(spoken) or [line.strip() for line in spoken]
    return found[-1][:300] if found else None


def keep_running(
    children: Sequence[Child],
    *,
    say: Callable[[str], None],
    explain: Explain = telling_line,
    give_up_s: float,
    stop: threading.Event | None = None,
) -> int:
    """Start all children and keep them running until somebody ends it; every event is one line through `say`.

    `explain(name, last lines)` may give the reason of an end in better words than the log's own. Returns 0 after Ctrl-C, SIGTERM or `stop`,
    and 3 when one child has not stayed up for `give_up_s` seconds in spite of restarts. No child is alive afterwards. Raises `UserError` when
    a log cannot be written.
    """
    logs = {path: _Log(path) for path in {child.log for child in children}}
    shared = [child.log for child in children]
    workers = [_Worker(c, logs[c.log], f"{c.name}: " if shared.count(c.log) > 1 else "", say) for c in children]
    stop, hurry = stop or threading.Event(), threading.Event()
    try:
        with _polite_signals(stop, hurry):
            try:
                while not stop.wait(TICK_S):
                    if not all(worker.look_after(explain, give_up_s) for worker in workers):
                        return GAVE_UP
                return 0
            finally:
                _end(workers, hurry, say)
    finally:
        for log in logs.values():
            log.close()


@contextlib.contextmanager
def _polite_signals(stop: threading.Event, hurry: threading.Event) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP set `stop`, a second one `hurry`; those that are ignored (nohup, `&`) stay so."""

    def heard(number: int, frame: FrameType | None) -> None:
        (hurry if stop.is_set() else stop).set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with handled(heard, *(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)):
        yield


class _Log:
    """A log file readable by its owner only, which becomes NAME.1, NAME.2 ... when it is full."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise UserError(
                f"cannot write the log {path}: {error.strerror}; choose another place, or free this one"
            ) from error

    def _open(self) -> IO[bytes]:
        return os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")

    def write(self, line: bytes) -> None:
        """Append a line, without colours. A full disk loses lines and stops nobody."""
        text = _ESCAPES.sub(b"", line).rstrip() + b"\n"
        with self._lock, contextlib.suppress(OSError, ValueError):  # ValueError: closed, a grandchild still talks
            if self._file.tell() + len(text) > LOG_BYTES and self._file.tell():
                self._rotate()
            self._file.write(text)
            self._file.flush()

    def note(self, text: str) -> None:
        """Append a line of the supervisor's own, with the time."""
        self.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}".encode())

    def _rotate(self) -> None:
        self._file.close()
        for number in range(LOG_FILES - 1, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path.with_name(f"{self.path.name}.{number - 1}") if number > 1 else self.path
            if newer.exists():
                newer.replace(older)
        self._file = self._open()

    def close(self) -> None:
        """Close the file."""
        with self._lock, contextlib.suppress(OSError):
            self._file.close()


class _Worker:
    """One child and its history: since when it fails, and when it is started next."""

    def __init__(self, child: Child, log: _Log, prefix: str, say: Callable[[str], None]) -> None:
        self.child, self.log, self._prefix, self._say = child, log, prefix.encode(), say
        self.process: subprocess.Popen[bytes] | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reader: threading.Thread | None = None
        self._started = self._start_at = 0.0
        self._delay = FIRST_DELAY_S
        self._failing_since: float | None = None

    def look_after(self, explain: Explain, give_up_s: float) -> bool:
        """Start the child if it is time, see whether it has ended; False when it is to be given up."""
        if self.process is None:
            if time.monotonic() < self._start_at:
                return True
            self._start()
        if self.process is not None and self.process.poll() is None:
            return True
        return self._ended(explain, give_up_s)

    def _start(self) -> None:
        self._started = time.monotonic()
        self._tail.clear()
        command = [sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), *self.child.command]
        try:
            self.process = subprocess.Popen(
                command,
                env=self.child.env,
                cwd=self.child.cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._tail.append(f"cannot be started in {self.child.cwd}: {error.strerror}")
            return
        self.log.note(f"{self.child.name} started as process {self.process.pid}")
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        """Pass the child's output on; a child whose pipe is full would stand still."""
        with stream:
            for line in iter(lambda: stream.readline(65536), b""):
                text = _ESCAPES.sub(b"", line).decode("utf-8", errors="replace").rstrip()
                self._tail.append(text)
                self.log.write(self._prefix + line)
                if self.child.echo and text.startswith(self.child.echo):
                    self._say(text)

    def _ended(self, explain: Explain, give_up_s: float) -> bool:
        now, code = time.monotonic(), self.reap()
        if self._failing_since is None or now - self._started > STEADY_S:
            self._failing_since, self._delay = now, FIRST_DELAY_S
        what = f"{self.child.name} {how_it_ended(code)}"
        if code is None or code >= 0:  # what a killed process said last is not why it ended
            lines = list(self._tail)
            what += f": {explain(self.child.name, lines) or telling_line(self.child.name, lines) or 'it said nothing'}"
        left = self._failing_since + give_up_s - now
        if left <= 0:
            what += f"; given up after {max(now - self._failing_since, 0):.0f} s of failures, see {self.child.log}"
        else:
            wait = min(self._delay, left)
            self._start_at, self._delay = now + wait, min(2 * self._delay, LONGEST_DELAY_S)
            what += f"; starting it again in {wait:.3g} s"
        self.log.note(what)
        self._say(what)
        return left > 0

    def reap(self) -> int | None:
        """Forget an ended child and end what it left in its process group; gives its exit code, None if it never ran."""
        if self.process is None:
            return None
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # held by the system, as with a dead network drive
            self.process.wait(GRACE_S)
        code = self.process.poll()
        if self._reader is not None:
            self._reader.join(1.0)  # for its last words
        self.process = self._reader = None
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and all it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)


def how_it_ended(code: int | None) -> str:
    """Say in words how a process ended, from its exit code; None: it never ran."""
    if code is None:
        return "could not be started"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL, often by the system for lack of memory)"
    if code < 0:
        return f"was killed ({signal.strsignal(-code) or f'signal {-code}'})"
    return f"ended with exit code {code}"


def _end(workers: Sequence[_Worker], hurry: threading.Event, say: Callable[[str], None]) -> None:
    """End all children: SIGTERM, then SIGKILL after `GRACE_S` or as soon as `hurry` is set."""
    for worker in workers:
        worker.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and not hurry.is_set():
        if all(worker.process is None or worker.process.poll() is not None for worker in workers):
            break
        time.sleep(TICK_S / 2)
    for worker in workers:
        if worker.process is not None:
            if worker.process.poll() is None:
                say(f"{worker.child.name} did not end within {GRACE_S:g} s and is killed")
            worker.reap()
            worker.log.note(f"{worker.child.name} stopped")
