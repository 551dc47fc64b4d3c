"""Timing for the benchmarks: interleaved repetitions, CPU time beside wall time, ratios within one run.

On a machine that does other work too, wall time moves by tens of per cent from minute to minute. So the things compared take turns,
a ratio is formed within each turn, and CPU time (all threads of the process) stands beside wall time.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Times:
    """CPU and wall seconds of the repetitions of one thing."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, cpu: float, wall: float) -> None:
        """Add one repetition (seconds)."""
        self.cpu.append(cpu)
        self.wall.append(wall)


class Stopwatch:
    """CPU and wall time from construction to `stop`."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self, into: Times) -> None:
        """Add what has passed to `into`."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        into.add(cpu, wall)


def interleave(cases: Mapping[str, Callable[[], Any]], repetitions: int, warmups: int = 2) -> dict[str, Times]:
    """Run the cases in turn, `repetitions` times after `warmups` untimed turns; every second turn goes backwards."""
    times = {name: Times() for name in cases}
    for turn in range(-warmups, repetitions):
        names = list(cases) if turn % 2 == 0 else list(reversed(cases))
        for name in names:
            watch = Stopwatch()
            cases[name]()
            watch.stop(times[name] if turn >= 0 else Times())
    return times


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """of / to, repetition by repetition; nan where the clock saw nothing pass (Windows' CPU clock ticks at 16 ms)."""
    return [a / b if b > 0 else float("nan") for a, b in zip(of, to, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, and the quartiles as its spread, ready to print."""
    if len(values) < 3:
        return f"{statistics.median(values):.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}..{high:.3f})"


def show_times(times: Mapping[str, Times]) -> None:
    """Print one line per case: median CPU and wall time in milliseconds."""
    width = max(len(name) for name in times)
    print(f"{'':{width}}  {'CPU ms':>9}  {'wall ms':>9}")
    for name, taken in times.items():
        print(f"{name:{width}}  {1e3 * statistics.median(taken.cpu):9.2f}  {1e3 * statistics.median(taken.wall):9.2f}")


def show_ratio(label: str, of: Times, to: Times, target: str) -> None:
    """Print the ratio of two cases by CPU time and by wall time, with quartiles, beside the target."""
    print(
        f"{label}: {spread(ratios(of.cpu, to.cpu))} by CPU time, {spread(ratios(of.wall, to.wall))} by wall time; target {target}"
    )


def machine() -> str:
    """One line on what this was measured with."""
    import os

    import torch

    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )


def require(holds: bool, what: str) -> None:
    """End the benchmark when results that must agree do not: a fast wrong answer is no answer."""
    if not holds:
        raise SystemExit(f"results differ: {what}; nothing was timed")
    print(f"checked: {what}")
