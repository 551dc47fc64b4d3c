"""One simulation under a private SuperLink: start it, hand the run in, follow it, end everything.

Every wait has a deadline.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from fedmed.engines import processes
from fedmed.engines.bundle import write_private
from fedmed.engines.flower_internals import RunState, connection_toml, free_port, superlink_command
from fedmed.engines.flwr_commands import FlwrCommands
from fedmed.engines.ray_log import ConsoleFilter, clean, telling_lines
from fedmed.engines.signals import handled, leave
from fedmed.errors import FedMedError

START_LIMIT_S = 90.0  # a SuperLink needs about 2 s; slow network file systems take long to import
PENDING_LIMIT_S = 120.0  # from handing a run in to its start
SILENCE_S = 30.0  # without a line of output, after which the status is asked for (each question costs a Python start)
TICK_S = 0.5  # how soon a dead SuperLink or a passed deadline is seen
GUARD_LIMIT_S = 30.0  # for the guard to see that nothing is left
ATTEMPTS = 3  # at a free port; of log streams that break off
TAIL_LINES = 2000  # kept in memory for the error message


class Session:
    """A private SuperLink and the one run on it.

    `home`: private folder, removed at the end; `env`: environment of all processes; `log_path`: file that gets every
    line; `on_line`: callback for the lines that are not noise; `timeout_s`: seconds from now until the run is given up.
    Use it as a context manager: leaving it, in whatever way, ends every process of the run.
    """

    def __init__(
        self, home: Path, env: dict[str, str], log_path: Path, on_line: Callable[[str], None] | None, timeout_s: float
    ) -> None:
        self.home, self.env, self.log_path, self.on_line = home, env, log_path, on_line
        self.timeout_s, self.deadline = timeout_s, time.monotonic() + timeout_s
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.work = home / "work"  # empty: Ray's clients import from the working directory before anything else
        self._superlink: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._log: IO[str] | None = None
        self._filter = ConsoleFilter()
        self._flwr = FlwrCommands(
            self.work, env, note=self._file, time_left=lambda: self.deadline - time.monotonic(), log=log_path
        )
        self._stop_signals = handled(leave, signal.SIGTERM)

    def __enter__(self) -> Session:
        self._stop_signals.__enter__()
        try:
            self.work.mkdir()
            self._guard = processes.start_guard(self.home)
            self._log = self.log_path.open("a", encoding="utf-8")  # a resumed run adds to it
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """End and remove everything. A second Ctrl-C must not leave half of it running, so none is heard meanwhile."""
        with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            left = processes.terminate(self.home)
            if self._superlink is not None:
                self._superlink.poll()
            if self._log is not None:
                self._log.close()
            processes.remove(self.home)
            if self._guard is not None and self._guard.stdin is not None:
                self._guard.stdin.close()  # it finds nothing left to do
                self._guard.wait(GUARD_LIMIT_S)
        self._stop_signals.__exit__(None, None, None)
        if left and self.on_line is not None:
            self.on_line(f"processes that would not end: {sorted(left)}")

    def _check_alive(self) -> None:
        """Raise `FedMedError` when the time is over or the SuperLink is gone."""
        if time.monotonic() > self.deadline:
            raise FedMedError(f"the ray run was given up after {self.timeout_s:g} s; see {self.log_path}")
        if self._superlink is not None and self._superlink.poll() is not None:
            raise FedMedError(f"Flower's SuperLink ended in the middle of the run: {self._superlink_words()}")

    def _file(self, line: str) -> None:
        if self._log is not None:
            self._log.write(f"{line}\n")
            self._log.flush()

    def _note(self, line: str) -> None:
        line = clean(line)
        self.tail.append(line)
        self._file(line)
        if self.on_line is not None and self._filter.shows(line):
            self.on_line(line)

    def start(self) -> None:
        """Start the SuperLink and wait until it answers.

        Raises `FedMedError` when it does not, after a second and third port.
        """
        for _ in range(ATTEMPTS):
            port = free_port()
            with (self.home / "superlink.log").open("wb") as log:
                self._superlink = subprocess.Popen(
                    superlink_command(port),
                    cwd=self.work,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            if self._wait_healthy(port):
                write_private(self.home / "config.toml", connection_toml(port))
                return
        raise FedMedError(f"Flower's SuperLink did not start: {self._superlink_words()}")

    def _wait_healthy(self, port: int) -> bool:
        """Wait for the SuperLink's health page; False when the process has ended (its port was taken, for one)."""
        limit = min(time.monotonic() + START_LIMIT_S, self.deadline)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine itself
        while self._superlink is not None and self._superlink.poll() is None:
            try:
                with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
                    return self._superlink.poll() is None
            except (urllib.error.URLError, OSError):
                pass
            if time.monotonic() > limit:
                words = self._superlink_words()
                raise FedMedError(f"Flower's SuperLink gave no sign of life within {START_LIMIT_S:g} s: {words}")
            time.sleep(0.05)
        return False

    def _superlink_words(self) -> str:
        try:
            lines = (self.home / "superlink.log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return " | ".join(telling_lines(lines) or [clean(line) for line in lines[-3:]]) or "it said nothing"

    def submit(self, app: Path, run_config: Path, federation: str) -> str:
        """Hand the run in and give its id. Raises `FedMedError` with Flower's words when it is refused."""
        return self._flwr.submit(app, run_config, federation)

    def follow(self, run_id: str) -> RunState:
        """Follow the run to its end and give its final state.

        Raises `FedMedError` when the deadline passes, the run does not begin or the SuperLink dies.
        """
        lines: queue.Queue[str | None] = queue.Queue()
        self._flwr.stream(run_id, lines, 0)
        begun = time.monotonic()
        ask_at, received, broken = begun + SILENCE_S, 0, 0
        while True:
            self._check_alive()
            item: str | None = ""
            try:
                item = lines.get(timeout=TICK_S)
            except queue.Empty:
                if time.monotonic() < ask_at:
                    continue
            if item:
                self._note(item)
                received, ask_at = received + 1, time.monotonic() + SILENCE_S
                continue
            state = self._patient_state(run_id)  # the stream has ended, or nothing has come for long
            if state.finished:
                self._drain(lines)
                return state
            if state.status in ("pending", "starting") and time.monotonic() - begun > PENDING_LIMIT_S:
                words = self._superlink_words()
                raise FedMedError(f"the run was still {state.status} after {PENDING_LIMIT_S:g} s: {words}")
            ask_at = time.monotonic() + SILENCE_S
            if item is None:
                broken += 1
                if broken < ATTEMPTS:
                    self._flwr.stream(run_id, lines, received)

    def _patient_state(self, run_id: str) -> RunState:
        """Ask for the state, three times if need be: a run that trains is not given up for one unanswered question."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self._flwr.state(run_id)
            except FedMedError:
                self._check_alive()
                time.sleep(TICK_S)
        return self._flwr.state(run_id)

    def _drain(self, lines: queue.Queue[str | None]) -> None:
        while not lines.empty():
            line = lines.get_nowait()
            if line is not None:
                self._note(line)
