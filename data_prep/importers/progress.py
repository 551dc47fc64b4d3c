"""How far an import is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS = 15.0  # between two lines


class ImportProgress:
    """Shows files done of all, images per second and files skipped, on stderr. A context manager.

    bar: None asks the terminal; write: takes the lines; quiet: shows nothing.
    """

    def __init__(self, total: int, write: Callable[[str], None], quiet: bool, bar: bool | None = None) -> None:
        terminal = sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM", "") not in ("", "dumb")
        self._use_bar = (terminal if bar is None else bar) and not quiet
        self._total, self._write, self._quiet = total, write, quiet
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._last = time.monotonic()
        self._done = self._images = self._skipped = 0

    def __enter__(self) -> ImportProgress:
        if self._use_bar:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("importing"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f} files"),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=self._total, numbers="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show(self._bar)
            self._bar.stop()
            self._bar = None

    def step(self, images: int) -> None:
        """One file is done and gave so many images; 0: it was skipped."""
        self._done += 1
        self._images += images
        self._skipped += not images
        now = time.monotonic()
        if self._bar is not None and now - self._last > 0.2:
            self._last = now
            self._show(self._bar)
        elif self._bar is None and not self._quiet and now - self._last > _SECONDS:
            self._last = now
            self._write(f"imported {self._done} of {self._total} files, {self._numbers()}")

    def _show(self, bar: Progress) -> None:
        bar.update(self._task, completed=self._done, numbers=self._numbers())

    def _numbers(self) -> str:
        speed = self._images / max(1e-9, time.monotonic() - self._started)
        return f"{speed:.0f} images/s" + (f", {self._skipped} skipped" if self._skipped else "")
