"""Which processes a run has started, and how they are ended. Standard library only; no root, no third-party package.

Flower detaches its daemons and Ray re-parents its own, so a process id or a parent tells too little. Every process of a
run inherits one environment variable that no other process has (`FLWR_HOME` of the run's private folder): that mark,
together with the process groups and the descendants of the marked ones, says what belongs to the run. Nothing else is
ever signalled.

Run as a script (`python processes.py FOLDER`) this file is the *guard*: it waits until its standard input closes, which
the kernel does when the parent ends in whatever way, SIGKILL included, and then ends what is left of the run and
removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TERM_GRACE_S = 5.0  # from SIGTERM to SIGKILL
KILL_GRACE_S = 5.0  # how long a killed process may take to go
POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """One running process: ids, and whether its environment carries the mark."""

    pid: int
    parent: int
    group: int
    marked: bool


def mark_of(folder: Path) -> str:
    """Give the environment entry (`KEY=value`) that marks the processes of the run kept in `folder`."""
    return f"FLWR_HOME={folder}"


def _linux_table(mark: bytes) -> list[Process]:
    """Read /proc. Processes of other users count as unmarked; zombies and those that end meanwhile are left out."""
    table = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        folder = Path(entry.path)
        try:
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            state, parent, group = text.rpartition(")")[2].split()[:3]  # the name before ')' may hold anything
        except OSError:
            continue
        if state in "ZX":
            continue
        try:
            marked = mark in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            marked = False
        table.append(Process(int(entry.name), int(parent), int(group), marked))
    return table


def _ps_table(mark: str) -> list[Process]:
    """Ask `ps` (macOS): after the command it prints the environment, for the caller's own processes."""
    command = ["ps", "-A", "-E", "-ww", "-o", "pid=,ppid=,pgid=,stat=,command="]
    text = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=False).stdout
    table = []
    for line in text.splitlines():
        fields = line.split(None, 4)
        if len(fields) == 5 and not fields[3].startswith("Z"):
            table.append(Process(int(fields[0]), int(fields[1]), int(fields[2]), f" {mark} " in f"{fields[4]} "))
    return table


def owned(folder: Path) -> set[int]:
    """Give the ids of the living processes of the run kept in `folder`.

    These are the marked ones, the members of their process groups and the descendants of both. The calling process,
    its process group and its ancestors are never part of the answer.
    """
    mark = mark_of(folder)
    table = _linux_table(os.fsencode(mark)) if sys.platform.startswith("linux") else _ps_table(mark)
    parents = {p.pid: p.parent for p in table}
    forbidden = {os.getpid()}
    pid = os.getpid()
    while (pid := parents.get(pid, 0)) > 1:
        forbidden.add(pid)
    own_group = os.getpgrp()
    found = {p.pid for p in table if p.marked} - forbidden
    while True:
        groups = {p.group for p in table if p.pid in found} - {own_group, 0}
        more = {p.pid for p in table if p.parent in found or p.group in groups} - forbidden - found
        if not more:
            return found
        found |= more


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):  # it has ended meanwhile, or its id now belongs to somebody else
            continue


def _wait_gone(folder: Path, seconds: float) -> set[int]:
    """Wait until no process of the run is left, `seconds` at most; give those that are."""
    deadline = time.monotonic() + seconds
    while (left := owned(folder)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return left


def terminate(folder: Path) -> set[int]:
    """End every process of the run kept in `folder`: SIGTERM, then SIGKILL after `TERM_GRACE_S`.

    Gives the ids that would not go (none, usually).
    """
    left = owned(folder)
    if not left:
        return left
    _signal(left, signal.SIGTERM)
    left = _wait_gone(folder, TERM_GRACE_S)
    deadline = time.monotonic() + KILL_GRACE_S
    while left and time.monotonic() < deadline:
        _signal(left, signal.SIGKILL)  # again on every turn: a process may have started another one in between
        left = _wait_gone(folder, 4 * POLL_S)
    return left


def remove(folder: Path) -> None:
    """Delete the folder of a run; a second try catches what a dying process wrote during the first."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)


def start_guard(folder: Path) -> subprocess.Popen[bytes]:
    """Start the guard of `folder`; closing its `stdin`, or dying, sets it off. Ctrl-C does not reach it."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/" if os.name == "posix" else None,
        start_new_session=True,
    )


def main(folder: str) -> None:
    """Be the guard: wait for the end of standard input, then end the run kept in `folder` and remove it."""
    sys.stdin.buffer.read()
    terminate(Path(folder))
    remove(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
