"""A lock file that one process holds at a time, and that says which; the system lets go of it when the process ends, whatever way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def only_one(path: Path, refusal: Callable[[str], Exception], wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` (mode 0600) and write this process's id into it.

    wait_s: somebody who only looks at the lock holds it for a moment. Raises `refusal(process id)` when another holds it for longer.
    """
    with path.open("a+") as file:
        os.fchmod(file.fileno(), 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise refusal(_written(file)) from None
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """Process id of who holds the lock file, `unknown` if it does not say; None when nobody does."""
    try:
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _written(file)
    except FileNotFoundError:
        pass
    return None


def _written(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"
