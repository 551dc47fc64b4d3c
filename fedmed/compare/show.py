"""What is shown while a comparison runs: one line per run under way on a terminal, else a line at each start and end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmed.compare.follow import Clock, Tail
from fedmed.compare.plan import Key, Plan
from fedmed.compare.run import Outcome, Running
from fedmed.report.run_folder import RunFolder
from fedmed.report.tables import clock
from fedmed.tracking.progress import interactive

if TYPE_CHECKING:
    from rich.progress import Progress

LOOK_S = 1.0  # between two looks at a history


class Watch:
    """A `Watcher` that shows nothing yet: the tails of the runs under way, and the clock."""

    def __init__(self, plan: Plan, todo: Sequence[Key], weights: Mapping[Key, float]) -> None:
        self._plan, self._total, self._ended, self._looked = plan, len(todo), 0, 0.0
        wanted = set(todo)
        self._rounds = {cell.key: cell.config.federation.rounds for cell in plan.cells if cell.key in wanted}
        self._clock = Clock(weights, self._rounds)
        self._tails: dict[Key, Tail] = {}
        self._first: dict[Key, int] = {}

    def _follow(self, run: Running) -> int:
        """Begin to follow a run; gives the round after which it goes on."""
        history = RunFolder(self._plan.out / run.cell.folder).history
        tail = self._tails[run.cell.key] = Tail(history, self._plan.metrics)
        self._first[run.cell.key] = tail.round
        self._clock.begin(run.cell.key, tail.round)
        return tail.round

    def _look(self, runs: Sequence[Running]) -> bool:
        """Look at all histories, unless that was just done; True when it was."""
        if time.monotonic() - self._looked < LOOK_S:
            return False
        self._looked = time.monotonic()
        for run in runs:
            tail = self._tails[run.cell.key]
            tail.look()
            self._clock.at(run.cell.key, tail.round)
        return True

    def _left(self, run: Running) -> float:
        """Seconds that are left of a run, NaN before its first round is over."""
        tail, first = self._tails[run.cell.key], self._first[run.cell.key]
        done = tail.round - first
        spent = time.monotonic() - run.started
        return spent / done * (self._rounds[run.cell.key] - tail.round) if done > 0 else math.nan

    def _end(self, outcome: Outcome) -> Tail:
        self._ended += 1
        self._clock.over(outcome.cell.key)
        tail = self._tails.pop(outcome.cell.key)
        tail.look()
        return tail

    def started(self, run: Running) -> None:
        """A run has begun."""
        self._follow(run)

    def tick(self, runs: Sequence[Running]) -> None:
        """Look how far they are."""
        self._look(runs)

    def ended(self, outcome: Outcome) -> None:
        """A run is over."""
        self._end(outcome)

    def close(self) -> None:
        """Give the terminal back; calling it twice does no harm."""


class Lines(Watch):
    """For files, pipes and CI: a line when a run starts and one when it ends."""

    def __init__(
        self, plan: Plan, todo: Sequence[Key], weights: Mapping[Key, float], write: Callable[[str], None]
    ) -> None:
        super().__init__(plan, todo, weights)
        self._write = write

    def started(self, run: Running) -> None:
        """Print which run starts."""
        first = self._follow(run)
        going_on = f", going on after round {first}" if run.begun and first else ""
        rounds = self._rounds[run.cell.key]
        self._write(f"started {run.cell.label}: {rounds} round{'s' if rounds > 1 else ''}{going_on}")

    def ended(self, outcome: Outcome) -> None:
        """Print how it ended."""
        tail = self._end(outcome)
        self._write(ending(outcome, tail.text, self._ended, self._total, self._clock.left))


class Bars(Watch):
    """For a terminal: a bar per run under way and one for all of them."""

    def __init__(self, plan: Plan, todo: Sequence[Key], weights: Mapping[Key, float]) -> None:
        super().__init__(plan, todo, weights)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar: Progress | None = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[where]}", markup=False),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(stderr=True),
        )
        fields: dict[str, Any] = {"where": f"0/{self._total}", "numbers": "", "left": ""}
        self._all = self._bar.add_task(plan.name, total=self._total, **fields)
        self._tasks: dict[Key, Any] = {}
        self._bar.start()

    def started(self, run: Running) -> None:
        """Add a line."""
        first, rounds = self._follow(run), self._rounds[run.cell.key]
        if self._bar is not None:
            fields: dict[str, Any] = {"where": f"round {first}/{rounds}", "numbers": "", "left": ""}
            self._tasks[run.cell.key] = self._bar.add_task(run.cell.label, total=rounds, completed=first, **fields)

    def tick(self, runs: Sequence[Running]) -> None:
        """Move the bars."""
        if self._bar is None or not self._look(runs):
            return
        for run in runs:
            tail = self._tails[run.cell.key]
            where = f"round {tail.round}/{self._rounds[run.cell.key]}"
            task = self._tasks[run.cell.key]
            self._bar.update(
                task, completed=tail.round, where=where, numbers=tail.text, left=left_words(self._left(run))
            )
        self._bar.update(self._all, left=left_words(self._clock.left))

    def ended(self, outcome: Outcome) -> None:
        """Replace the line by one that stays."""
        tail = self._end(outcome)
        if self._bar is None:
            return
        self._bar.remove_task(self._tasks.pop(outcome.cell.key))
        line = ending(outcome, tail.text, self._ended, self._total)
        self._bar.console.print(line, style="red" if outcome.error else None, highlight=False, markup=False)
        self._bar.update(self._all, completed=self._ended, where=f"{self._ended}/{self._total}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def ending(outcome: Outcome, metric: str, number: int, total: int, left: float = math.nan) -> str:
    """The line of a run that ended; of a failure all that is known, indented below."""
    head = f"{number}/{total} {outcome.cell.label}"
    if outcome.error:
        first, *rest = outcome.error.splitlines()
        return "\n  ".join([f"{head} failed after {clock(outcome.seconds)}: {first}", *rest])
    return "  ".join(word for word in (f"{head}: {clock(outcome.seconds)}", metric, left_words(left)) if word)


def left_words(seconds: float) -> str:
    """Seconds left for people, "" when nobody knows or nothing is left."""
    return f"left {clock(round(seconds))}" if seconds >= 1 else ""


def watcher(
    plan: Plan,
    todo: Sequence[Key],
    weights: Mapping[Key, float],
    quiet: bool,
    write: Callable[[str], None] | None = None,
) -> Watch:
    """Bars where stderr is a terminal, else lines on stderr; with `quiet` only failures are shown."""
    say = write or (lambda line: print(line, file=sys.stderr, flush=True))
    if quiet:
        return Lines(plan, todo, weights, lambda line: say(line) if " failed after " in line else None)
    return Bars(plan, todo, weights) if write is None and interactive() else Lines(plan, todo, weights, say)
