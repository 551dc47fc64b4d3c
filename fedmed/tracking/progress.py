"""Progress of a run on the terminal: a bar where there is one, plain lines elsewhere (files, pipes, CI)."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmed.tracking.callbacks import Callback, Record, round_scalars

if TYPE_CHECKING:
    from rich.progress import Progress

_PLAIN_LINES = 40  # lines a run prints without a terminal, about


def interactive() -> bool:
    """Whether a bar can be drawn: stderr is a terminal that understands it, and this is no CI job."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM", "") not in ("", "dumb")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def headline(records: Sequence[Record], main_metric: str) -> tuple[float, float, str]:
    """Give mean training loss, value of the main metric and its full name for a round's records; NaN and "" for what is
    not there.

    The central test set comes before the mean over sites, test before validation, and views in the order of the
    records.
    """
    flat = round_scalars(records)
    loss = flat.get("mean/train_loss", math.nan)
    order = [(origin, split) for split in ("test", "val") for origin in ("central", "mean")]
    for origin, split in order:
        for key, value in flat.items():
            if main_metric and key.startswith(f"{origin}/{split}/") and key.rsplit("/", 1)[-1] == main_metric:
                return loss, value, key
    return loss, math.nan, ""


class ProgressBar(Callback):
    """Show round, training loss, main metric and time left, on stderr so that stdout holds only the result.

    Between evaluations the last known metric stays on show. `use_bar` None asks the terminal, `write` takes the plain
    lines (tests).
    """

    def __init__(self, use_bar: bool | None = None, write: Callable[[str], None] | None = None) -> None:
        self._use_bar = interactive() if use_bar is None else use_bar
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._bar: Progress | None = None
        self._task: Any = None
        self._name, self._metric_name = "", ""
        self._first, self._rounds = 1, 0
        self._started = 0.0
        self._loss = self._metric = math.nan

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Open the bar, or print the first line."""
        self._name, self._metric_name = str(info["name"]), str(info.get("main_metric") or "")
        self._first, self._rounds = int(info.get("start_round") or 1), int(info["rounds"])
        self._started = time.monotonic()
        if not self._use_bar:
            resumed = f", going on with round {self._first}" if self._first > 1 else ""
            sites = f", {len(info['sites'])} sites" if info.get("sites") else ""
            self._write(f"{self._name}: {self._rounds} rounds{sites}{resumed}")
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[sites]}", style="dim", markup=False),
            console=Console(stderr=True),
            speed_estimate_period=3600.0,  # rounds are slow; the default of 30 s would forget all but the last
        )
        self._task = self._bar.add_task(self._name, total=self._rounds, completed=self._first - 1, numbers="", sites="")
        self._bar.start()

    def on_record(self, record: Record) -> None:
        """Show which phase is running and how many sites have answered."""
        if self._bar is None or record.get("site") is None:
            return
        self._bar.update(self._task, sites=f"{record.get('phase')}: {record.get('site')}")

    def _numbers(self) -> str:
        words = [] if math.isnan(self._loss) else [f"loss {self._loss:.4f}"]
        return "  ".join(words + ([] if math.isnan(self._metric) else [f"{self._metric_name} {self._metric:.3f}"]))

    def on_round(self, round_number: int, records: Sequence[Record], elapsed: float) -> None:
        """Move the bar, or print a line: every round of short runs, about forty lines for long ones, and always the
        last.
        """
        loss, metric, _ = headline(records, self._metric_name)
        self._loss = self._loss if math.isnan(loss) else loss
        self._metric = self._metric if math.isnan(metric) else metric
        failed = [str(r.get("site")) for r in records if r.get("status") == "failed"]
        if self._bar is not None:
            self._bar.update(self._task, completed=round_number, numbers=self._numbers(), sites="")
            if failed:
                line = f"round {round_number}: no valid answer from {', '.join(failed)}"
                self._bar.console.print(line, style="yellow", highlight=False, markup=False)
            return
        step = max(1, self._rounds // _PLAIN_LINES)
        if round_number % step and round_number != self._rounds and not failed:
            return
        done = max(1, round_number - self._first + 1)
        left = (time.monotonic() - self._started) / done * (self._rounds - round_number)
        words = [f"round {round_number}/{self._rounds}", self._numbers(), f"left {_clock(left)}"]
        words += [f"no valid answer from {', '.join(failed)}"] if failed else []
        self._write("  ".join(word for word in words if word))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error; calling it twice does no harm."""
        if self._bar is not None:
            self._bar.update(self._task, sites="")
            self._bar.stop()
            self._bar = None
